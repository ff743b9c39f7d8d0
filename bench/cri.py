"""A client of one CRI socket that times what it does: the same for every runtime that is compared."""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from nodeagent.api import runtime_pb2 as pb
from nodeagent.api import runtime_pb2_grpc as rpc

DEADLINE_SECONDS = 120
SLEEPER = ["/bin/busybox", "sleep", "100000"]


class Client:
    """Pods with one sleeping container: bridge network, default seccomp, overlay, limits. Times are in ms."""

    def __init__(
        self, name: str, socket: str, image: str, logs: Path, *, shared_pid: bool = False
    ) -> None:
        self.name = name
        self._channel = grpc.insecure_channel(socket)
        self._runtime = rpc.RuntimeServiceStub(self._channel)
        self._images = rpc.ImageServiceStub(self._channel)
        self._image = image
        self._logs = logs
        self._pid = pb.POD if shared_pid else pb.CONTAINER
        self._numbers = itertools.count()
        self.times: dict[str, list[float]] = {}

    def pull(self) -> None:
        spec = pb.ImageSpec(image=self._image)
        self._image_id = self._images.PullImage(
            pb.PullImageRequest(image=spec), timeout=DEADLINE_SECONDS
        ).image_ref

    def pull_anew(self, image: str) -> None:
        """Pull an image that is not there, and remove it again."""
        spec = pb.ImageSpec(image=image)
        with self._timed("pull"):
            self._images.PullImage(pb.PullImageRequest(image=spec), timeout=DEADLINE_SECONDS)
        self._images.RemoveImage(pb.RemoveImageRequest(image=spec), timeout=DEADLINE_SECONDS)

    def close(self) -> None:
        self._channel.close()

    def start_pod(self, label: str) -> tuple[str, str]:
        """RunPodSandbox, CreateContainer, StartContainer; (pod id, container id)."""
        sandbox = self._sandbox_config()
        container = self._container_config()
        with self._timed(label):
            with self._timed(f"{label}: RunPodSandbox"):
                pod_id = self._runtime.RunPodSandbox(
                    pb.RunPodSandboxRequest(config=sandbox), timeout=DEADLINE_SECONDS
                ).pod_sandbox_id
            with self._timed(f"{label}: CreateContainer"):
                container_id = self._runtime.CreateContainer(
                    pb.CreateContainerRequest(
                        pod_sandbox_id=pod_id, config=container, sandbox_config=sandbox
                    ),
                    timeout=DEADLINE_SECONDS,
                ).container_id
            with self._timed(f"{label}: StartContainer"):
                self._runtime.StartContainer(
                    pb.StartContainerRequest(container_id=container_id), timeout=DEADLINE_SECONDS
                )
        return pod_id, container_id

    def remove_pod(self, pod_id: str, container_id: str) -> None:
        """StopContainer at once, StopPodSandbox, RemovePodSandbox."""
        with self._timed("teardown"):
            self._runtime.StopContainer(
                pb.StopContainerRequest(container_id=container_id, timeout=0),
                timeout=DEADLINE_SECONDS,
            )
            self._runtime.StopPodSandbox(
                pb.StopPodSandboxRequest(pod_sandbox_id=pod_id), timeout=DEADLINE_SECONDS
            )
            self._runtime.RemovePodSandbox(
                pb.RemovePodSandboxRequest(pod_sandbox_id=pod_id), timeout=DEADLINE_SECONDS
            )

    def exec_true(self, container_id: str) -> None:
        request = pb.ExecSyncRequest(container_id=container_id, cmd=["/bin/busybox", "true"])
        with self._timed("ExecSync true"):
            answer = self._runtime.ExecSync(request, timeout=DEADLINE_SECONDS)
        assert answer.exit_code == 0, answer

    def exec_url(self, container_id: str, *command: str, stdin: bool = False) -> str:
        """Where the streams of a new command are."""
        request = pb.ExecRequest(container_id=container_id, cmd=command, stdin=stdin, stdout=True)
        return str(self._runtime.Exec(request, timeout=DEADLINE_SECONDS).url)

    def forward_url(self, pod_id: str) -> str:
        request = pb.PortForwardRequest(pod_sandbox_id=pod_id)
        return str(self._runtime.PortForward(request, timeout=DEADLINE_SECONDS).url)

    def run_behind(self, container_id: str, script: str) -> None:
        """Leave a command running that holds none of our pipes."""
        detached = f"({script}) </dev/null >/dev/null 2>&1 &"
        request = pb.ExecSyncRequest(container_id=container_id, cmd=["sh", "-c", detached])
        self._runtime.ExecSync(request, timeout=DEADLINE_SECONDS)

    @contextmanager
    def _timed(self, label: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.times.setdefault(label, []).append((time.perf_counter() - begin) * 1000)

    def _sandbox_config(self) -> pb.PodSandboxConfig:
        name = f"bench-{next(self._numbers)}"
        return pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=name, namespace="bench"),
            hostname=name,
            log_directory=str(self._logs / name),
            dns_config=pb.DNSConfig(servers=["192.0.2.1"]),
            linux=pb.LinuxPodSandboxConfig(
                security_context=pb.LinuxSandboxSecurityContext(
                    namespace_options=pb.NamespaceOption(pid=self._pid)
                )
            ),
        )

    def _container_config(self) -> pb.ContainerConfig:
        profile = pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)
        return pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name="main"),
            image=pb.ImageSpec(image=self._image_id, user_specified_image=self._image),
            command=SLEEPER,
            log_path="main.log",
            linux=pb.LinuxContainerConfig(
                resources=pb.LinuxContainerResources(
                    cpu_period=100_000,
                    cpu_quota=100_000,
                    cpu_shares=512,
                    memory_limit_in_bytes=64 << 20,
                ),
                security_context=pb.LinuxContainerSecurityContext(
                    namespace_options=pb.NamespaceOption(pid=self._pid), seccomp=profile
                ),
            ),
        )
