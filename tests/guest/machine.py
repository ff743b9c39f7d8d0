"""Boots a guest, runs one command in it, and ends it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tests.guest import initramfs, setup

HERE = Path(__file__).parent
TIMED_OUT, DIED = 124, 125
POLL_SECONDS = 0.03
CONSOLE_TAIL = 3000  # characters of the console that are shown when a guest died
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A machine to boot. `init` is "none" (the command is nearly alone) or "systemd"; `security`: "selinux" or this."""

    kernel: str = "uml"
    init: str = "none"
    security: str = "apparmor"
    memory_mib: int = 2048
    disk_mib: int = 8192  # sparse
    cpus: int = 1
    disk: Path | None = None  # an ext4 to use and to keep, instead of a new one
    timeout_seconds: float = 600
    verbose: bool = False


def run(guest: Guest, command: list[str], directory: Path, environment: dict[str, str]) -> int:
    """Run `command` in `directory`, its output to ours. Returns its exit status, TIMED_OUT or DIED."""
    with ExitStack() as stack:
        scratch = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="guest-", dir="/var/tmp"))
        )
        control = _control(scratch, guest, command, directory, environment)
        if guest.disk is None:
            make_disk(scratch / "disk", guest.disk_mib, "-O ^has_journal")
        else:
            (scratch / "disk").symlink_to(guest.disk.resolve())
        console = stack.enter_context((scratch / "console").open("wb"))
        start = _start_qemu if guest.kernel == "qemu" else _start_uml
        machine = start(
            stack, guest, scratch, _kernel_arguments(guest, control, directory), console
        )
        status = _follow(machine, control, guest.timeout_seconds)
        if guest.verbose or status == DIED:
            text = (scratch / "console").read_text(errors="replace")
            print(text if guest.verbose else text[-CONSOLE_TAIL:], file=sys.stderr)
        return status


def _control(
    scratch: Path, guest: Guest, command: list[str], directory: Path, environment: dict[str, str]
) -> Path:
    """The directory that host and guest share: the job, what runs it, and later its output."""
    control = scratch / "control"
    control.mkdir()
    variables = {**ENVIRONMENT, "NODEAGENT_GUEST": guest.kernel, **environment}
    job = {"command": command, "directory": str(directory), "environment": variables}
    (control / "job.json").write_text(json.dumps(job))
    for name in ("agent.py", "guest.target", "guest.service"):
        text = (HERE / name).read_text()
        (control / name).write_text(text.replace("@PYTHON@", sys.executable))
    return control


def make_disk(path: Path, size_mib: int, features: str = "") -> None:
    with path.open("wb") as file:
        file.truncate(size_mib << 20)
    options = f"-q -F -t ext4 {features} -E lazy_itable_init=1,nodiscard"
    subprocess.run(["/sbin/mke2fs", *options.split(), path], stdin=subprocess.DEVNULL, check=True)


def _kernel_arguments(guest: Guest, control: Path, directory: Path) -> list[str]:
    modules = (setup.folder(guest.kernel) / "modules").resolve()
    return [
        f"guest.init={guest.init}",
        f"guest.control={control}",
        f"guest.directory={directory}",
        f"guest.modules={modules}",
        f"guest.python={sys.executable}",
        f"security={guest.security}",
        *"apparmor=1 panic=-1 rdinit=/init quiet".split(),
    ]


def _make_initramfs(guest: Guest, scratch: Path, wanted: tuple[str, ...]) -> Path:
    path = scratch / "initramfs"
    path.write_bytes(initramfs.build(setup.folder(guest.kernel) / "modules", wanted))
    return path


def _start_uml(
    stack: ExitStack, guest: Guest, scratch: Path, arguments: list[str], console: BinaryIO
) -> subprocess.Popen[bytes]:
    """User-mode Linux: a kernel that is a program. Its many processes all go with the first of a PID namespace."""
    kernel = setup.folder(guest.kernel)
    command = [
        *"unshare --pid --fork --kill-child".split(),
        *("sh", "-c", '"$@"; :', "uml", "env", f"LD_LIBRARY_PATH={kernel / 'lib'}", "./linux"),
        f"mem={guest.memory_mib}M",
        f"initrd={_make_initramfs(guest, scratch, ('overlay',))}",
        f"ubda={scratch / 'disk'}",
        f"uml_dir={scratch}",
        *"umid=u seccomp=auto con=null con0=null,fd:1 guest.kind=uml guest.disk=ubda".split(),
        *arguments,
    ]
    environment = {"PATH": ENVIRONMENT["PATH"], "TMPDIR": "/dev/shm", "HOME": str(scratch)}
    return stack.enter_context(_process(command, console, cwd=kernel, environment=environment))


def _start_qemu(
    stack: ExitStack, guest: Guest, scratch: Path, arguments: list[str], console: BinaryIO
) -> subprocess.Popen[bytes]:
    """A whole machine, emulated; the host's files come by virtiofs."""
    kernel, socket = setup.folder("qemu"), scratch / "virtiofs"
    shared = [
        "/usr/lib/qemu/virtiofsd",
        f"--socket-path={socket}",
        "-o",
        "source=/",
        "-o",
        "cache=always",
    ]
    shared += ["-o", "sandbox=chroot", "-o", "xattr", "--thread-pool-size=0"]
    files = stack.enter_context(_process(shared, console))
    while not socket.exists() and files.poll() is None:
        time.sleep(POLL_SECONDS)
    modules = ("virtio_pci", "virtio_blk", "virtiofs", "overlay")
    size = f"{guest.memory_mib}M"
    line = [
        "console=ttyS0",
        "mitigations=off",
        "nokaslr",
        "guest.kind=qemu",
        "guest.disk=vda",
        *arguments,
    ]
    command = [
        *(str(kernel / "usr/bin/qemu-system-x86_64"), "-L", str(kernel / "usr/share/seabios")),
        *("-L", str(kernel / "usr/share/qemu"), "-L", "/usr/share/qemu"),
        *"-M q35,hpet=off -accel tcg,thread=multi,tb-size=512 -cpu max,la57=off".split(),
        *("-smp", str(guest.cpus), "-m", size),
        *(
            "-object",
            f"memory-backend-memfd,id=memory,size={size},share=on",
            "-numa",
            "node,memdev=memory",
        ),
        *"-nodefaults -display none -no-reboot -serial stdio".split(),
        *("-kernel", str(next((kernel / "boot").glob("vmlinuz-*")))),
        *("-initrd", str(_make_initramfs(guest, scratch, modules))),
        *("-chardev", f"socket,id=files,path={socket}"),
        *("-device", "vhost-user-fs-pci,chardev=files,tag=host,queue-size=1024"),
        *("-drive", f"file={scratch / 'disk'},if=virtio,format=raw,cache=unsafe"),
        *("-device", "virtio-rng-pci", "-append", " ".join(line)),
    ]
    return stack.enter_context(_process(command, console))


@contextmanager
def _process(
    command: list[str],
    console: BinaryIO,
    *,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=console,
        stderr=console,
        cwd=cwd,
        env=environment or dict(os.environ),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _follow(machine: subprocess.Popen[bytes], control: Path, timeout_seconds: float) -> int:
    """Copy the command's output as it comes, until the guest says how it ended."""
    deadline = time.monotonic() + timeout_seconds
    with ExitStack() as stack:
        streams = []
        for name, sink in (("stdout", sys.stdout), ("stderr", sys.stderr)):
            (control / name).touch()
            streams.append((stack.enter_context((control / name).open("rb")), sink.buffer))
        while True:
            ended, status = machine.poll() is not None, _status(control)
            for source, sink in streams:
                shutil.copyfileobj(source, sink)
                sink.flush()
            if status is not None or ended:
                return DIED if status is None else status
            if time.monotonic() > deadline:
                return TIMED_OUT
            time.sleep(POLL_SECONDS)


def _status(control: Path) -> int | None:
    try:
        return int((control / "status").read_text())
    except (FileNotFoundError, ValueError):
        return None
