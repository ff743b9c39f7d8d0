"""Transitions of containers, from every state: what the diagram does not allow is refused, and changes nothing."""

from collections.abc import Callable

import msgspec
import pytest

from nodeagent import records, requests
from nodeagent.errors import FailedPrecondition
from nodeagent.records import Container, Sandbox
from nodeagent.requests import (
    ContainerConfig,
    IdMapping,
    Namespaces,
    Resources,
    SandboxConfig,
    UserNamespace,
)

CREATED = Container(
    id="c",
    sandbox_id="s",
    config=ContainerConfig(name="main", image="i"),
    image_id="i",
    image_ref="i",
    image_name="i",
    cgroup_path="/g",
    resources=Resources(),
    stop_signal=15,
    created_at=100,
)
RUNNING = msgspec.structs.replace(CREATED, started_at=200)
EXITED = msgspec.structs.replace(RUNNING, finished_at=300, exit_code=3, reason="Error")
FAILED = msgspec.structs.replace(CREATED, finished_at=300, exit_code=128, reason="StartError")

STATES = {"created": CREATED, "running": RUNNING, "exited": EXITED, "failed": FAILED}

Transition = Callable[[Container], Container]
TRANSITIONS: dict[str, Transition] = {
    "started": lambda c: records.started(c, 400),
    "exited": lambda c: records.exited(c, 1, 400, oom=False),
    "start_failed": lambda c: records.start_failed(c, "no such file", 400),
    "lost": lambda c: records.lost(c, 400),
}

REFUSED = None
EXPECTED: dict[tuple[str, str], dict[str, object] | None] = {
    ("created", "started"): {"started_at": 400},
    ("running", "started"): REFUSED,
    ("exited", "started"): REFUSED,
    ("failed", "started"): REFUSED,
    ("created", "exited"): REFUSED,
    ("running", "exited"): {"finished_at": 400, "exit_code": 1, "reason": "Error"},
    ("exited", "exited"): {},
    ("failed", "exited"): {},
    ("created", "start_failed"): {
        "finished_at": 400,
        "exit_code": 128,
        "reason": "StartError",
        "message": "no such file",
    },
    ("running", "start_failed"): REFUSED,
    ("exited", "start_failed"): REFUSED,
    ("failed", "start_failed"): REFUSED,
    ("created", "lost"): {
        "finished_at": 400,
        "exit_code": 255,
        "reason": "Unknown",
        "message": "its end was not observed",
    },
    ("running", "lost"): {
        "finished_at": 400,
        "exit_code": 255,
        "reason": "Unknown",
        "message": "its end was not observed",
    },
    ("exited", "lost"): {},
    ("failed", "lost"): {},
}


def test_every_transition_is_expected_from_every_state() -> None:
    assert set(EXPECTED) == {(state, name) for state in STATES for name in TRANSITIONS}


@pytest.mark.parametrize(("state", "transition"), list(EXPECTED))
def test_transitions(state: str, transition: str) -> None:
    before, changes = STATES[state], EXPECTED[state, transition]
    if changes is REFUSED:
        with pytest.raises(FailedPrecondition, match='container "c"'):
            TRANSITIONS[transition](before)
        return
    after = TRANSITIONS[transition](before)
    assert after == msgspec.structs.replace(before, **changes)
    assert (after is before) == (not changes)


def test_states_follow_from_facts() -> None:
    assert [c.state for c in STATES.values()] == ["created", "running", "exited", "exited"]


@pytest.mark.parametrize(
    ("code", "oom", "reason"),
    [(0, False, "Completed"), (1, False, "Error"), (137, False, "Error"), (137, True, "OOMKilled")],
)
def test_reasons(code: int, oom: bool, reason: str) -> None:
    assert records.exited(RUNNING, code, 400, oom=oom).reason == reason


def test_a_clock_that_went_back_ends_nothing_before_it_began() -> None:
    assert records.exited(RUNNING, 0, 150, oom=False).finished_at == RUNNING.started_at


def test_pods_are_ready_between_ready_and_stopped() -> None:
    config = SandboxConfig(name="n", uid="u", namespace="s")
    intention = Sandbox(id="s", config=config, cgroup_parent="/", boot_id="b", created_at=1)
    ready = msgspec.structs.replace(intention, ready_at=2)
    stopped = msgspec.structs.replace(ready, stopped_at=3)
    assert [record.ready for record in (intention, ready, stopped)] == [False, True, False]


def test_records_do_not_change() -> None:
    with pytest.raises(AttributeError):
        RUNNING.pid = 1  # type: ignore[misc]


def test_what_is_not_set_stays() -> None:
    old = Resources(cpu_shares=2, memory_limit_bytes=5, unified={"a.b": "1", "c.d": "1"})
    new = Resources(memory_limit_bytes=-1, unified={"c.d": "2"})
    assert requests.updated(old, new) == Resources(
        cpu_shares=2, memory_limit_bytes=-1, unified={"a.b": "1", "c.d": "2"}
    )


def test_a_memory_limit_alone_leaves_the_swap() -> None:
    old = Resources(memory_limit_bytes=64, memory_swap_limit_bytes=80, cpu_shares=7)
    for memory, both in ((100, 116), (32, 48), (-1, -1)):
        new = requests.updated(old, Resources(memory_limit_bytes=memory))
        assert (new.memory_limit_bytes, new.memory_swap_limit_bytes) == (memory, both)
        assert new.cpu_shares == 7
    for both in (0, -1):
        old = Resources(memory_limit_bytes=64, memory_swap_limit_bytes=both)
        new = requests.updated(old, Resources(memory_limit_bytes=100))
        assert new.memory_swap_limit_bytes == both


def test_namespaces_that_a_pod_owns() -> None:
    mapping = UserNamespace(
        mode="pod",
        uids=(IdMapping(inside=0, outside=100_000, length=65_536),),
        gids=(IdMapping(inside=0, outside=200_000, length=65_536),),
    )
    own = Namespaces(user=mapping)
    nodes = Namespaces(network="node", ipc="node", user=UserNamespace(mode="node"))
    assert own.owned == {"net", "uts", "ipc", "user"}
    assert Namespaces().owned == {"net", "uts", "ipc"}
    assert nodes.owned == set()
    assert (own.user_mapping, Namespaces().user_mapping, nodes.user_mapping) == (
        mapping,
        None,
        None,
    )
    assert own.on_node(5, 7) == (100_005, 200_007)
    assert nodes.on_node(5, 7) == (5, 7)
    with pytest.raises(ValueError, match="not mapped"):
        own.on_node(65_536, 0)
