"""The start of a launcher that does not become ready."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from nodeagent.errors import Unavailable
from nodeagent.sandbox.agent import starting


async def test_a_launcher_that_is_never_ready_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was left running, a second one was started, and the interpreter's sealed copy was blamed."""
    pids = []

    def spawn(_program: str, _state: str, _python: str, ready: int, _join: Sequence[int]) -> int:
        inherited = [(os.POSIX_SPAWN_DUP2, ready, ready)]
        pids.append(os.posix_spawn("/bin/sleep", ["sleep", "1000"], {}, file_actions=inherited))
        return pids[-1]

    monkeypatch.setattr(starting, "_spawn", spawn)
    monkeypatch.setattr(starting, "_PATIENCE_SECONDS", 0.1)
    with pytest.raises(Unavailable, match=r"not ready within 0\.1 s, see .*/launcher\.log"):
        await starting.start_launcher(str(tmp_path), "/bin/true", ())
    [pid] = pids
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not caplog.messages
