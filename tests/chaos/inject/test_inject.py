"""Rounds of the sweep: those that have found something once, and a part of all others, by a seed.

CHAOS_SEED=… repeats the choice, CHAOS_SECONDS=… plays longer. `make chaos` plays them all.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.chaos import seeds
from tests.chaos.inject.rounds import Round
from tests.chaos.inject.steps import STEPS
from tests.chaos.inject.strace import Fault, Injection, unavailable
from tests.chaos.inject.sweep import Sweep, describe
from tests.chaos.inject.world import World, first_of, stock
from tests.chaos.oracles import unclear
from tests.conftest import IN_CI
from tests.support import leaks
from tests.support.node import wait_for
from tests.support.registry import running_registry

SECONDS = float(os.environ.get("CHAOS_SECONDS", "120"))
SEED = seeds.of_this_run()

OPENING = """
import os
os.read(0, 1)
for _ in range(5):
    try:
        os.open("/dev/null", os.O_RDONLY)
    except OSError:
        pass
os._exit(0)
"""

pytestmark = pytest.mark.timeout(3600)  # a round has bounds of its own

# Each was red once: step, process, calls, fault, number.
FOUND = [
    "RunPodSandbox-rich agent pidfd_open ENOMEM 1",
    "RunPodSandbox agent openat EMFILE 20",
    "RunPodSandbox agent+launcher openat+openat KILL 21+7",
    "RunPodSandbox agent descriptors EMFILE+ 1",
    "StopPodSandbox launcher recvmsg ENOMEM 1",
    "StartContainer supervisor files ENOSPC+ 3",
    "CreateContainer supervisor files ENOSPC+ 3",
    "CreateContainer-rich supervisor openat ENOSPC 1",
    "RunPodSandbox-rich launcher umount2 ENOMEM 1",
    "end of the program supervisor sendmsg ENOBUFS 1",
    "CreateContainer supervisor recvmsg ENOMEM 1",
    "ReopenContainerLog supervisor sendmsg ENOMEM 1",
    "StartContainer agent recvmsg ENOBUFS 2",
    "StopContainer supervisor messages ENOMEM+ 3",
    "RemovePodSandbox supervisor messages ENOMEM+ 2",
    "RemoveImage agent unlink EIO 3",
    "RemoveImage agent files ENOSPC+ 8",
    "PullImage workers files EIO+ 1",
    "PullImage agent rename ENOSPC 1",
    "Attach supervisor pwrite64 KILL 1",
    "RunPodSandbox-rich launcher recvmsg ENOBUFS 2",
    "Attach supervisor pipe2 EMFILE 3",
    "Attach agent sendmsg ENOBUFS 5",
    "Exec supervisor newfstatat EIO 5",
    "Exec-terminal supervisor kill ENOMEM 1",
    "Exec-terminal supervisor fcntl EMFILE 1",
    "Exec-terminal supervisor fcntl EMFILE 2",
]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    if reason := unavailable():
        pytest.fail(reason) if IN_CI else pytest.skip(reason)
    folder = tmp_path_factory.mktemp("chaos")
    with running_registry(folder / "registry") as registry:
        stock(registry)
        sweep = Sweep(folder, registry)
        yield sweep
        sweep.renew()


def test_each_rpc_is_made_by_a_step() -> None:
    """That a step makes the RPCs that it says it makes is a part of the verdict of each of its rounds."""
    services = pb.DESCRIPTOR.services_by_name.values()
    served = {method.name for service in services for method in service.methods}
    assert served - set[str]().union(*(step.makes for step in STEPS.values())) == set()


def parsed(text: str) -> Round:
    step, who, calls, fault, when = text.rsplit(" ", 4)
    return Round(
        step=step,
        who=tuple(who.split("+")),
        calls=tuple(calls.split("+")),
        fault=Fault.parse(fault),
        when=tuple(map(int, when.split("+"))),
    )


@pytest.mark.parametrize("found", FOUND)
def test_what_was_found_stays_mended(sweep: Sweep, found: str) -> None:
    verdict = sweep.play(parsed(found))
    assert not verdict.problems, describe(verdict)


@pytest.fixture
def world(sweep: Sweep) -> World:
    """After a round that only counts."""
    counted = sweep.play(
        Round(step="UpdateRuntimeConfig", who=("agent",), calls=("files",), fault=None, when=(1,))
    )
    assert not counted.problems, describe(counted)
    assert sweep.world is not None
    return sweep.world


def test_what_is_left_is_found(world: World) -> None:
    """The harness can fail: a directory of no pod, and a process that no record explains."""
    stray = world.agent.root / "run/pods/stray"
    stray.mkdir()
    with subprocess.Popen(["sleep", "1000"]) as process:
        group = Path(f"/sys/fs/cgroup/pids{world.footprint.cgroup}/agent/cgroup.procs")
        if group.exists():
            group.write_text(str(process.pid))
        left = world.footprint.new_since(world.before, patience=0)
        process.kill()
    stray.rmdir()
    assert "file run/pods/stray" in left
    assert not group.exists() or "process sleep 1000" in left


def test_what_nobody_reaps_is_found(world: World) -> None:
    """Also a launcher, unless it was traced as it died."""
    group = Path(f"/sys/fs/cgroup/pids{world.footprint.cgroup}/agent/cgroup.procs")
    if not group.exists():
        pytest.skip("no hierarchy of version 1")
    script = f"echo $$ > {group}; (printf na-launcher > /proc/self/comm) & exec sleep 1000"
    zombie = "process na-launcher, dead, of sleep 1000"
    with subprocess.Popen(["sh", "-c", script]) as process:
        try:
            wait_for("a zombie", lambda: zombie in world.footprint.now())
            dead = {pid for pid, parent in leaks.processes().items() if parent == process.pid}
            world.footprint.traced |= dead
            assert zombie not in world.footprint.now()
            world.footprint.traced -= dead
        finally:
            process.kill()


def test_a_part_of_all_rounds(sweep: Sweep) -> None:
    print(f"CHAOS_SEED={SEED}")
    chooser = random.Random(SEED)
    rounds = sweep.rounds(chooser, only=lambda _key, _fault: True, exhaustive=False)
    sweep.run(rounds, seconds=SECONDS, least=4)
    print(sweep.matrix())
    assert len(sweep.verdicts) >= 4
    # What happens side by side differs from run to run. `make chaos` counts what is red once.
    lasting = [again for red in sweep.red if (again := sweep.play(red.round)).problems]
    assert not lasting, f"CHAOS_SEED={SEED}\n" + "\n".join(map(describe, lasting))


# ---- the harness itself ----


def test_of_processes_of_one_name_the_parent_is_taken() -> None:
    assert first_of({7: 900, 900: 1, 901: 900}) == 900
    assert first_of({}) == 0


def test_what_is_replaced_meanwhile_is_not_missing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([Counter[str](), Counter("a")])
    monkeypatch.setattr(world.footprint, "now", lambda: next(looks))
    assert world.footprint.missing_since(Counter("a")) == []
    monkeypatch.setattr(world.footprint, "now", lambda: Counter("b"))
    assert world.footprint.missing_since(Counter("a"), patience=0) == ["a"]


@pytest.mark.parametrize(
    ("what", "expected"), [("EIO", {"openat": 1}), ("KILL", {"openat": 1}), ("EIO+", {"openat": 3})]
)
def test_the_third_call_is_hit(sweep: Sweep, tmp_path: Path, what: str, expected: object) -> None:
    with subprocess.Popen([sys.executable, "-c", OPENING], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        wait_for("Python", lambda: "read" in Path(f"/proc/{process.pid}/wchan").read_text())
        injection = Injection(
            process.pid, "openat,mkdir", Fault.parse(what), 3, output=tmp_path / "strace"
        )
        process.stdin.write(b"go\n")
        process.stdin.close()
        process.wait()
        injection.stop()
    assert Counter(call.partition("(")[0] for call in injection.struck) == expected


@pytest.mark.parametrize(
    ("call", "is_foreign"),
    [
        (
            'sendmsg(27<socket:[3]>, {msg_name=NULL, msg_namelen=0, msg_iov=[{iov_base="\\0\\0\\3\\1',
            True,
        ),
        (
            'sendmsg(27<socket:[3]>, {msg_name=NULL, msg_namelen=0, msg_iov=[{iov_base="{\\"id\\":3',
            False,
        ),
        ("read(3<pipe:[5]>, ", True),
        ("write(3</dev/pts/ptmx>, ", True),
        ("fcntl(3</lib/state.db-shm>, F_SETLK, {l_type=F_UNLCK}", True),
        ("fcntl(3</dev/pts/ptmx>, F_DUPFD_CLOEXEC, 0", False),
        ("read(3</run/state.json>, ", False),
    ],
)
def test_what_is_not_ours_is_told_by_what_it_hit(
    monkeypatch: pytest.MonkeyPatch, call: str, is_foreign: bool
) -> None:
    injection = Injection.__new__(Injection)
    struck = [f"{call}) = -1 ENOBUFS (No buffer space available) (INJECTED)"]
    monkeypatch.setattr(Injection, "struck", property(lambda _self: struck))
    assert injection.is_foreign is is_foreign


LISTENING = """
import signal, sys
signal.signal(signal.SIGCHLD, lambda *_: sys.exit(0))
print("ready", flush=True)
signal.pause()
sys.exit(1)
"""


def test_the_news_of_a_death_that_detaching_may_lose_is_told_again(
    sweep: Sweep, tmp_path: Path
) -> None:
    """In about one of 200 detachments beside a death, the parent never heard of it."""
    with subprocess.Popen([sys.executable, "-c", LISTENING], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        Injection(process.pid, "openat", None, 1, output=tmp_path / "strace").stop()
        assert process.wait() == 0


@pytest.mark.parametrize(
    ("code", "details", "is_clear"),
    [
        ("INTERNAL", "[Errno 28] No space left on device: '/run/x'", True),
        ("INTERNAL", "KeyError('pidfd')", False),
        ("INTERNAL", "", False),
        ("UNKNOWN", "Unexpected <class 'ValueError'>: x", False),
        ("UNKNOWN", "/lib/staging/layer: No space left on device; free space", True),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", False),
        ("DEADLINE_EXCEEDED", 'launcher: "fork" has not been done within 20 s; it goes on', True),
    ],
)
def test_what_is_a_clear_error(code: str, details: str, is_clear: bool) -> None:
    error = SimpleNamespace(code=lambda: grpc.StatusCode[code], details=lambda: details)
    assert (not unclear(cast(grpc.RpcError, error))) is is_clear
