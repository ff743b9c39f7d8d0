"""Random programs of CRI calls, as data: a seed and the number of a client give the same steps at any time.

A step names what it is about by its place ("pod 2 of this client", "its container 1"), never by an id, so that steps
can be left out of a program. What it can expect to find is only guessed while the program is made: faults and other
clients see to it that many a step meets something else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

PODS = 3  # of a client; the last one is shared with another client
CONTAINERS = 2
HOST_PORTS = 4
CANCEL_SECONDS = (0.001, 0.005, 0.02, 0.1)

# What a container does: it ends by itself, at SIGTERM, or never; it has children; there is no such program.
KINDS = ("sleeps", "exits", "traps", "ignores", "family", "bad")
KIND_WEIGHTS = (30, 25, 25, 5, 10, 5)


class Step(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A call. choice: what else the verb leaves open; cancel: seconds after which the client gives the call up."""

    verb: str
    pod: int = 0
    container: int = 0
    attempt: int = 0
    kind: str = ""
    choice: int = 0
    cancel: float = 0.0


# Verbs that may be sent, by what is there; the rest of a weight goes to what only looks.
LOOKS = {
    "list_pods": 8,
    "list_containers": 12,
    "list_of_pod": 8,
    "list_in_state": 6,
    "list_labelled": 4,
    "pod_status": 14,
    "list_stats": 1,
    "status": 1,
}
OF_POD = {"": {"run": 60}, "ready": {"stop_pod": 1, "remove_pod": 2, "run": 1}}
OF_POD["stopped"] = {"remove_pod": 30, "stop_pod": 3, "run": 5}
OF_CONTAINER = {
    "": {"create": 40},
    "created": {"start": 60, "remove": 1, "stop": 1, "create": 2, "exec": 1},
    "running": {
        "exec": 22,
        "container_status": 22,
        "stop": 8,
        "remove": 3,
        "stats": 2,
        "update": 1,
        "reopen": 1,
        "start": 1,
        "exec_url": 1,
        "exec_long": 1,
    },
    "gone": {"create": 8, "container_status": 2, "stop": 1, "remove": 1},
}
CANCELLED = ("run", "create", "start", "stop", "remove", "stop_pod", "remove_pod", "exec")


@dataclass(slots=True)
class _Pod:
    """What the program believes."""

    state: str = ""
    attempt: int = 0
    containers: list[str] = field(default_factory=lambda: [""] * CONTAINERS)
    attempts: list[int] = field(default_factory=lambda: [0] * CONTAINERS)


def steps(seed: int, client: int) -> Iterator[Step]:
    """An endless program."""
    rng = random.Random(f"{seed}/{client}")
    pods = [_Pod() for _ in range(PODS)]
    while True:
        number = rng.randrange(PODS)
        pod = pods[number]
        container = rng.randrange(CONTAINERS)
        verbs = {**OF_POD[pod.state], **LOOKS}
        if pod.state == "ready":
            verbs |= OF_CONTAINER[pod.containers[container]]
        verb = rng.choices(list(verbs), list(verbs.values()))[0]
        attempt = pod.attempts[container] if verb == "create" else pod.attempt
        is_cancelled = verb in CANCELLED and rng.random() < 0.06
        yield Step(
            verb=verb,
            pod=number,
            container=container,
            attempt=attempt,
            kind=rng.choices(KINDS, KIND_WEIGHTS)[0] if verb == "create" else "",
            choice=rng.randrange(1 << 16),
            cancel=rng.choice(CANCEL_SECONDS) if is_cancelled else 0.0,
        )
        if not (is_cancelled and rng.random() < 0.5):
            _believe(pod, container, verb, rng)


def _believe(pod: _Pod, container: int, verb: str, rng: random.Random) -> None:
    """Note what has become of it, if all went well."""
    match verb:
        case "run":
            pod.state = pod.state or "ready"
        case "stop_pod":
            pod.state = "stopped"
        case "remove_pod":
            pod.state = ""
            pod.attempt += rng.randrange(2)  # the same attempt again, or another one
            pod.containers = [""] * CONTAINERS
        case "create":
            pod.containers[container] = "created"
        case "start":
            pod.containers[container] = "running"
        case "remove":
            pod.containers[container] = "gone"
            pod.attempts[container] += rng.randrange(2)


def script(kind: str, token: str, code: int, delay: float) -> tuple[str, ...]:
    """What a container executes: it says its last line, and its exit code in a file of the host, before it exits."""
    ends = f"echo last {token}; echo {code} > /codes/{token}; exit {code}"
    match kind:
        case "exits":
            return ("sh", "-c", f"sleep {delay}; {ends}")
        case "traps":
            return ("sh", "-c", f"trap '{ends}' TERM; sleep 100000 & wait")
        case "ignores":
            return ("sh", "-c", "trap '' TERM; exec sleep 100000")
        case "family":
            return ("sh", "-c", f"sleep 100000 & sleep 100001 & sleep {delay}; {ends}")
        case "bad":
            return ("/no/such/program",)
    return ("sleep", "100000")
