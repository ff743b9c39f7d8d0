"""The supervisors, as the agent hears them.

They follow `nodeagent.sandbox.supervisor`: what one has learned of a container is in the pod's directory (here: `Pod`),
so that a successor goes on; the end of a container is recorded by its supervisor, else by the launcher that keeps it,
and is unknown to all where neither lives.
"""

import os
import socket
from typing import Any

from nodeagent.errors import AlreadyExists, FailedPrecondition, NotFound, StartError
from nodeagent.sandbox import exits, protocol
from nodeagent.sandbox.paths import SUPERVISOR_SOCKET
from tests.chaos.simulation.connection import Connection, close_file
from tests.chaos.simulation.containers import KILLED, Container, Init, Pod
from tests.chaos.simulation.machine import Machine
from tests.chaos.simulation.server import Request, Server

HANG_SECONDS = 60.0
START_FAILED = 128
_DEVNULL = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
_SOCKET = socket.socket(socket.AF_UNIX)


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
        self._execs: dict[tuple[Connection, int], list[Any]] = {}
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
        if self.is_stopped:  # the kernel has; it learns of it when it goes on
            self.when_running(lambda: self.accepted(connection))
            return
        previous, self.agent = self.agent, connection
        if previous is not None:
            previous.close_by_process()

    def died(self) -> None:
        self.pod.supervisor = None
        for files in self._execs.values():
            for file in files:
                close_file(file)
        for container in list(self.pod.containers.values()):
            if not container.created_at:  # its process ends, as nobody hears that it is ready
                container.is_alive = False
                container.group.members.pop(container, None)
        for container in list(self.pod.containers.values()):
            container.orphaned()
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
        for group in request.take("join"):
            if self.pod.init is None:
                self.pod.init = Init(self.pod, group)
        self.later(self.machine.loop.soon(), request.reply)

    def init_ended(self) -> None:
        if not self._closing:
            self.tell({"event": "init_exit"})

    def do_state(self, request: Request) -> None:
        has_ended = self.pod.init is not None and not self.pod.init.is_alive
        members = [c.describe() for c in self.pod.containers.values() if c.created_at]
        request.reply({"pid": self.pid, "init_ended": has_ended, "containers": members})

    def do_shutdown(self, request: Request) -> None:
        self._closing.append(request)
        for connection, number in list(self._execs):
            self._end_exec(connection, number, KILLED)
        for container in self.pod.containers.values():
            container.kill()
        self._end_if_empty()

    def _end_if_empty(self) -> None:
        if any(c.is_alive for c in self.pod.containers.values()):
            self.later(0.005, self._end_if_empty)
            return
        if self.pod.init is not None:
            self.pod.init.kill()
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
            container.end(START_FAILED)
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
        # One that is killed before it was executed has no such error.
        if request is not None and container.exit and container.exit["code"] == START_FAILED:
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
        number, connection = request.body["exec"], request.connection
        request.take("join")
        self._execs[connection, number] = [*request.take("stdout"), *request.take("stderr")]
        request.reply({"pid": 1})
        self.later(self.slowly(), lambda: self._end_exec(connection, number, 0))

    def _end_exec(self, connection: Connection, number: int, code: int) -> None:
        files = self._execs.pop((connection, number), None)
        if files is None:
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
        self._end_exec(request.connection, request.body["exec"], KILLED)
        request.reply()
