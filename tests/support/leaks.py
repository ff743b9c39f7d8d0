"""What a test run may leave on a machine: a snapshot of it, and what is new since.

Several runs, and agents that somebody started by hand, may share the machine. What carries this run's name (its
processes, which inherit it in their environment, and everything below its temporary directory) is always its own. What
can't be told by name (cgroups, links, tables) counts only while nobody else's agent or test run is there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

VARIABLE = "NODEAGENT_TEST_RUN"
PATIENCE_SECONDS = 60.0  # the kernel takes network namespaces down in the background
CGROUPS = Path("/sys/fs/cgroup")
FOLDERS = ("/tmp", "/run", "/run/netns", "/var/lib", "/var/tmp", "/dev/shm")

_OURS = re.compile(r"nodeagent|na-(?!test-)")  # runs that failed keep their own /tmp/na-test-*
_STRANGER = re.compile(rb"nodeagent\0serve|nodeagent\.(sandbox|agent)|bin/nodeagent")


class Machine:
    """The things on a machine that a run named `run`, with its files below `folder`, could leave."""

    def __init__(self, run: str, folder: Path) -> None:
        self._run = run
        self._folder = str(folder)
        self._before = {*self._things(), *_named_things()}

    def left(self, patience: float = PATIENCE_SECONDS) -> list[str]:
        """What is new and does not go away within `patience` seconds."""
        deadline = time.monotonic() + patience
        while (new := self._new()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return sorted(new)

    def _new(self) -> set[str]:
        return set(self._things()) - self._before

    def _things(self) -> Iterator[str]:
        parents = processes()
        ours = {pid for pid in parents if self._is_ours(pid, parents)}
        yield from (f"process {pid}: {command(pid)}" for pid in ours - {os.getpid()})
        yield from (f"mount {line}" for line in mounts() if self._folder in line)
        yield from _held_namespaces()
        if not any(_is_agent_or_run(pid) for pid in parents.keys() - ours):
            yield from _named_things()

    def _is_ours(self, pid: int, parents: dict[int, int]) -> bool:
        environment = b"\0" + read(f"/proc/{pid}/environ") + b"\0"
        if f"\0{VARIABLE}=".encode() in environment:  # another run may have copied our mounts
            return f"\0{VARIABLE}={self._run}\0".encode() in environment
        if self._folder.encode() in read(f"/proc/{pid}/mountinfo") and not _in_our_mounts(pid):
            return True
        while pid > 1 and pid != os.getpid():
            pid = parents.get(pid, 0)
        return pid == os.getpid()


def processes() -> dict[int, int]:
    """The parent of each process."""
    parents = {}
    for name in os.listdir("/proc"):
        stat = read(f"/proc/{name}/stat") if name.isdigit() else b""
        if stat:
            parents[int(name)] = int(stat.rpartition(b")")[2].split()[1])
    return parents


def _in_our_mounts(pid: int) -> bool:
    with suppress(OSError):
        return os.stat(f"/proc/{pid}/ns/mnt").st_ino == os.stat("/proc/self/ns/mnt").st_ino
    return True


def _is_agent_or_run(pid: int) -> bool:
    command, environment = read(f"/proc/{pid}/cmdline"), read(f"/proc/{pid}/environ")
    return bool(_STRANGER.search(command)) or f"{VARIABLE}=".encode() in environment


def command(pid: int) -> str:
    command = read(f"/proc/{pid}/cmdline") or read(f"/proc/{pid}/comm")
    return command.replace(b"\0", b" ").decode(errors="replace").strip()[:200]


def mounts() -> list[str]:
    return read("/proc/self/mountinfo").decode(errors="replace").splitlines()


def _held_namespaces() -> Iterator[str]:
    """Namespaces that this very process keeps alive by a descriptor."""
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{number}")
            if re.match(r"(net|mnt|pid|ipc|uts|user|cgroup):\[", target):
                yield f"descriptor {number} of {target}"


def _named_things() -> Iterator[str]:
    for folder, names, _ in os.walk(CGROUPS):
        yield from (f"cgroup {folder}/{name}" for name in names)
    yield from (f"link {name}" for name in os.listdir("/sys/class/net"))
    yield from (f"nft table {table}" for table in _nft_tables())
    for folder in FOLDERS:
        with suppress(FileNotFoundError):
            yield from (f"file {folder}/{name}" for name in os.listdir(folder) if _OURS.match(name))


def _nft_tables() -> Iterator[str]:
    if shutil.which("nft") is None:
        return
    listing = subprocess.run(["nft", "-j", "list", "tables"], capture_output=True, check=False)
    for entry in json.loads(listing.stdout or b"{}").get("nftables", []):
        if "table" in entry:
            yield f"{entry['table']['family']} {entry['table']['name']}"


def read(path: str) -> bytes:
    """The content of a file of a process that may be gone, or may not be ours to read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""
