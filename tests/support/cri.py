"""The CRI as a test writes it: pods and containers in a line each, over the real socket."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.support.node import PATIENCE_SECONDS, RunningAgent, wait_for

_numbers = itertools.count()

RUNNING = pb.CONTAINER_RUNNING
EXITED = pb.CONTAINER_EXITED
CREATED = pb.CONTAINER_CREATED
SLEEP = ("sleep", "1000")


class Cri:
    """An agent's socket. Objects made here are removed by `Pod.remove`, or by the agent's fixture at the end."""

    def __init__(self, agent: RunningAgent, image: str, logs: Path) -> None:
        self.agent = agent
        self.image = image
        self.logs = logs

    def pod(self, *, linux: pb.LinuxPodSandboxConfig | None = None, **fields: Any) -> "Pod":
        """RunPodSandbox with a name of its own; `fields` are of PodSandboxConfig."""
        name = f"pod-{next(_numbers)}"
        config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="test"),
            log_directory=str(self.logs / name),
            linux=linux or pb.LinuxPodSandboxConfig(),
        )
        on_node = config.linux.security_context.namespace_options.network == pb.NODE
        if not on_node:
            config.hostname = name
        config.MergeFrom(pb.PodSandboxConfig(**fields))
        request = pb.RunPodSandboxRequest(config=config)
        answer = self.agent.runtime.RunPodSandbox(request, timeout=PATIENCE_SECONDS)
        return Pod(self, config, answer.pod_sandbox_id)

    def run(self, *command: str, **fields: Any) -> "Container":
        """A pod of its own with one started container."""
        container = self.pod().container(*command, **fields)
        container.start()
        return container


@dataclass(slots=True)
class Pod:
    cri: Cri
    config: pb.PodSandboxConfig
    id: str

    @property
    def status(self) -> pb.PodSandboxStatus:
        request = pb.PodSandboxStatusRequest(pod_sandbox_id=self.id)
        answer: pb.PodSandboxStatusResponse = self.cri.agent.runtime.PodSandboxStatus(
            request, timeout=PATIENCE_SECONDS
        )
        return answer.status

    @property
    def ip(self) -> str:
        return self.status.network.ip

    @property
    def supervisor(self) -> int:
        """Its process, which another may replace."""
        request = pb.PodSandboxStatusRequest(pod_sandbox_id=self.id, verbose=True)
        info = self.cri.agent.runtime.PodSandboxStatus(request, timeout=PATIENCE_SECONDS).info
        return int(json.loads(info["info"])["pid"])

    def container(self, *command: str, name: str = "main", **fields: Any) -> "Container":
        """CreateContainer; `fields` are of ContainerConfig."""
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name),
            image=pb.ImageSpec(image=self.cri.image),
            command=command or SLEEP,
            log_path=f"{name}.log",
        )
        config.MergeFrom(pb.ContainerConfig(**fields))
        request = pb.CreateContainerRequest(
            pod_sandbox_id=self.id, config=config, sandbox_config=self.config
        )
        answer = self.cri.agent.runtime.CreateContainer(request, timeout=PATIENCE_SECONDS)
        return Container(self, config, answer.container_id)

    def run(self, *command: str, **fields: Any) -> "Container":
        container = self.container(*command, **fields)
        container.start()
        return container

    def stop(self) -> None:
        request = pb.StopPodSandboxRequest(pod_sandbox_id=self.id)
        self.cri.agent.runtime.StopPodSandbox(request, timeout=PATIENCE_SECONDS)

    def remove(self) -> None:
        request = pb.RemovePodSandboxRequest(pod_sandbox_id=self.id)
        self.cri.agent.runtime.RemovePodSandbox(request, timeout=PATIENCE_SECONDS)


@dataclass(slots=True)
class Container:
    pod: Pod
    config: pb.ContainerConfig
    id: str

    @property
    def status(self) -> pb.ContainerStatus:
        request = pb.ContainerStatusRequest(container_id=self.id)
        runtime = self.pod.cri.agent.runtime
        answer: pb.ContainerStatusResponse = runtime.ContainerStatus(
            request, timeout=PATIENCE_SECONDS
        )
        return answer.status

    @property
    def log(self) -> Path:
        return Path(self.pod.config.log_directory) / self.config.log_path

    @property
    def output(self) -> str:
        """What the log has, without stamps, streams and tags; a line that is being written is not in it yet."""
        lines = self.log.read_text().rpartition("\n")[0].splitlines()
        return "\n".join(line.split(" ", 3)[3] for line in lines)

    def start(self) -> None:
        request = pb.StartContainerRequest(container_id=self.id)
        self.pod.cri.agent.runtime.StartContainer(request, timeout=PATIENCE_SECONDS)

    def stop(self, timeout: int = 0) -> None:
        request = pb.StopContainerRequest(container_id=self.id, timeout=timeout)
        self.pod.cri.agent.runtime.StopContainer(request, timeout=timeout + PATIENCE_SECONDS)

    def remove(self) -> None:
        request = pb.RemoveContainerRequest(container_id=self.id)
        self.pod.cri.agent.runtime.RemoveContainer(request, timeout=PATIENCE_SECONDS)

    def exec(self, *command: str, timeout: int = 60) -> pb.ExecSyncResponse:
        request = pb.ExecSyncRequest(container_id=self.id, cmd=command, timeout=timeout)
        runtime = self.pod.cri.agent.runtime
        answer: pb.ExecSyncResponse = runtime.ExecSync(request, timeout=timeout + PATIENCE_SECONDS)
        return answer

    def shell(self, script: str) -> str:
        """What a shell in the container prints; it must succeed."""
        answer = self.exec("sh", "-c", script)
        assert answer.exit_code == 0, answer
        return answer.stdout.decode().strip()

    def said(self, text: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Return once its log has this text."""
        name = self.config.metadata.name
        wait_for(f"{text} from {name}", lambda: self.log.exists() and text in self.output, seconds)

    def ended(self, seconds: float = PATIENCE_SECONDS) -> pb.ContainerStatus:
        """Its status once it is EXITED."""
        wait_for(
            f"end of {self.config.metadata.name}", lambda: self.status.state == EXITED, seconds
        )
        return self.status


def options(**fields: Any) -> pb.LinuxContainerConfig:
    """A container's security context in a line."""
    return pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(**fields))


def pod_options(**fields: Any) -> pb.LinuxPodSandboxConfig:
    """A pod's namespace options in a line."""
    return pb.LinuxPodSandboxConfig(
        security_context=pb.LinuxSandboxSecurityContext(
            namespace_options=pb.NamespaceOption(**fields)
        )
    )


def refused(code: grpc.StatusCode, text: str, call: Callable[[], object]) -> None:
    """The call fails with this code, and a text that has `text` in it."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    details = caught.value.details() or ""
    assert caught.value.code() == code, details
    assert text in details
