"""The oracle after every fault: what the answer may say, and what may be left of an agent's work.

`Footprint` is what an agent has on a machine, by the instance's name: it counts although other agents run there. What
is there before a round is compared with what is there after it, when everything that the round made has been removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import grpc

from nodeagent.config import Config
from nodeagent.lifecycle.places import Places
from tests.support import leaks, node
from tests.support.node import RunningAgent

# What the kernel, and passes of the agent over what is left (of the trash after 30 s), may take to remove it all, also
# on a busy machine.
PATIENCE_SECONDS = 30.0 + node.PATIENCE_SECONDS

# Directories whose content is data, not a sign that something was left.
_OPAQUE = re.compile(r"lib/layers/[^/]+/|lib/staging/reserve|/profiles/sha256/")
# Files that come and go with the database.
_OF_THE_STORE = re.compile(r"lib/state\.db(-wal|-shm|-journal)?$")
_PYTHON = re.compile(
    r"Traceback|Unexpected <class|"
    r"\b(?!OSError|TimeoutError)[A-Z]\w*(?:Error|Exception)\b[:(]|\bNone\b|<[a-z_.]+ object at"
)
# The right answers of a call that a fault has hit. UNKNOWN is that of a pull (`cri.status`), with a text of the agent;
# gRPC says it as well of an exception that nobody translated, in words of Python.
_CLEAR = {
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.PERMISSION_DENIED,
}

_OF_CLIENT = "Deadline Exceeded"  # what gRPC says of a deadline of the client; the agent names what takes so long


def unclear(error: grpc.RpcError) -> str:
    """The reason why this is not the clear error that a fault should end in, or ""."""
    code, details = error.code(), error.details() or ""
    if code == grpc.StatusCode.DEADLINE_EXCEEDED and details == _OF_CLIENT:
        return "the call hangs"
    if code not in _CLEAR:
        return f"{code.name}: {details}"
    if not details or _PYTHON.search(details):
        return f"not a clear text: {code.name}: {details}"
    return ""


class Footprint:
    """What the agent that has its files below `root` has on this machine.

    traced: processes that died while they were traced, as far as that is known. Such a one is not its parent's to reap
    until the tracer has let go, and then the parent has looked already.
    """

    def __init__(self, agent: RunningAgent) -> None:
        self._agent = agent
        self._root = str(agent.root)
        self._instance = Places.of(
            Config(root=str(agent.root / "lib"), state=str(agent.root / "run"))
        ).instance
        self.cgroup = f"/nodeagent-{self._instance}"
        self.traced: set[int] = set()

    def now(self) -> Counter[str]:
        """Everything, each as a line that names it; several of the same are counted."""
        return Counter(self._things())

    def new_since(self, before: Counter[str], patience: float = PATIENCE_SECONDS) -> list[str]:
        """What is there beyond `before`, and does not go away within `patience` seconds."""
        return _lasting(lambda: self.now() - before, patience)

    def missing_since(self, before: Counter[str], patience: float = PATIENCE_SECONDS) -> list[str]:
        """What is there no more of `before`, and does not come back within `patience` seconds.

        A look is not at one moment: what is replaced meanwhile may be seen neither before nor after.
        """
        return _lasting(lambda: before - self.now(), patience)

    def tear_down(self) -> None:
        """Remove mounts, links, tables and cgroups of an agent whose processes are all dead."""
        ours = [line.split()[4] for line in leaks.mounts() if self._root in line.split()[4]]
        for place in reversed(ours):
            subprocess.run(["umount", "-l", place], check=False)
        for name in os.listdir("/sys/class/net"):
            if self._instance in name:
                subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)
        for family in ("inet", "bridge"):
            table = ["nft", "delete", "table", family, f"nodeagent_{self._instance}"]
            subprocess.run(table, check=False, capture_output=True)
        for hierarchy in leaks.CGROUPS.iterdir():
            for folder, _, _ in os.walk(f"{hierarchy}{self.cgroup}", topdown=False):
                with suppress(OSError):
                    os.rmdir(folder)

    def _things(self) -> Iterator[str]:
        yield from self._processes()
        yield from (
            f"mount {line.split()[4]}" for line in leaks.mounts() if self._root in line.split()[4]
        )
        for hierarchy in sorted(leaks.CGROUPS.iterdir()):
            yield from (f"cgroup {folder}" for folder, _, _ in os.walk(f"{hierarchy}{self.cgroup}"))
        links = os.listdir("/sys/class/net")
        yield from (f"link {name}" for name in links if self._instance in name)
        yield from self._elements()
        yield from self._files("lib")
        yield from self._files("run")
        yield from (f"row {row}" for row in rows(self._agent.root / "lib/state.db"))

    def _processes(self) -> Iterator[str]:
        parents = leaks.processes()
        for pid, parent in parents.items():
            command = leaks.command(pid)
            if leaks.read(f"/proc/{pid}/cmdline"):
                if self._is_grouped(pid) or (self._root in command and "launcher" in command):
                    yield f"process {command}"
            # A dead one is in no cgroup of version 1 any more: it is told by who has not reaped it.
            elif pid not in self.traced and self._is_ours(parent):
                yield f"process {command}, dead, of {leaks.command(parent)}"

    def _is_grouped(self, pid: int) -> bool:
        return f"{self.cgroup}/" in leaks.read(f"/proc/{pid}/cgroup").decode()

    def _is_ours(self, pid: int) -> bool:
        command = leaks.read(f"/proc/{pid}/cmdline")
        return self._is_grouped(pid) or (b"serve" in command and self._root.encode() in command)

    def _elements(self) -> Iterator[str]:
        if shutil.which("nft") is None:
            return
        for entry in json.loads(_ruleset()).get("nftables", []):
            for kind in entry.keys() & {"table", "set", "map"}:
                body = entry[kind]
                if self._instance not in body.get("table", body["name"]):
                    continue
                yield f"nft {kind} {body['family']} {body['name']}"
                if body["name"] != "node4" and body["name"] != "node6":
                    yield from (f"nft element {e}" for e in body.get("elem", ()))

    def _files(self, place: str) -> Iterator[str]:
        for folder, directories, files in os.walk(f"{self._root}/{place}"):
            inside = os.path.relpath(folder, self._root)
            directories[:] = [n for n in directories if not _OPAQUE.match(f"{inside}/{n}/")]
            names = [f"{inside}/{name}" for name in (*directories, *files)]
            yield from (f"file {name}" for name in names if not _OF_THE_STORE.match(name))


def _lasting(difference: Callable[[], Counter[str]], patience: float) -> list[str]:
    deadline = time.monotonic() + patience
    while (found := difference()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return sorted(f"{thing} × {count}" if count > 1 else thing for thing, count in found.items())


def _ruleset() -> bytes:
    """Everybody's rules: who changes some of them meanwhile can make a listing fail."""
    deadline = time.monotonic() + node.PATIENCE_SECONDS
    while True:
        listing = subprocess.run(["nft", "-j", "list", "ruleset"], capture_output=True, check=False)
        if listing.returncode == 0:
            return listing.stdout or b"{}"
        if time.monotonic() > deadline:
            raise RuntimeError(f"nft: {listing.stderr.decode(errors='replace')}")
        time.sleep(0.1)


def rows(path: Path) -> list[str]:
    """The records of a store, as kind and key."""
    deadline = time.monotonic() + node.PATIENCE_SECONDS
    while True:
        try:
            return _rows_of_copy(path)
        except sqlite3.DatabaseError:  # a checkpoint came between the copies of the two files
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _rows_of_copy(path: Path) -> list[str]:
    """Of a copy, because the agent may have locked its file."""
    with tempfile.TemporaryDirectory(prefix="na-rows-") as folder:
        for name in (path.name, f"{path.name}-wal"):
            with suppress(FileNotFoundError):
                shutil.copy(path.with_name(name), folder)
        with closing(sqlite3.connect(f"{folder}/{path.name}")) as database:
            tables = [
                str(name)
                for (name,) in database.execute(
                    "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE 'record_%'"
                )
            ]
            return [
                f"{table} {key}"
                for table in tables
                for (key,) in database.execute(f"SELECT key FROM {table}")
            ]


def descriptors(pid: int) -> Counter[str]:
    """What a process has open, by kind."""
    kinds: Counter[str] = Counter()
    for number in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            target = os.readlink(f"/proc/{pid}/fd/{number}")
            kinds[re.sub(r":\[\d+\]|\d+", "", target)] += 1
    return kinds
