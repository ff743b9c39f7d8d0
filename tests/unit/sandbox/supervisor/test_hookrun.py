"""What a supervisor hears of the hooks that it has run."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from nodeagent.sandbox.runtime.loop import Loop
from nodeagent.sandbox.spec import ContainerPlan
from nodeagent.sandbox.supervisor import hookrun
from nodeagent.sandbox.supervisor.hookrun import ContainerHooks
from nodeagent.sandbox.supervisor.pod import Pod


def test_a_creation_hears_of_hooks_that_cannot_begin(tmp_path: Path) -> None:
    """A full disk prevents it: the creation waits for them, until its caller gives up."""
    hooks = {"bundle": str(tmp_path / "absent/bundle"), "annotations": {}, "stages": {}}
    plan = cast(ContainerPlan, {"id": "c", "hooks": hooks})
    told: list[str] = []
    ContainerHooks(cast(Pod, SimpleNamespace()), plan).create(1, told.append)
    assert [text.partition("]")[0] for text in told] == ["hooks prestart, createRuntime: [Errno 2"]


def test_hooks_that_no_process_can_be_started_for_are_reported(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """They are lost: whoever waits goes on all the same."""

    def fork(*_: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(hookrun, "_spawn", fork)
    hook = {"path": "/h", "args": [], "env": [], "timeout_ms": 0, "source": "s"}
    hooks = {"bundle": "/b", "annotations": {}, "stages": {"poststop": [hook]}}
    plan, loop = cast(ContainerPlan, {"id": "c", "hooks": hooks}), Loop()
    ContainerHooks(cast(Pod, SimpleNamespace(loop=loop, directory="/d")), plan).after_end(loop.stop)
    loop.run()
    assert "container c: hooks poststop: [Errno 11]" in capfd.readouterr().err
