"""The launcher and the supervisors, as the agent hears them; containers and their programs.

They follow `nodeagent.sandbox`: what a supervisor has learned of a container is in the pod's directory (here: `Pod`),
so that a successor goes on; the end of a container is recorded by its supervisor, else by the launcher that keeps it,
and is unknown to all where neither lives.
"""

import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

from nodeagent.errors import (
    AlreadyExists,
    FailedPrecondition,
    NodeAgentError,
    NotFound,
    StartError,
    Unavailable,
)
from nodeagent.sandbox import exits, protocol
from nodeagent.sandbox.paths import LAUNCHER_SOCKET, SUPERVISOR_SOCKET
from tests.chaos.simulation.machine import Connection, Machine, Process, Truth, close_file

KILLED = 137
HANG_SECONDS = 60.0
_DEVNULL = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
_SOCKET = socket.socket(socket.AF_UNIX)


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
        truth = self.machine.truths[self.id]
        if not self.created_at:
            if self.pod.supervisor is not None:
                self.pod.supervisor.birth_failed(self)
            return
        truth.code = code
        if self.pod.supervisor is not None:
            self.pod.supervisor.ended(self, code)
        elif self.machine.launcher is not None and self.pod.id in self.machine.launcher.kept:
            self.record(code)

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


class Pod:
    """The files of a pod, which outlive its supervisor, and its processes."""

    def __init__(self, machine: Machine, pod_id: str, directory: str) -> None:
        self.machine = machine
        self.id = pod_id
        self.directory = directory
        self.containers: dict[str, Container] = {}
        self.supervisor: Supervisor | None = None
        self.has_pins = True

    def is_left(self) -> bool:
        return any(c.is_alive and c.created_at for c in self.containers.values())


class Request:
    """A request of an agent, which is answered once."""

    def __init__(
        self, connection: Connection, body: Mapping[str, Any], files: list[tuple[str, Any]]
    ) -> None:
        self.connection = connection
        self.body = body
        self.files = files

    def take(self, name: str) -> list[Any]:
        taken = [file for key, file in self.files if key == name]
        self.files = [pair for pair in self.files if pair[0] != name]
        return taken

    def discard(self) -> None:
        for _, file in self.files:
            close_file(file)
        self.files = []

    def reply(self, result: Mapping[str, Any] | None = None, fds: list[int] | None = None) -> None:
        body = {"id": self.body["id"], "result": result or {}}
        self.connection.send(protocol.encode(body), fds)

    def fail(self, error: BaseException) -> None:
        self.connection.send(
            protocol.encode({"id": self.body["id"], **protocol.describe_error(error)})
        )


class Server(Process):
    """A process that answers requests."""

    fault = ""

    def received(self, connection: Connection, message: dict[str, Any], files: list[Any]) -> None:
        names = message.get("fds", [])
        request = Request(connection, message, list(zip(names, files, strict=True)))
        operation = message["op"]
        if operation == "hello":
            request.reply(protocol.spoken())
            return
        self.machine.trace(
            f"{self.name} {self.pid}: {operation} {str(message.get('container', ''))[-4:]}"
        )
        try:
            if self.machine.is_struck(self.fault) and operation not in {"exec_kill", "detach"}:
                raise OSError(12, "Cannot allocate memory")
            getattr(self, f"do_{operation}")(request)
        except (NodeAgentError, OSError) as error:
            request.fail(error)
        finally:
            request.discard()

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Do something later if this process lives then."""
        self.machine.loop.after(seconds, lambda: callback() if self.is_alive else None)


class Launcher(Server):
    """The launcher. kept: the pods that it knows, as the supervisors of them attend it."""

    fault = "launcher_fails"

    def __init__(self, machine: Machine, state: str) -> None:
        super().__init__(machine, "launcher")
        self.kept: dict[str, Pod] = {}
        self._forking: dict[str, Request] = {}
        machine.listeners[f"{state}/{LAUNCHER_SOCKET}"] = self
        machine.launcher = self
        for pod in list(machine.pods.values()):
            if pod.supervisor is not None:
                supervisor = pod.supervisor
                self.later(machine.random.uniform(0, 1), lambda s=supervisor: self.attend(s))  # type: ignore[misc]

    def died(self) -> None:
        if self.machine.launcher is self:
            self.machine.launcher = None

    def attend(self, supervisor: "Supervisor") -> None:
        if supervisor.is_alive:
            self.kept[supervisor.pod.id] = supervisor.pod

    def do_fork(self, request: Request) -> None:
        plan = request.body["plan"]
        if plan["id"] in self.kept:
            raise AlreadyExists(f'pod "{plan["id"]}": has a supervisor, or had one')
        pod = Pod(self.machine, plan["id"], plan["directory"])
        self._launch(pod, request)

    def do_successor(self, request: Request) -> None:
        pod_id, directory = request.body["pod"], request.body["directory"]
        pod = self.kept.get(pod_id) or self.machine.pod_files.get(directory)
        if pod is None:
            if not os.path.isdir(directory):
                raise FileNotFoundError(2, "No such file or directory", directory)
            pod = Pod(self.machine, pod_id, directory)
        if pod.supervisor is not None or pod_id in self._forking:
            raise AlreadyExists(f'pod "{pod_id}": has a supervisor')
        self._launch(pod, request)

    def _launch(self, pod: Pod, request: Request) -> None:
        self.kept[pod.id] = pod
        self._forking[pod.id] = request
        self.later(self.machine.loop.soon(), lambda: self._forked(pod))

    def _forked(self, pod: Pod) -> None:
        request = self._forking.pop(pod.id)
        if self.kept.get(pod.id) is not pod:
            request.fail(Unavailable(f'pod "{pod.id}": its supervisor died'))
            return
        try:
            os.makedirs(f"{pod.directory}/shared", exist_ok=True)
        except OSError as error:
            self.kept.pop(pod.id)
            request.fail(error)
            return
        self.machine.pods[pod.id] = self.machine.pod_files[pod.directory] = pod
        pod.has_pins = True
        pod.supervisor = Supervisor(self.machine, pod)
        self.later(self.machine.loop.soon(), lambda: self._is_ready(pod, request))

    def _is_ready(self, pod: Pod, request: Request) -> None:
        if pod.supervisor is None:
            request.fail(Unavailable(f'pod "{pod.id}": its supervisor died'))
        else:
            request.reply()

    def supervisor_gone(self, pod: Pod) -> None:
        if self.kept.get(pod.id) is pod and not pod.is_left():
            del self.kept[pod.id]

    def do_list(self, request: Request) -> None:
        request.reply({"pods": list(self.kept)})

    def do_abandon(self, request: Request) -> None:
        pod = self.kept.pop(request.body["pod"], None)
        if pod is not None and pod.supervisor is not None:
            pod.supervisor.kill()
        request.reply()

    def do_stop(self, request: Request) -> None:
        if self.kept:
            raise FailedPrecondition(f"launcher: {len(self.kept)} pods are left")
        request.reply()
        self.later(0, self.kill)


class Supervisor(Server):
    """The supervisor of a pod."""

    fault = "supervisor_fails"

    def __init__(self, machine: Machine, pod: Pod) -> None:
        super().__init__(machine, f"supervisor {pod.id[-4:]}")
        self.pod = pod
        self.agent: Connection | None = None
        self._creations: dict[str, Request] = {}
        self._starts: dict[str, Request] = {}
        self._removals: dict[str, list[Request]] = {}
        self._execs: dict[int, tuple[Connection, list[Any]]] = {}
        self._closing: list[Request] = []
        machine.listeners[f"{pod.directory}/{SUPERVISOR_SOCKET}"] = self
        for container in list(pod.containers.values()):
            self._take_over(container)

    def _take_over(self, container: Container) -> None:
        container.exit = self.machine.exits.get((self.pod.directory, container.id))
        if not container.created_at:
            container.end(KILLED)
            self.pod.containers.pop(container.id, None)
        elif container.exit is None and not container.is_alive:
            container.record(exits.UNKNOWN)
        elif container.deadline:
            self._keep_deadline(container)
        if container.is_alive and container.started_at and not container.is_executed:
            container.begin()

    def accepted(self, connection: Connection) -> None:
        previous, self.agent = self.agent, connection
        if previous is not None:
            previous.close_by_process()

    def died(self) -> None:
        self.pod.supervisor = None
        for _, files in self._execs.values():
            for file in files:
                close_file(file)
        for container in list(self.pod.containers.values()):
            if not container.created_at:  # its process ends, as nobody hears that it is ready
                container.is_alive = False
                container.group.members.pop(container, None)
        if self.machine.launcher is not None:
            self.machine.launcher.supervisor_gone(self.pod)

    def tell(self, event: dict[str, Any]) -> None:
        if self.agent is not None:
            self.agent.send(protocol.encode(event))

    def slowly(self) -> float:
        return 3.0 if self.machine.is_struck("slow") else self.machine.loop.soon()

    # --- the pod ---

    def do_namespaces(self, request: Request) -> None:
        request.reply({"fds": ["net", "route"]}, [os.dup(_DEVNULL), os.dup(_SOCKET.fileno())])

    def do_configure(self, request: Request) -> None:
        self.later(self.machine.loop.soon(), request.reply)

    def do_state(self, request: Request) -> None:
        members = [c.describe() for c in self.pod.containers.values() if c.created_at]
        request.reply({"pid": self.pid, "init_ended": False, "containers": members})

    def do_shutdown(self, request: Request) -> None:
        self._closing.append(request)
        for number in list(self._execs):
            self._end_exec(number, KILLED)
        for container in self.pod.containers.values():
            container.kill()
        self._end_if_empty()

    def _end_if_empty(self) -> None:
        if any(c.is_alive for c in self.pod.containers.values()):
            self.later(0.005, self._end_if_empty)
            return
        self.pod.has_pins = False
        self.machine.pods.pop(self.pod.id, None)
        if self.machine.launcher is not None:
            self.machine.launcher.kept.pop(self.pod.id, None)
        for request in self._closing:
            request.reply()
        self.kill()

    # --- containers ---

    def _container(self, request: Request) -> Container:
        container = self.pod.containers.get(request.body["container"])
        if container is None:
            raise NotFound(f'container "{request.body["container"]}": not in pod "{self.pod.id}"')
        return container

    def do_create(self, request: Request) -> None:
        plan = request.body["plan"]
        if self._closing:
            raise FailedPrecondition(f'pod "{self.pod.id}": is being shut down')
        if plan["id"] in self.pod.containers:
            raise AlreadyExists(f'container "{plan["id"]}": exists already')
        (group,) = request.take("join")
        container = Container(self.pod, plan, group)
        self.pod.containers[container.id] = container
        self._creations[container.id] = request
        takes = self.slowly()
        if self.machine.is_struck("hang"):
            takes = HANG_SECONDS
            container.hangs_until = self.machine.loop.time() + takes
        self.later(takes, lambda: self._is_born(container))

    def _is_born(self, container: Container) -> None:
        if not container.is_alive:
            return
        container.created_at = self.machine.time_ns()
        request = self._creations.pop(container.id, None)
        if request is not None:
            request.reply(container.describe())

    def birth_failed(self, container: Container) -> None:
        self.pod.containers.pop(container.id, None)
        request = self._creations.pop(container.id, None)
        if request is not None:
            request.fail(FailedPrecondition(f'container "{container.id}": removed while created'))
        for removal in self._removals.pop(container.id, ()):
            removal.reply()

    def do_start(self, request: Request) -> None:
        container = self._container(request)
        if container.started_at or container.exit or not container.is_alive:
            raise FailedPrecondition(f'container "{container.id}": not created')
        container.started_at = self.machine.time_ns()
        self._starts[container.id] = request
        self.later(self.slowly(), lambda: self._executed(container))

    def _executed(self, container: Container) -> None:
        request = self._starts.get(container.id)
        if not container.is_alive or request is None:
            return
        if container.program == "absent":
            container.end(128)
            return
        container.begin()
        del self._starts[container.id]
        request.reply({"at": container.started_at})

    def do_stop(self, request: Request) -> None:
        container = self._container(request)
        timeout_s = request.body["timeout_ms"] / 1000
        if container.exit is None:
            if timeout_s <= 0 or not container.started_at:
                container.kill()
            else:
                if not container.is_signalled:
                    container.is_signalled = True
                    container.signal()
                deadline = self.machine.loop.time() + timeout_s
                if not container.deadline or deadline < container.deadline:
                    container.deadline = deadline
                    self._keep_deadline(container)
        request.reply()

    def _keep_deadline(self, container: Container) -> None:
        wait = max(0.0, container.deadline - self.machine.loop.time())
        self.later(wait, container.kill)

    def ended(self, container: Container, code: int) -> None:
        container.record(code)
        self.later(self.machine.loop.soon(), lambda: self._tell_end(container))

    def _tell_end(self, container: Container) -> None:
        request = self._starts.pop(container.id, None)
        if request is not None and container.program == "absent":
            request.fail(StartError(f'container "{container.id}": "absent": not found'))
        elif request is not None:
            request.reply({"at": container.started_at})
        self.tell({"event": "exit", "container": container.id, "exit": container.exit})
        for removal in self._removals.pop(container.id, ()):
            self._remove(container, removal)

    def do_remove(self, request: Request) -> None:
        container = self.pod.containers.get(request.body["container"])
        if container is None:
            request.reply()
        elif container.exit is None:
            self._removals.setdefault(container.id, []).append(request)
            container.kill()
        else:
            self._remove(container, request)

    def _remove(self, container: Container, request: Request) -> None:
        self.machine.exits.pop((self.pod.directory, container.id), None)
        self.pod.containers.pop(container.id, None)
        request.reply()

    # --- execs ---

    def do_exec(self, request: Request) -> None:
        container = self._container(request)
        if not container.is_executed or not container.is_alive:
            raise FailedPrecondition(f'container "{container.id}": not running')
        number = request.body["exec"]
        request.take("join")
        self._execs[number] = request.connection, [*request.take("stdout"), *request.take("stderr")]
        request.reply({"pid": 1})
        self.later(self.slowly(), lambda: self._end_exec(number, 0))

    def _end_exec(self, number: int, code: int) -> None:
        connection, files = self._execs.pop(number, (None, []))
        if connection is None:
            return
        for file in files:
            try:
                os.write(file, b"x")
            except OSError:
                pass  # nobody reads it any more
            close_file(file)
        self.machine.poll_pipes()
        event = {"event": "exec_exit", "exec": number, "code": code, "timed_out": False}
        connection.send(protocol.encode(event))

    def do_exec_kill(self, request: Request) -> None:
        self._end_exec(request.body["exec"], KILLED)
        request.reply()
