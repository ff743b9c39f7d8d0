"""Unpacks what the guests are made of, all of it from Debian: kernels, a C library, an emulator, a policy compiler.

A package of another release is only downloaded and unpacked, by an apt with lists of its own. For the emulator, its own
libraries and kmod are installed from the host's release where they are missing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.support.images import PROJECT

CACHE = PROJECT / ".cache/guest"
KERNELS = ("uml", "uml-trixie", "qemu")

_SUITES = {"uml": "sid", "uml-trixie": "trixie", "qemu": "bookworm-backports"}
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_ARCHIVE = "http://deb.debian.org/debian"
_LOADER = b"/lib64/ld-linux-x86-64.so.2\0"
_APT_CONF = """
Dir::Etc "{base}"; Dir::Etc::sourcelist "sources.list"; Dir::Etc::sourceparts "/dev/null";
Dir::State "{base}"; Dir::State::lists "{base}/lists"; Dir::State::status "{base}/status"; Dir::Cache "{base}/cache";
Acquire::Languages "none"; Acquire::Check-Valid-Until "false"; APT::Sandbox::User "root";
"""


def folder(kernel: str) -> Path:
    """Where a guest's kernel is unpacked: `linux` or `boot/vmlinuz-*`, `modules`."""
    return CACHE / kernel


def is_prepared(kernel: str) -> bool:
    return (folder(kernel) / "modules").exists()


def prepare(kernel: str) -> None:
    """Make a kernel ready to boot, unless it is."""
    if is_prepared(kernel):
        return
    shutil.rmtree(folder(kernel), ignore_errors=True)
    folder(kernel).mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        apt = _Apt(_SUITES[kernel], Path(scratch))
        if kernel == "qemu":
            _prepare_qemu(apt, folder(kernel))
        else:
            _prepare_uml(apt, folder(kernel))


def prepare_policy_compiler() -> None:
    """That of SELinux, of the host's own release, with the library that it needs."""
    target = folder("selinux")
    if target.exists():
        return
    subprocess.run(["apt-get", "-qq", "update"], check=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            *"apt-get -qq -o APT::Sandbox::User=root download".split(),
            "secilc",
            "libsepol2",
        ]
        subprocess.run(command, cwd=scratch, check=True)
        unpacked = Path(scratch) / "unpacked"
        for archive in Path(scratch).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True)
        shutil.move(unpacked, target)


def _prepare_uml(apt: _Apt, target: Path) -> None:
    """User-mode Linux runs with its own release's C library, which is newer than the host's."""
    apt.unpack(["user-mode-linux"], target)
    apt.unpack(["libc6"], target / "libc")
    libraries = target / "lib"
    libraries.mkdir()
    for source, name in (("ld-linux-x86-64.so.2", "ld.so"), ("libc.so.6", "libc.so.6")):
        shutil.copy2(target / "libc/usr/lib/x86_64-linux-gnu" / source, libraries / name)
    # The program names another loader, relative to its working directory. A loader that is started with the program as
    # its argument moves brk to where this kernel wants its physical memory.
    program = bytearray((target / "usr/bin/linux.uml").read_bytes())
    start = program.index(_LOADER)
    program[start : start + len(_LOADER)] = b"lib/ld.so\0".ljust(len(_LOADER), b"\0")
    (target / "linux").write_bytes(program)
    (target / "linux").chmod(0o755)
    shutil.rmtree(target / "libc")
    _link_modules(target, next((target / "usr/lib/uml/modules").iterdir()))


def _prepare_qemu(apt: _Apt, target: Path) -> None:
    """The newer emulator runs with the libraries that the host's own one pulled in; it forks twice as fast."""
    programs = {"qemu-system-x86_64": "qemu-system-x86", "depmod": "kmod"}
    _install([package for name, package in programs.items() if shutil.which(name) is None])
    image = re.search(r"Depends: (linux-image-\S+)", apt.depends("linux-image-cloud-amd64"))
    assert image, "linux-image-cloud-amd64 depends on no image"
    apt.unpack([image[1]], target)
    apt.unpack(["qemu-system-x86", "qemu-system-data", "seabios"], target)
    modules = next((target / "lib/modules").iterdir())
    subprocess.run(["depmod", "-b", target, modules.name], check=True)
    _link_modules(target, modules)


def _install(packages: list[str]) -> None:
    if not packages:
        return
    apt_get = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run([*apt_get, "update"], check=True)
    command = [*apt_get, "install", "-y", "--no-install-recommends", *packages]
    subprocess.run(command, env=environment, check=True)


def _link_modules(target: Path, modules: Path) -> None:
    (target / "modules").symlink_to(modules.relative_to(target))


class _Apt:
    """apt for one other release, with its lists and packages below `base`."""

    def __init__(self, suite: str, base: Path) -> None:
        self._base = base
        for name in ("lists/partial", "cache/archives/partial", "apt.conf.d", "preferences.d"):
            (base / name).mkdir(parents=True)
        (base / "status").touch()
        (base / "sources.list").write_text(
            f"deb [signed-by={_KEYRING}] {_archive()} {suite} main\n"
        )
        (base / "apt.conf").write_text(_APT_CONF.format(base=base))
        self._environment = {**os.environ, "APT_CONFIG": str(base / "apt.conf")}
        self._run("apt-get", "-qq", "update")

    def depends(self, package: str) -> str:
        return self._run("apt-cache", "depends", package)

    def unpack(self, packages: list[str], target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=self._base) as downloads:
            self._run("apt-get", "-qq", "download", *packages, cwd=downloads)
            for archive in Path(downloads).glob("*.deb"):
                self._run("dpkg-deb", "-x", str(archive), str(target))

    def _run(self, *command: str, cwd: str = "/") -> str:
        done = subprocess.run(
            command, env=self._environment, cwd=cwd, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout


def _archive() -> str:
    """The Debian archive of the host's own apt sources."""
    listing = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)"],
        capture_output=True,
        text=True,
        check=True,
    )
    for line in listing.stdout.splitlines():
        origin, _, address = line.partition(" ")
        if origin == "Debian" and address.rstrip("/").endswith("/debian"):
            return address.rstrip("/")
    return _ARCHIVE
