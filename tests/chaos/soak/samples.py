"""What a node weighs while nothing happens on it: memory, descriptors, and all that it has made."""

import hashlib
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

from nodeagent.linux import mountinfo
from tests.e2e.test_recovery import processes_titled
from tests.support.node import RunningAgent

CALM_SECONDS = 20.0
CGROUPS = Path("/sys/fs/cgroup")


class Sampler:
    """An agent's node. supervisor: of a pod that is there all the time."""

    def __init__(self, agent: RunningAgent) -> None:
        self._agent = agent
        root = str(agent.root / "lib")
        self._instance = hashlib.sha256(root.encode()).hexdigest()[:8]

    def calm(self) -> dict[str, float]:
        """A sample, once nothing is made or removed behind the requests any more."""
        deadline = time.monotonic() + CALM_SECONDS
        before = self._made()
        while time.monotonic() < deadline:
            time.sleep(0.4)
            now = self._made()
            if now == before and not list((self._agent.root / "lib/trash").iterdir()):
                break
            before = now
        return {**before, **self._processes()}

    def _made(self) -> dict[str, float]:
        state, lib = self._agent.root / "run", self._agent.root / "lib"
        points = [mount.point for mount in mountinfo.parse(mountinfo.table())]
        mine = [point for point in points if point.startswith(str(self._agent.root))]
        return {
            "mounts": len(mine),
            "network namespaces": sum(point.endswith("/ns/net") for point in mine),
            "links": sum(self._instance in name for name in os.listdir("/sys/class/net")),
            "cgroups": sum(1 for _ in self._groups()),
            "files of the state directory": files_below(state),
            "files of containers": files_below(lib / "containers"),
            "directories of pods": len(list((state / "pods").iterdir())),
            **self._rows(),
        }

    def _groups(self) -> Iterator[str]:
        for top in (*CGROUPS.glob("nodeagent-*"), *CGROUPS.glob("*/nodeagent-*")):
            if top.name == f"nodeagent-{self._instance}":
                yield from (path for path, _, _ in os.walk(top))

    def _rows(self) -> dict[str, float]:
        """Addresses are among them: each lease is a row."""
        database = self._agent.root / "lib/state.db"
        rows: dict[str, float] = {}
        with (
            suppress(sqlite3.Error),
            closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=0)) as db,
        ):
            names = db.execute("SELECT name FROM sqlite_schema WHERE name LIKE 'record_%'")
            for (name,) in names.fetchall():
                if "autoindex" not in name:
                    [count] = db.execute(f"SELECT count(*) FROM {name}").fetchone()
                    rows[f"rows of {name.removeprefix('record_')}"] = count
        return rows

    def _processes(self) -> dict[str, float]:
        [launcher] = list(processes_titled(f"nodeagent.sandbox.launcher {self._agent.root}/run"))[
            :1
        ]
        supervisors = [
            pid
            for pod in (self._agent.root / "run/pods").iterdir()
            for pid in processes_titled(f"nodeagent.sandbox.supervisor {pod.name}")
        ]
        return {
            "memory of the agent, KiB": pss_kib(self._agent.pid),
            "memory of the launcher, KiB": pss_kib(launcher),
            "memory of supervisors, KiB": sum(map(pss_kib, supervisors)),
            "descriptors of the agent": descriptors(self._agent.pid),
            "descriptors of the launcher": descriptors(launcher),
            "descriptors of supervisors": sum(map(descriptors, supervisors)),
            "threads of the agent": len(os.listdir(f"/proc/{self._agent.pid}/task")),
            "supervisors": len(supervisors),
        }


def files_below(directory: Path) -> int:
    """Their number; mounts of procfs, where a pod shares its PID namespace, are not looked into."""
    count = 0
    for _, names, files in os.walk(directory):
        names[:] = [name for name in names if name != "ns"]
        count += len(files)
    return count


def pss_kib(pid: int) -> float:
    """The proportional share of what is not a file's (proc_pid_smaps(5)).

    Files are shared with every process of the machine that has the same ones, so that their share changes with those.
    """
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    [value] = [line.split()[1] for line in lines if line.startswith("Pss_Anon:")]
    return float(value)


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))
