"""The launcher, as the agent hears it; it follows `nodeagent.sandbox.launcher`."""

import os

from nodeagent.errors import AlreadyExists, FailedPrecondition, NotFound, Unavailable
from nodeagent.sandbox.paths import LAUNCHER_SOCKET
from tests.chaos.simulation.containers import Pod
from tests.chaos.simulation.machine import Machine
from tests.chaos.simulation.server import Request, Server
from tests.chaos.simulation.supervisor import Supervisor


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
            if not os.path.isdir(pod.directory):
                raise NotFound(f'pod "{pod.id}": {pod.directory} is gone')
            os.makedirs(f"{pod.directory}/shared", exist_ok=True)
        except (NotFound, OSError) as error:
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
