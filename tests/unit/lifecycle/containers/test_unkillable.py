"""Whoever waits in vain for an end is told which container does not end, and what blocks it."""

from types import SimpleNamespace
from typing import Any

import pytest

from nodeagent.errors import NotFound, Unavailable
from nodeagent.lifecycle.containers import unkillable
from nodeagent.linux import waiting
from tests.unit.cri import records

HUNG, ENDED, REMOVED = (records.container(each) for each in ("hung", "ended", "removed"))
ALL = (HUNG, ENDED, REMOVED)


class Groups:
    """The group of one of them is gone, that of another one has no process."""

    def of(self, container: Any) -> Any:
        if container is REMOVED:
            raise NotFound("cgroup: is gone")
        pids = [4, 5] if container is HUNG else []
        return SimpleNamespace(processes=lambda: pids)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Any:
    waits = {5: "request_wait_answer"}
    monkeypatch.setattr(waiting, "uninterruptible_in", lambda pid: waits.get(pid, ""))
    return Groups()


def test_what_has_not_ended_is_named_with_what_blocks_it(groups: Any) -> None:
    with pytest.raises(TimeoutError) as raised, unkillable.named(ALL, groups):
        raise TimeoutError('"shutdown" has not been done within 20 s')
    assert str(raised.value) == (
        '"shutdown" has not been done within 20 s; container "hung": still running after SIGKILL; uninterruptible: '
        "5 in request_wait_answer"
    )


def test_an_error_beside_which_all_have_ended_is_left_as_it_is(groups: Any) -> None:
    with pytest.raises(TimeoutError) as raised, unkillable.named((ENDED, REMOVED), groups):
        raise TimeoutError("no answer")
    assert str(raised.value) == "no answer"


def test_another_error_is_left_as_it_is(groups: Any) -> None:
    with pytest.raises(Unavailable, match="died"), unkillable.named(ALL, groups):
        raise Unavailable("died")
