"""Which errors of a creation or a start are told as an OOM kill: the counters of the cgroup alone decide."""

from types import SimpleNamespace
from typing import Any

import pytest

from nodeagent.errors import (
    FailedPrecondition,
    NodeAgentError,
    NotFound,
    StartError,
    Unavailable,
)
from nodeagent.lifecycle.containers import oom_at_start
from nodeagent.records import Container
from nodeagent.requests import ContainerConfig, Resources

CONTAINER = Container(
    id="c1",
    sandbox_id="s1",
    config=ContainerConfig(name="main", image="image"),
    image_id="i",
    image_ref="i",
    image_name="i",
    cgroup_path="/c1",
    resources=Resources(memory_limit_bytes=131_072),
    stop_signal=15,
)


def group(memory: Any) -> Any:
    """A cgroup with these counters of memory; None is one without the controller."""
    return SimpleNamespace(stats=lambda: SimpleNamespace(memory=memory))


def told(error: Exception, counted: Any) -> Exception:
    """What becomes of an error of a supervisor."""
    try:
        with oom_at_start.named(CONTAINER, counted):
            raise error
    except Exception as result:  # noqa: BLE001 it is what the test asks for
        return result


@pytest.mark.parametrize(
    "error",
    [
        FailedPrecondition("init: was killed before it executed the program"),
        StartError('container "c1": init: was killed before it executed the program'),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_a_kill_that_was_counted_is_told_with_limit_and_remedy(error: Exception) -> None:
    result = told(error, group(SimpleNamespace(oom_kills=1, failures=3)))
    assert isinstance(result, StartError)
    assert str(result) == (
        'container "main": its first process was OOM-killed before it executed the program: the memory limit of '
        "131072 bytes is too low; raise it, to 4 MiB at least and to what the program needs"
    )


def test_without_a_limit_that_was_hit_it_is_not_the_containers() -> None:
    result = told(NodeAgentError("killed"), group(SimpleNamespace(oom_kills=1, failures=0)))
    assert "its pod has reached its own memory limit, or the node is out of memory" in str(result)


@pytest.mark.parametrize(
    "memory",
    [None, SimpleNamespace(oom_kills=0, failures=0), SimpleNamespace(oom_kills=0, failures=9)],
)
def test_any_other_error_stays_as_it_is(memory: Any) -> None:
    error = FailedPrecondition("something else")
    assert told(error, group(memory)) is error


def test_an_error_stays_where_the_group_is_gone() -> None:
    def stats() -> None:
        raise NotFound('cgroup "/c1": does not exist')

    error = NodeAgentError("killed")
    assert told(error, SimpleNamespace(stats=stats)) is error


def test_a_supervisor_that_is_gone_says_nothing_of_the_first_process() -> None:
    error = Unavailable("the supervisor does not answer")
    assert told(error, group(SimpleNamespace(oom_kills=1, failures=1))) is error
