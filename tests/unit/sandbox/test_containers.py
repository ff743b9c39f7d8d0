"""The end of a container's process, where nobody is told of it."""

import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from nodeagent.sandbox import exits, facts
from nodeagent.sandbox.containers import Container
from nodeagent.sandbox.loop import Loop
from nodeagent.sandbox.pod import Pod
from tests.kernel.sandbox.containers import container_plan


def running(tmp_path: Path, pid: int) -> Container:
    """A container of a pod without a supervisor; all that it tells is kept in `told`."""
    told: list[dict[str, Any]] = []
    pod = SimpleNamespace(
        loop=Loop(),
        directory=str(tmp_path),
        keeper=SimpleNamespace(drop=lambda *_: None),
        tell=told.append,
        told=told,
    )
    exits.make_directory(str(tmp_path))
    known = cast(facts.Facts, {"pid": pid, "ticks": 0, "oom_kills": 0, "deadline": 0})
    known |= {"created_at": 1, "started_at": 2, "signalled": False, "killed": False}
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
