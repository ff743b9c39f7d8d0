"""What a supervisor takes over from one that has died, while something is short."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nodeagent.sandbox import exits, facts
from nodeagent.sandbox.runtime import loop as loop_module
from nodeagent.sandbox.runtime.loop import Loop
from nodeagent.sandbox.supervisor import pump, succession
from nodeagent.sandbox.supervisor.containers import Container
from nodeagent.sandbox.supervisor.creation import nothing_known
from nodeagent.sandbox.supervisor.logs import Clock
from nodeagent.sandbox.supervisor.pod import Pod
from tests.kernel.sandbox.containers import container_plan
from tests.support.node import wait_for

IDS = [letter * 64 for letter in "abc"]


class Dead:
    """What a supervisor of three containers has left. writers: of their outputs; kept: by the launcher."""

    def __init__(self, directory: Path, ending: ExitStack) -> None:
        self.loop = Loop()
        self.pod = SimpleNamespace(
            loop=self.loop, directory=str(directory), tell=lambda _: None, clock=Clock()
        )
        self.directory = directory
        self.writers: dict[str, int] = {}
        self.kept: dict[str, dict[str, int]] = {}
        exits.make_directory(str(directory))
        for container_id in IDS:
            process = ending.enter_context(subprocess.Popen(["/bin/sleep", "1000"]))
            ending.callback(process.kill)
            log = str(directory / f"{container_id}.log")
            plan = container_plan(
                directory / "files", directory, ["/bin/sleep"], id=container_id, log_path=log
            )
            facts.make_directory(str(directory), plan)
            known = nothing_known({}) | {"pid": process.pid, "created_at": 1, "started_at": 2}
            facts.save(str(directory), container_id, known)
            reader, self.writers[container_id] = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            ending.callback(os.close, self.writers[container_id])
            pidfd = os.pidfd_open(process.pid)
            self.kept[container_id] = {"pidfd": pidfd, "stdout": reader}

    def restore(self) -> dict[str, Container]:
        members: dict[str, Container] = {}
        succession.restore(cast(Pod, self.pod), members, self.kept)
        return members

    def await_line(self, container_id: str) -> None:
        """Run until what the container writes is in its log."""
        os.write(self.writers[container_id], b"one\n")
        log = self.directory / f"{container_id}.log"

        def is_logged() -> bool:
            self.loop.call_after(5, self.loop.stop)
            self.loop.run()
            return log.exists() and log.read_bytes().endswith(b" stdout F one\n")

        wait_for("a line in the log", is_logged)


@pytest.fixture
def dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dead]:
    monkeypatch.setattr(loop_module, "_PERSIST_MS", 1)
    monkeypatch.setattr(pump, "_RETRY_MS", 1)
    with ExitStack() as ending:
        yield Dead(tmp_path, ending)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(facts, "open_journal"), (pump, "LogFile"), (exits, "read"), (Loop, "watch")],
)
def test_the_shortage_of_one_container_ends_no_succession(
    dead: Dead, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    """The others are taken over at once, and that one when there is no shortage any more."""
    real, short = getattr(owner, name), iter([False, True])

    def call(*arguments: Any) -> Any:
        if next(short, False):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call)
        members = dead.restore()
    assert sorted(members) == IDS
    assert next(short, None) is None
    for container_id in IDS:
        dead.await_line(container_id)
    for container in members.values():
        assert (container.state, container.pump is not None) == ("running", True)
        assert container.pump is not None
        container.pump.close()
