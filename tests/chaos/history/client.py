"""A client that executes a program and records each call; a call that fails for a passing reason is sent again."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from nodeagent.api import runtime_pb2 as pb
from nodeagent.api import runtime_pb2_grpc as rpc
from tests.chaos.history import program
from tests.chaos.history.program import Step
from tests.chaos.history.record import Call, History, Sight

DEADLINE_SECONDS = 150.0
RETRIES = 4
RETRY_SECONDS = 0.2
STOP_SECONDS = (0, 1, 5)
CHANNEL = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.use_local_subchannel_pool", 1),
)
NAMESPACE = "history"
TOKEN = "token"


@dataclass(slots=True)
class Places:
    """Ids by the names of what they are of, which clients share, and directories of the run."""

    image: str
    codes: Path
    logs: Path
    first_port: int
    ids: dict[str, str] = field(default_factory=dict)
    identities: set[tuple[str, int]] = field(default_factory=set)


class Client:
    """One connection, by which one call is made after the other."""

    def __init__(self, number: int, endpoint: str, history: History, places: Places) -> None:
        self.number = number
        self.quiet = False
        self._history = history
        self._places = places
        self._made = 0
        self._channel = grpc.insecure_channel(endpoint, options=CHANNEL)
        self.runtime = rpc.RuntimeServiceStub(self._channel)
        self.done: list[Step] = []

    def close(self) -> None:
        self._channel.close()

    def execute(self, steps: Iterable[Step], over: Callable[[], bool]) -> None:
        for step in steps:
            if over():
                return
            self.done.append(step)
            getattr(self, f"_{step.verb}")(step)

    # --- one call ---------------------------------------------------------------------------------------------------

    def call(
        self,
        method: str,
        request: Any,
        *,
        cancel: float = 0.0,
        show: Callable[[Any], dict[str, Any]] = lambda _: {},
        **fields: Any,
    ) -> Any:
        """The answer, or None. show: the fields of the record that the answer gives."""
        for attempt in range(RETRIES + 1):
            code, answer = self._once(method, request, cancel, show, fields)
            if code != "UNAVAILABLE" or cancel or attempt == RETRIES:
                return answer
            time.sleep(RETRY_SECONDS * (attempt + 1))
        return None

    def _once(
        self,
        method: str,
        request: Any,
        cancel: float,
        show: Callable[[Any], dict[str, Any]],
        fields: dict[str, Any],
    ) -> tuple[str, Any]:
        begin = time.time_ns()
        answer, shown = None, {}
        try:
            future = getattr(self.runtime, method).future(
                request, timeout=DEADLINE_SECONDS, wait_for_ready=True
            )
            timer = threading.Timer(cancel, future.cancel) if cancel else None
            if timer:
                timer.start()
            try:
                answer = future.result()
            finally:
                if timer:
                    timer.cancel()
            code, text = "OK", ""
        except grpc.RpcError as error:
            code, text = error.code().name, error.details() or ""
        except grpc.FutureCancelledError:
            code, text = "CANCELLED", ""
        end = time.time_ns()
        if answer is not None:
            shown = show(answer)
        self._history.add(
            Call(
                client=self.number,
                rpc=method,
                begin=begin,
                end=end,
                code=code,
                quiet=self.quiet,
                **{"text": text, **fields, **shown},
            )
        )
        return code, answer

    # --- pods -------------------------------------------------------------------------------------------------------

    def _pod_name(self, step: Step) -> str:
        """Two clients have the last pod of each in common."""
        if step.pod == program.PODS - 1:
            return f"s{self.number // 2}"
        return f"p{self.number}-{step.pod}"

    def _pod(self, step: Step) -> str:
        return self._places.ids.get(self._pod_name(step), "")

    def _container(self, step: Step) -> str:
        return self._places.ids.get(f"{self._pod_name(step)}/{step.container}", "")

    def pod_config(self, name: str, attempt: int) -> pb.PodSandboxConfig:
        """The same for each attempt, as retries of a kubelet are."""
        choice = zlib.crc32(f"{name}/{attempt}".encode())
        config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(
                name=name, uid=f"uid-{name}", namespace=NAMESPACE, attempt=attempt
            ),
            hostname=name,
            log_directory=str(self._places.logs),
            labels={"pod": name},
        )
        if choice % 3 == 1:
            options = config.linux.security_context.namespace_options
            options.pid = pb.POD
        if choice % 8 == 0:
            port = self._places.first_port + (choice >> 8) % program.HOST_PORTS
            config.port_mappings.add(container_port=80, host_port=port)
        return config

    def _run(self, step: Step) -> None:
        self.run_pod(self._pod_name(step), step.attempt, step.cancel)

    def run_pod(self, name: str, attempt: int, cancel: float = 0.0) -> None:
        config = self.pod_config(name, attempt)
        asked = {"owner": f"uid-{name}/{NAMESPACE}", "name": name, "attempt": str(attempt)}
        if config.port_mappings:
            asked["port"] = str(config.port_mappings[0].host_port)
        self._places.identities.add((name, attempt))
        answer = self.call(
            "RunPodSandbox",
            pb.RunPodSandboxRequest(config=config),
            cancel=cancel,
            asked=asked,
            show=lambda answer: {"told": answer.pod_sandbox_id},
        )
        if answer is not None:
            self._places.ids[name] = answer.pod_sandbox_id
            for number in range(program.CONTAINERS):
                self._places.ids.pop(f"{name}/{number}", None)

    def _stop_pod(self, step: Step) -> None:
        if about := self._pod(step):
            self.stop_pod(about, step.cancel)

    def stop_pod(self, about: str, cancel: float = 0.0) -> None:
        request = pb.StopPodSandboxRequest(pod_sandbox_id=about)
        self.call("StopPodSandbox", request, about=about, cancel=cancel)

    def _remove_pod(self, step: Step) -> None:
        if about := self._pod(step):
            self.remove_pod(about, step.cancel)

    def remove_pod(self, about: str, cancel: float = 0.0) -> None:
        request = pb.RemovePodSandboxRequest(pod_sandbox_id=about)
        self.call("RemovePodSandbox", request, about=about, cancel=cancel)

    def _pod_status(self, step: Step) -> None:
        if about := self._pod(step):
            self.pod_status(about)

    def pod_status(self, about: str) -> Any:
        return self.call(
            "PodSandboxStatus",
            pb.PodSandboxStatusRequest(pod_sandbox_id=about),
            about=about,
            whole=True,
            show=lambda answer: {"seen": statuses(answer.status, answer.containers_statuses)},
        )

    # --- containers -------------------------------------------------------------------------------------------------

    def _create(self, step: Step) -> None:
        pod = self._pod(step)
        if not pod:
            return
        self._made += 1
        token = f"{step.kind}-{self.number}-{self._made}"
        name = f"c{step.container}"
        code, delay = step.choice % 100, step.choice % 7 / 8
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name, attempt=step.attempt),
            image=pb.ImageSpec(image=self._places.image),
            command=program.script(step.kind, token, code, delay),
            log_path=f"{token}.log",
            labels={TOKEN: token, "name": name},
            mounts=[pb.Mount(container_path="/codes", host_path=str(self._places.codes))],
        )
        sandbox = self.pod_config(self._pod_name(step), 0)
        answer = self.call(
            "CreateContainer",
            pb.CreateContainerRequest(pod_sandbox_id=pod, config=config, sandbox_config=sandbox),
            cancel=step.cancel,
            about=pod,
            asked={"owner": pod, "name": name, "attempt": str(step.attempt)},
            show=lambda answer: {"told": answer.container_id},
        )
        if answer is not None:
            self._places.ids[f"{self._pod_name(step)}/{step.container}"] = answer.container_id

    def _start(self, step: Step) -> None:
        if about := self._container(step):
            request = pb.StartContainerRequest(container_id=about)
            self.call("StartContainer", request, about=about, cancel=step.cancel)

    def _stop(self, step: Step) -> None:
        if about := self._container(step):
            self.stop(about, STOP_SECONDS[step.choice % 3], step.cancel)

    def stop(self, about: str, timeout: int, cancel: float = 0.0) -> None:
        request = pb.StopContainerRequest(container_id=about, timeout=timeout)
        self.call("StopContainer", request, about=about, cancel=cancel, seconds=float(timeout))

    def _remove(self, step: Step) -> None:
        if about := self._container(step):
            self.remove(about, step.cancel)

    def remove(self, about: str, cancel: float = 0.0) -> None:
        request = pb.RemoveContainerRequest(container_id=about)
        self.call("RemoveContainer", request, about=about, cancel=cancel)

    def _container_status(self, step: Step) -> None:
        if about := self._container(step):
            self.container_status(about)

    def container_status(self, about: str) -> Any:
        return self.call(
            "ContainerStatus",
            pb.ContainerStatusRequest(container_id=about),
            about=about,
            show=lambda answer: {"seen": (container_sight(answer.status),)},
        )

    def _exec(self, step: Step) -> None:
        if about := self._container(step):
            self.exec(about, step.choice, step.cancel)

    def exec(self, about: str, number: int, cancel: float = 0.0) -> None:
        """A command whose output and exit code tell that it was this one."""
        code = number % 3
        command = ["sh", "-c", f"echo {number}; exit {code}"]
        self.call(
            "ExecSync",
            pb.ExecSyncRequest(container_id=about, cmd=command, timeout=60),
            about=about,
            cancel=cancel,
            seconds=0.0,
            asked={"output": f"{number} {code}"},
            show=lambda answer: {"text": f"{answer.stdout.decode().strip()} {answer.exit_code}"},
        )

    def _exec_long(self, step: Step) -> None:
        """One whose time is over before its end."""
        if about := self._container(step):
            request = pb.ExecSyncRequest(container_id=about, cmd=["sleep", "1000"], timeout=1)
            self.call("ExecSync", request, about=about, seconds=1.0, asked={"output": ""})

    def _exec_url(self, step: Step) -> None:
        if about := self._container(step):
            request = pb.ExecRequest(container_id=about, cmd=["true"], stdout=True)
            self.call("Exec", request, about=about)

    def _stats(self, step: Step) -> None:
        if about := self._container(step):
            request = pb.ContainerStatsRequest(container_id=about)
            self.call("ContainerStats", request, about=about)

    def _update(self, step: Step) -> None:
        if about := self._container(step):
            limits = pb.LinuxContainerResources(cpu_shares=100 + step.choice % 900)
            request = pb.UpdateContainerResourcesRequest(container_id=about, linux=limits)
            self.call("UpdateContainerResources", request, about=about)

    def _reopen(self, step: Step) -> None:
        if about := self._container(step):
            request = pb.ReopenContainerLogRequest(container_id=about)
            self.call("ReopenContainerLog", request, about=about)

    # --- lists ------------------------------------------------------------------------------------------------------

    def _list_pods(self, _: Step) -> None:
        self.list_pods()

    def list_pods(self) -> Any:
        return self.call(
            "ListPodSandbox",
            pb.ListPodSandboxRequest(),
            whole=True,
            show=lambda answer: {"seen": tuple(map(pod_sight, answer.items))},
        )

    def _list_containers(self, _: Step) -> None:
        self.list_containers()

    def _list_of_pod(self, step: Step) -> None:
        if about := self._pod(step):
            wanted = pb.ContainerFilter(pod_sandbox_id=about)
            self.list_containers(wanted, about=about, whole=True, asked={"pod": about})

    def _list_in_state(self, step: Step) -> None:
        states = (pb.CONTAINER_CREATED, pb.CONTAINER_RUNNING, pb.CONTAINER_EXITED)
        state = states[step.choice % 3]
        wanted = pb.ContainerFilter(state=pb.ContainerStateValue(state=state))
        asked = {"state": pb.ContainerState.Name(state)}
        self.list_containers(wanted, whole=False, asked=asked)

    def _list_labelled(self, step: Step) -> None:
        name = f"c{step.container}"
        wanted = pb.ContainerFilter(label_selector={"name": name})
        self.list_containers(wanted, whole=False, asked={"name": name})

    def list_containers(
        self, wanted: pb.ContainerFilter | None = None, *, whole: bool = True, **fields: Any
    ) -> Any:
        return self.call(
            "ListContainers",
            pb.ListContainersRequest(filter=wanted),
            whole=whole,
            show=lambda answer: {"seen": tuple(map(container_sight, answer.containers))},
            **fields,
        )

    def _list_stats(self, _: Step) -> None:
        self.call("ListContainerStats", pb.ListContainerStatsRequest())

    def _status(self, _: Step) -> None:
        self.call("Status", pb.StatusRequest(verbose=True))


# --- what an answer shows -------------------------------------------------------------------------------------------


def pod_sight(pod: Any, ip: str | None = None) -> Sight:
    """A pod in a list, or its status."""
    metadata = pod.metadata
    return Sight(
        id=pod.id,
        kind="pod",
        state=pb.PodSandboxState.Name(pod.state),
        owner=f"{metadata.uid}/{metadata.namespace}",
        name=metadata.name,
        attempt=metadata.attempt,
        created_at=pod.created_at,
        ip=ip,
    )


def container_sight(container: Any, pod: str = "") -> Sight:
    """A container in a list, or its status, which does not name its pod."""
    state = pb.ContainerState.Name(container.state)
    is_status = isinstance(container, pb.ContainerStatus)
    has_ended = is_status and state == "CONTAINER_EXITED"
    return Sight(
        id=container.id,
        kind="container",
        state=state,
        owner=pod if is_status else container.pod_sandbox_id,
        name=container.metadata.name,
        attempt=container.metadata.attempt,
        token=container.labels[TOKEN],
        pod=pod if is_status else container.pod_sandbox_id,
        created_at=container.created_at,
        started_at=(container.started_at or None) if is_status else None,
        finished_at=container.finished_at if has_ended else None,
        exit_code=container.exit_code if has_ended else None,
        reason=container.reason if has_ended else None,
    )


def statuses(
    pod: pb.PodSandboxStatus, containers: Sequence[pb.ContainerStatus]
) -> tuple[Sight, ...]:
    """The status of a pod, and of its containers."""
    of_pod = pod_sight(pod, pod.network.ip or None)
    return (of_pod, *(container_sight(each, pod.id) for each in containers))
