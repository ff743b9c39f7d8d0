"""Containers and their programs, and the files of a pod, which outlive its supervisor."""

from typing import TYPE_CHECKING, Any

from tests.chaos.simulation.machine import Machine, Truth

if TYPE_CHECKING:
    from tests.chaos.simulation.supervisor import Supervisor

KILLED = 137


class Container:
    """A container's process, and what its supervisor has written down of it."""

    def __init__(self, pod: "Pod", plan: dict[str, Any], group: Any) -> None:
        self.pod = pod
        self.machine = pod.machine
        self.plan = plan
        self.id: str = plan["id"]
        self.program: str = plan["argv"][-1]
        self.group = group
        self.is_alive = True
        self.created_at = 0
        self.started_at = 0
        self.is_executed = False
        self.exit: dict[str, Any] | None = None
        self.deadline = 0.0
        self.is_signalled = False
        self.hangs_until = 0.0  # in the kernel: it cannot be killed
        self.machine.last_pid += 1
        self.pid = self.machine.last_pid
        group.members[self] = None
        self.machine.truths[self.id] = Truth()

    def begin(self) -> None:
        """Execute the program."""
        self.is_executed = True
        self.machine.trace(f"container {self.id[-4:]} runs {self.program}")
        code, at, seconds = self.program.partition("@")
        if at:
            self.machine.loop.after(float(seconds), lambda: self.end(int(code)))

    def signal(self) -> None:
        if self.is_executed and self.program != "stubborn":
            self.machine.loop.after(self.machine.loop.soon(), lambda: self.end(143))

    def kill(self) -> None:
        if self.is_alive:
            wait = max(self.machine.loop.soon(), self.hangs_until - self.machine.loop.time())
            self.machine.loop.after(wait, lambda: self.end(KILLED))

    def end(self, code: int) -> None:
        """End, and be seen by whoever is there: the supervisor, else a launcher that keeps it."""
        if not self.is_alive:
            return
        self.is_alive = False
        self.group.members.pop(self, None)
        self.machine.trace(f"container {self.id[-4:]} ends with {code}")
        if code == KILLED and self.is_executed and not {self.id, self.pod.id} & self.machine.asked:
            self.machine.wrong = f"container {self.id} is killed, and nobody has asked for it"
        truth = self.machine.truths[self.id]
        supervisor = self.pod.supervisor
        if not self.created_at:
            if supervisor is not None:
                supervisor.when_running(lambda: supervisor.birth_failed(self))
            return
        truth.code = code
        if supervisor is not None:
            supervisor.when_running(lambda: supervisor.ended(self, code))
        else:
            self.orphaned()

    def orphaned(self) -> None:
        """Nobody has seen its end, and it has no supervisor: a launcher that keeps it is its parent."""
        launcher, code = self.machine.launcher, self.machine.truths[self.id].code
        if self.is_alive or self.exit is not None or code is None or launcher is None:
            return
        if self.pod.id in launcher.kept:
            launcher.when_running(lambda: self.record(code))

    def record(self, code: int) -> None:
        key = self.pod.directory, self.id
        self.exit = self.machine.exits.get(key)
        if self.exit is None:
            self.exit = {"code": code, "at": self.machine.time_ns(), "oom": False}
            self.machine.exits[key] = self.exit
        truth = self.machine.truths[self.id]
        if code == truth.code and self.is_executed:
            truth.is_known = True

    def describe(self) -> dict[str, Any]:
        identity = {"uid": 0, "gid": 0, "groups": [], "home": ""}
        return {
            "id": self.id, "pid": self.pid, "identity": identity, "warnings": [], "created_at": self.created_at,
            "started_at": self.started_at, "exit": self.exit, "dropped_log_lines": 0,
        }  # fmt: skip


class Init:
    """The process that holds the PID namespace which the containers of a pod share: they end with it."""

    hangs_until = 0.0

    def __init__(self, pod: "Pod", group: Any) -> None:
        self.pod = pod
        self.is_alive = True
        pod.machine.last_pid += 1
        self.pid = pod.machine.last_pid
        self._group = group
        group.members[self] = None

    def kill(self) -> None:
        self.end(KILLED)

    def end(self, _code: int) -> None:
        if not self.is_alive:
            return
        self.is_alive = False
        self._group.members.pop(self, None)
        machine, supervisor = self.pod.machine, self.pod.supervisor
        machine.trace(f"init of pod {self.pod.id[-4:]} ends")
        machine.asked.add(self.pod.id)  # nobody has to ask for the end of its pod any more
        for container in list(self.pod.containers.values()):
            if container.plan["pid"] == "pod":
                container.kill()
        if supervisor is not None:
            supervisor.when_running(supervisor.init_ended)


class Pod:
    """The files of a pod, which outlive its supervisor, and its processes."""

    def __init__(self, machine: Machine, pod_id: str, directory: str) -> None:
        self.machine = machine
        self.id = pod_id
        self.directory = directory
        self.containers: dict[str, Container] = {}
        self.supervisor: Supervisor | None = None
        self.init: Init | None = None
        self.has_pins = True

    def is_left(self) -> bool:
        return any(c.is_alive and c.created_at for c in self.containers.values())
