"""What happens in a run, as plain data: what clients ask for, and which faults strike."""

from dataclasses import dataclass, field
from random import Random

PODS, CONTAINERS, CLIENTS = 2, 2, 3


@dataclass(frozen=True)
class Op:
    """A call of a client. pod and container: numbers; patience: seconds until the client gives up; pause: after it.

    program: how the container's program behaves, see `machine.Program`.
    """

    kind: str
    pod: int = 0
    container: int = 0
    patience: float = 60.0
    pause: float = 0.0
    program: str = ""

    def __str__(self) -> str:
        given = f"{self.kind} p{self.pod}"
        if self.kind in {"create", "start", "stop", "remove", "exec"}:
            given += f"/c{self.container}"
        return f"{given} {self.program} patience={self.patience:g} pause={self.pause:g}"


@dataclass(frozen=True)
class Fault:
    """A fault that begins `at` a time and lasts `seconds`. number: which of several things it strikes."""

    kind: str
    at: float
    seconds: float = 0.0
    number: int = 0

    def __str__(self) -> str:
        return f"{self.kind} at={self.at:g} seconds={self.seconds:g} number={self.number}"


@dataclass
class Plan:
    seed: int
    programs: list[list[Op]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"seed {self.seed}"]
        for number, program in enumerate(self.programs):
            lines += [f"  client {number}: {op}" for op in program]
        return "\n".join([*lines, *(f"  fault: {fault}" for fault in self.faults)])


KINDS = {
    "run": 3, "create": 6, "start": 5, "stop": 3, "remove": 3, "exec": 1, "stop_pod": 2, "remove_pod": 2, "list": 1,
    "shared_run": 1, "burst": 1,
}  # fmt: skip
PATIENCE = (0.0, 0.0005, 0.002, 0.01, 0.05, 1.0, 60.0, 60.0, 60.0, 60.0, 60.0)
PAUSES = (0.0, 0.0, 0.0, 0.001, 0.01, 0.1, 0.5)
PROGRAMS = ("runs", "runs", "stubborn", "0@0", "7@0.001", "3@0.02", "7@0.3", "0@1", "absent")
FAULTS = {
    "crash": 4, "crash_at_step": 6, "term": 2, "reboot": 1, "kill_supervisor": 3, "kill_launcher": 2, "kill_both": 1,
    "store": 3, "store_busy": 2, "files": 2, "cgroups": 2, "network": 2, "launcher_fails": 1, "supervisor_fails": 2,
    "slow": 2, "hang": 2, "stop_supervisor": 3, "stop_launcher": 2, "stop_both": 1, "disconnect": 2,
    "disconnect_launcher": 1, "send_fails": 2, "receive_fails": 2, "cut": 1, "late": 2, "send": 1, "connect": 1,
    "pidfd": 1, "kill_init": 1,
}  # fmt: skip
LONG = {
    "store", "store_busy", "files", "cgroups", "network", "launcher_fails", "supervisor_fails", "slow", "hang",
    "send_fails", "receive_fails", "cut", "late", "send", "connect", "pidfd",
}  # fmt: skip
STOPS = (
    0.02,
    0.5,
    4.0,
    8.0,
    15.0,
    45.0,
)  # seconds, some of them longer than the deadlines of the agent


def make(seed: int) -> Plan:
    random = Random(seed)
    programs = [
        [_op(random) for _ in range(random.randint(2, 7))]
        for _ in range(random.randint(1, CLIENTS))
    ]
    count = random.choice((0, 1, 1, 1, 2, 2, 3, 4))
    names, weights = list(FAULTS), list(FAULTS.values())
    faults = [_fault(random, random.choices(names, weights)[0]) for _ in range(count)]
    return Plan(seed, programs, sorted(faults, key=lambda fault: fault.at))


def _op(random: Random) -> Op:
    kind = random.choices(list(KINDS), list(KINDS.values()))[0]
    return Op(
        kind,
        random.randrange(PODS),
        random.randrange(CONTAINERS),
        random.choice(PATIENCE),
        random.choice(PAUSES),
        random.choice(PROGRAMS) if kind == "create" else "",
    )


def _fault(random: Random, kind: str) -> Fault:
    at = round(
        random.choice((random.uniform(0, 0.1), random.uniform(0, 0.5), random.uniform(0, 2))), 4
    )
    seconds = random.choice((0.005, 0.05, 0.5, 3.0)) if kind in LONG else 0.0
    if kind.startswith("stop_"):
        seconds = random.choice(STOPS)
    return Fault(kind, at, seconds, random.randrange(60))
