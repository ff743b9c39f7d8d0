"""The end of a container's process, where nobody is told of it."""

import errno
import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nodeagent.sandbox import exits, facts
from nodeagent.sandbox.runtime import loop as loop_module
from nodeagent.sandbox.runtime.loop import Loop
from nodeagent.sandbox.runtime.peers import Request
from nodeagent.sandbox.supervisor.birth import Birth
from nodeagent.sandbox.supervisor.containers import Container
from nodeagent.sandbox.supervisor.creation import nothing_known
from nodeagent.sandbox.supervisor.hookrun import ContainerHooks
from nodeagent.sandbox.supervisor.logs import Clock
from nodeagent.sandbox.supervisor.pod import Pod
from tests.kernel.sandbox.containers import container_plan


def running(tmp_path: Path, pid: int) -> Container:
    """A container of a pod without a supervisor; all that it tells is kept in `told`."""
    told: list[dict[str, Any]] = []
    pod = SimpleNamespace(
        loop=Loop(),
        directory=str(tmp_path),
        launcher=SimpleNamespace(drop=lambda *_: None),
        tell=told.append,
        clock=Clock(),
        told=told,
    )
    exits.make_directory(str(tmp_path))
    known = nothing_known({})
    known |= {"pid": pid, "created_at": 1, "started_at": 2}
    plan = container_plan(tmp_path / "files", tmp_path, ["/bin/true"])
    fds = {"pidfd": os.pidfd_open(pid)}
    return Container(cast(Pod, pod), {}, plan, known, fds)


def test_a_process_that_was_reaped_unheard_has_ended(tmp_path: Path) -> None:
    """Its pidfd says so at the next signal; the table of children would wait for ever."""
    process = subprocess.Popen(["/bin/true"])
    container = running(tmp_path, process.pid)
    process.wait()
    assert container.state == "running"
    container.stop(signal.SIGTERM, 0)
    container.pod.loop.call_after(50, container.pod.loop.stop)
    container.pod.loop.run()
    assert container.state == "exited"
    assert container.exit is not None
    assert container.exit["code"] in (
        0,
        exits.UNKNOWN,
    )  # from Linux 6.15 on, a pidfd knows the code
    assert [event["event"] for event in cast(Any, container.pod).told] == ["exit"]


def test_a_kill_is_written_down_before_it_is_sent(tmp_path: Path) -> None:
    """Whoever sees the end in place of this supervisor would take it for an OOM kill."""
    process = subprocess.Popen(["/bin/sleep", "1000"])
    container = running(tmp_path, process.pid)
    facts.make_directory(str(tmp_path), container.plan)
    assert not facts.was_killed(str(tmp_path), container.id)
    container.stop(signal.SIGTERM, 0)
    assert facts.was_killed(str(tmp_path), container.id)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("code", "killed", "kills", "oom"),
    [
        (137, False, 4, True),
        (137, False, 3, False),  # by somebody else
        (137, True, 4, False),  # by us, after a child of it was OOM-killed
        (1, False, 4, False),  # it lived on without that child
    ],
)
def test_what_is_an_oom_kill(
    tmp_path: Path, code: int, killed: bool, kills: int, oom: bool
) -> None:
    counter = tmp_path / "memory.events"
    counter.write_text(f"oom 9\noom_kill {kills}\noom_group_kill 7\n")
    with open(counter) as file:
        end = exits.judge(code, killed=killed, oom_before=3, counter=file.fileno())
    assert (end["code"], end["oom"]) == (code, oom)


@pytest.fixture
def told_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes that hooks of poststart were told of."""
    pids: list[int] = []
    monkeypatch.setattr(ContainerHooks, "after_start", lambda _, pid, _done: pids.append(pid))
    return pids


def test_no_hook_is_told_of_a_process_that_has_just_ended(
    tmp_path: Path, told_of: list[int]
) -> None:
    """That its program was executed is learned from its end."""
    process = subprocess.Popen(["/bin/true"])
    container = running(tmp_path, process.pid)
    process.wait()
    container.birth = cast(Birth, SimpleNamespace(conclude=container.executed))
    replies: list[Any] = []
    container._start = cast(Request, SimpleNamespace(reply=replies.append))
    container.ended(0)
    container.pod.loop.call_after(0, container.pod.loop.stop)
    container.pod.loop.run()
    assert (container.state, told_of, replies) == ("exited", [], [{"at": 2}])


def test_hooks_of_a_program_that_a_supervisor_before_let_go_are_run(
    tmp_path: Path, told_of: list[int]
) -> None:
    """Nobody waits for the reply any more."""
    container = running(tmp_path, os.getpid())
    container.executed()
    assert told_of == [os.getpid()]


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class Answers:
    """A request: what it is answered."""

    def __init__(self) -> None:
        self.replies: list[Any] = []
        self.errors: list[BaseException] = []

    def reply(self, result: Any = None) -> None:
        self.replies.append(result)

    def fail(self, error: BaseException) -> None:
        self.errors.append(error)


def one_round(container: Container) -> None:
    container.pod.loop.call_after(0, container.pod.loop.stop)
    container.pod.loop.run()


def test_a_creation_whose_undo_fails_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it stay in the pod, which could not be stopped then; what is left is removed when that can be."""
    monkeypatch.setattr(loop_module, "_PERSIST_MS", 1)
    process = subprocess.Popen(["/bin/true"])
    container = running(tmp_path, process.pid)
    process.wait()
    members = container._members
    members[container.id] = container
    container.facts["created_at"] = 0
    answers = Answers()
    container.creation = cast(Request, answers)
    removed: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(facts, "remove", full)
        container.ended(0)
    monkeypatch.setattr(facts, "remove", lambda _pod, name: removed.append(name))
    assert (len(answers.errors), members) == (1, {})
    container.kill()  # of a pod that is shut down meanwhile
    container.pod.loop.call_after(20, container.pod.loop.stop)
    container.pod.loop.run()
    assert removed == [container.id]


@pytest.mark.parametrize("step", ["conclude", "end_creation", "kill", "_release"])
def test_an_end_is_told_whatever_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    process = subprocess.Popen(["/bin/true"])
    container = running(tmp_path, process.pid)
    process.wait()
    container.plan["pid"] = "node"
    container.birth = cast(Birth, SimpleNamespace(conclude=lambda: None))
    for part in (container.birth, container.hooks, container.group, container):
        if hasattr(part, step):
            monkeypatch.setattr(part, step, full)
    container.ended(0)
    one_round(container)
    assert [event["event"] for event in cast(Any, container.pod).told] == ["exit"]


def test_a_removal_that_fails_behind_an_end_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.Popen(["/bin/sleep", "1000"])
    container = running(tmp_path, process.pid)
    answers = Answers()
    container.remove(cast(Request, answers))
    process.wait()
    monkeypatch.setattr(facts, "remove", full)
    container.ended(137)
    one_round(container)
    assert [cast(OSError, error).errno for error in answers.errors] == [errno.ENOSPC]


def test_a_start_that_cannot_be_recorded_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk, where its undo could not be recorded either, it was "starting" for ever."""
    container = running(tmp_path, os.getpid())
    container.facts["started_at"] = 0
    facts.make_directory(str(tmp_path), container.plan)
    gone: list[str] = []
    container.birth = cast(Birth, SimpleNamespace(go=lambda: gone.append("go")))
    container.open_pump()
    with monkeypatch.context() as patch:
        patch.setattr(facts, "save", full)
        with pytest.raises(OSError, match="No space left"):
            container.start(cast(Request, Answers()))
    assert (container.state, gone) == ("created", [])
    container.start(cast(Request, Answers()))
    assert (container.state, gone) == ("starting", ["go"])
