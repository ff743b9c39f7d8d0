"""What a round works with: a pod and a container, with calls that have a deadline and may be repeated."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from nodeagent.api import runtime_pb2 as pb
from nodeagent.streaming.backend import AttachRequest, ExecRequest
from tests.chaos.inject import streams
from tests.chaos.inject.events import Watch
from tests.chaos.inject.world import World, Wrong, first_of
from tests.chaos.oracles import unclear
from tests.contract.streaming.clients import CommandClient
from tests.support import leaks
from tests.support.cri import pod_options
from tests.support.node import PATIENCE_SECONDS, free_port

# Longer than what the agent waits for, also on a busy machine: a call that takes longer is one that hangs.
DEADLINE_SECONDS = 2 * PATIENCE_SECONDS
# Within this time a client that repeats a call, as the kubelet does, gets what it asks for.
RETRY_SECONDS = PATIENCE_SECONDS
_RETRY_PAUSE_SECONDS = 0.2
_GRACE_SECONDS = 60  # of the program, which ends at once where it gets a processor

CODE = 7
_PROGRAM = (
    "trap 'echo {rest}; echo 7 > /gate/{token}.code; exit 7' TERM; trap 'exec tail /dev/zero' USR1; "
    "echo up; {begin}echo > /gate/{token}.up; {work}sleep 1000 & wait $!"
)
_SAYS = {"up", "bye"}  # the latter in two parts, and whole where it writes its code
_READER = 'while read line; do echo "got $line"; done; '
_PORT = 8080
_SERVER = f"httpd -p 127.0.0.1:{_PORT} -h /gate; "

_COMMAND = ("sh", "-c", "echo out; echo err >&2; exit 3")
_TYPED, _SHOWN = b"typed\n", b"got typed, 41 101"
_AT_TERMINAL = ("sh", "-c", 'read line; echo "got $line, $(stty size)"; exit 3')
READ_ONLY = (
    "Version",
    "Status",
    "RuntimeConfig",
    "ListPodSandbox",
    "StreamPodSandboxes",
    "ListContainers",
    "StreamContainers",
    "PodSandboxStatus",
    "ContainerStatus",
    "ContainerStats",
    "ListContainerStats",
    "StreamContainerStats",
    "PodSandboxStats",
    "ListPodSandboxStats",
    "StreamPodSandboxStats",
    "ListMetricDescriptors",
    "ListPodSandboxMetrics",
    "StreamPodSandboxMetrics",
    "ListImages",
    "StreamImages",
    "ImageStatus",
    "ImageFsInfo",
    "ListSecurityProfiles",
)
_REQUESTS_REFUSED = {
    "CheckpointContainer": pb.CheckpointContainerRequest(),
    "CheckpointPod": pb.CheckpointPodRequest(),
    "RestorePod": pb.RestorePodRequest(),
}
REFUSED = tuple(_REQUESTS_REFUSED)


class Scene:
    """A pod and a container of a round. token: names them, and the files that the program writes.

    is_program_hit: a signal of the fault may hit the program, or all who learn of its end. is_watched: those who learn
    of its end, and write its log, can do all that they have to, or die. is_eaten: it was to take too much memory.
    is_under_fault: a call that takes longer than the agent waits has its answer then; at all other times the machine is
    busy, and it is repeated.
    """

    def __init__(self, world: World, token: str) -> None:
        self.world = world
        self.token = token
        self.pod_id = ""
        self.container_id = ""
        self.is_program_hit = False
        self.is_watched = True
        self.is_eaten = False
        self._rotations = 0
        self.is_under_fault = False
        self.called: set[str] = set()
        self.pod_config = self._config_of_pod()
        self._reads_input = False
        self._work = ""
        self._heard: list[str] = []  # of the program, by clients that were attached
        self._watch: Watch | None = None

    # --- calls ---

    def runtime(self, name: str, request: Any) -> Any:
        return self._ask(self.world.agent.runtime, name, request)

    def images(self, name: str, request: Any) -> Any:
        return self._ask(self.world.agent.images, name, request)

    def _ask(self, stub: Any, name: str, request: Any) -> Any:
        """The answer, or a list of the answers of a call that streams them."""
        self.called.add(name)
        call = getattr(stub, name)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            try:
                answer = call(request, timeout=DEADLINE_SECONDS)
                return list(answer) if isinstance(answer, Iterator) else answer
            except grpc.RpcError as error:
                is_slow = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED and not unclear(error)
                if self.is_under_fault or not is_slow or time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_PAUSE_SECONDS)

    def _config_of_pod(self) -> pb.PodSandboxConfig:
        name = f"pod-{self.token}"
        return pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="chaos"),
            hostname=name,
            log_directory=str(self.world.folder / "logs" / name),
        )

    def make_rich(self) -> None:
        """Ask for a pod that has a bit of everything."""
        self.pod_config.linux.CopyFrom(pod_options(pid=pb.POD))
        self.pod_config.linux.sysctls["net.ipv4.ip_local_port_range"] = "20000 30000"
        self.pod_config.dns_config.servers.append("10.0.0.53")
        mapping = pb.PortMapping(protocol=pb.TCP, container_port=80, host_port=free_port())
        self.pod_config.port_mappings.append(mapping)

    def make_reader(self) -> None:
        """Ask for a program that says again what it reads."""
        self._reads_input = True
        self._work = _READER

    def make_server(self) -> None:
        """Ask for a program with a server on a port of the pod's."""
        self._work = _SERVER

    @property
    def _program(self) -> str:
        # One that reads its input has lines of its own between.
        begin, rest = ("", "bye") if self._reads_input else ("printf by; ", "e")
        return _PROGRAM.format(token=self.token, work=self._work, begin=begin, rest=rest)

    def run_pod(self) -> None:
        request = pb.RunPodSandboxRequest(config=self.pod_config)
        with self._found_by_name(self._find_pod):
            self.pod_id = self.runtime("RunPodSandbox", request).pod_sandbox_id

    def create(self) -> None:
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=self.token),
            image=pb.ImageSpec(image=self.world.image),
            command=["sh", "-c", self._program],
            stdin=self._reads_input,
            log_path="main.log",
            mounts=[pb.Mount(container_path="/gate", host_path=str(self.world.gate))],
            linux=pb.LinuxContainerConfig(
                resources=pb.LinuxContainerResources(
                    cpu_period=100_000, cpu_quota=200_000, memory_limit_in_bytes=256 << 20
                )
            ),
        )
        request = pb.CreateContainerRequest(
            pod_sandbox_id=self.pod_id, config=config, sandbox_config=self.pod_config
        )
        with self._found_by_name(self._find_container):
            self.container_id = self.runtime("CreateContainer", request).container_id

    def start(self) -> None:
        try:
            self.runtime("StartContainer", pb.StartContainerRequest(container_id=self.container_id))
        except grpc.RpcError as error:
            # A call before this one may have started it: its answer did not come through.
            done = error.code() == grpc.StatusCode.FAILED_PRECONDITION
            if not done or self.status().state == pb.CONTAINER_CREATED:
                raise

    def stop(self) -> None:
        request = pb.StopContainerRequest(container_id=self.container_id, timeout=_GRACE_SECONDS)
        self.runtime("StopContainer", request)

    def remove(self) -> None:
        self.runtime("RemoveContainer", pb.RemoveContainerRequest(container_id=self.container_id))

    def stop_pod(self) -> None:
        self.runtime("StopPodSandbox", pb.StopPodSandboxRequest(pod_sandbox_id=self.pod_id))

    def remove_pod(self) -> None:
        self.runtime("RemovePodSandbox", pb.RemovePodSandboxRequest(pod_sandbox_id=self.pod_id))

    def exec(self) -> None:
        request = pb.ExecSyncRequest(
            container_id=self.container_id, cmd=_COMMAND, timeout=_GRACE_SECONDS
        )
        answer = self.runtime("ExecSync", request)
        self._compare((answer.stdout, answer.stderr, answer.exit_code))

    def _compare(self, said: tuple[bytes, bytes, int], stdout: bytes = b"out\n") -> None:
        """Compare what a command has said, and its exit code, with what it must be."""
        if said != (stdout, b"err\n", 3) and not (self.is_program_hit and said[2] == 137):
            raise Wrong(f"exec: {said}")

    def exec_stream(self) -> None:
        """The command of `exec`, over a stream."""
        url = self.runtime(
            "Exec",
            pb.ExecRequest(container_id=self.container_id, cmd=_COMMAND, stdout=True, stderr=True),
        ).url
        wanted = ExecRequest(
            container_id=self.container_id, command=_COMMAND, stdout=True, stderr=True
        )
        result = streams.command(streams.SPDY, url, wanted, DEADLINE_SECONDS)
        self._compare((result.stdout, result.stderr, result.code))

    def exec_at_terminal(self) -> None:
        request = pb.ExecRequest(
            container_id=self.container_id, cmd=_AT_TERMINAL, tty=True, stdin=True, stdout=True
        )
        url = self.runtime("Exec", request).url
        wanted = ExecRequest(
            container_id=self.container_id, command=_AT_TERMINAL, tty=True, stdin=True, stdout=True
        )

        async def talk(client: CommandClient) -> None:
            await client.resize(101, 41)
            await client.write(_TYPED)

        result = streams.command(streams.WEBSOCKET, url, wanted, DEADLINE_SECONDS, talk)
        said, code = result.stdout.replace(b"\r\n", b"\n"), result.code
        shown = _TYPED + _SHOWN + b"\n"  # a terminal shows what is typed
        if (said, code) != (shown, 3) and not (self.is_program_hit and code == 137):
            raise Wrong(f"exec at a terminal: {said!r}, {code}")

    def attach(self) -> None:
        """Say a line to the program, hear its answer, and leave."""
        request = pb.AttachRequest(
            container_id=self.container_id, stdin=True, stdout=True, stderr=True
        )
        url = self.runtime("Attach", request).url
        wanted = AttachRequest(container_id=self.container_id, stdin=True, stdout=True, stderr=True)
        line = os.urandom(8).hex()

        async def talk(client: CommandClient) -> None:
            await client.write(f"{line}\n".encode())
            await client.expect(f"got {line}\n".encode())
            await client.end_input()

        result = streams.command(streams.SPDY, url, wanted, DEADLINE_SECONDS, talk)
        if result.code and not self.is_program_hit:
            raise Wrong(f"attach: {result}")
        self._heard.append(f"got {line}\n")

    def forward(self) -> None:
        request = pb.PortForwardRequest(pod_sandbox_id=self.pod_id, port=[_PORT])
        url = self.runtime("PortForward", request).url
        asked = f"GET /{self.token}.up HTTP/1.0\r\n\r\n".encode()
        answer = streams.forward(url, _PORT, asked, DEADLINE_SECONDS)
        if not (b" 200 OK" in answer and answer.endswith(b"\r\n\r\n\n")):
            raise Wrong(f"forward: {answer!r}")

    def update(self) -> None:
        request = pb.UpdateContainerResourcesRequest(
            container_id=self.container_id,
            linux=pb.LinuxContainerResources(
                cpu_period=100_000, cpu_quota=150_000, memory_limit_in_bytes=512 << 20
            ),
        )
        self.runtime("UpdateContainerResources", request)

    def update_pod(self) -> None:
        """A container's limits have to be below those of its pod."""
        request = pb.UpdatePodSandboxResourcesRequest(
            pod_sandbox_id=self.pod_id,
            overhead=pb.LinuxContainerResources(memory_limit_in_bytes=64 << 20),
            resources=pb.LinuxContainerResources(
                cpu_period=100_000, cpu_quota=300_000, memory_limit_in_bytes=1 << 30
            ),
        )
        self.runtime("UpdatePodSandboxResources", request)

    def reopen_log(self) -> None:
        log = Path(self.pod_config.log_directory) / "main.log"
        if log.exists():
            self._rotations += 1  # a retry must not replace the log that the first attempt has left
            log.rename(log.with_suffix(f".{self._rotations}"))
        self.runtime(
            "ReopenContainerLog", pb.ReopenContainerLogRequest(container_id=self.container_id)
        )

    def read(self) -> None:
        """All calls that change nothing."""
        ids, pod = {"container_id": self.container_id}, {"pod_sandbox_id": self.pod_id}
        fields: dict[str, dict[str, Any]] = {
            "Status": {"verbose": True},
            "PodSandboxStatus": {**pod, "verbose": True},
            "ContainerStatus": {**ids, "verbose": True},
            "ContainerStats": ids,
            "PodSandboxStats": pod,
            "ImageStatus": {"image": self._other_image, "verbose": True},
        }
        for name in READ_ONLY:
            ask = self.runtime if hasattr(self.world.agent.runtime, name) else self.images
            ask(name, getattr(pb, f"{name}Request")(**fields.get(name, {})))

    def be_refused(self) -> None:
        """The calls that this runtime does not offer."""
        for name, request in _REQUESTS_REFUSED.items():
            try:
                self.runtime(name, request)
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.UNIMPLEMENTED:
                    raise
                if error.details() != f"{name}: this runtime takes no checkpoints":
                    raise Wrong(f"{name}: {error.details()}") from None
            else:
                raise Wrong(f"{name} is not refused")

    def watch(self) -> None:
        """Read the events from now on."""
        self.called.add("GetContainerEvents")
        if self._watch is not None:
            self._watch.close()
        self._watch = Watch(self.world.agent.runtime)

    def watch_start(self) -> None:
        """Read the events, of which a container makes some."""
        self.watch()
        self.create()
        self.start()

    def configure(self) -> None:
        network = pb.NetworkConfig(pod_cidr="10.88.0.0/16")
        config = pb.RuntimeConfig(network_config=network)
        self.runtime("UpdateRuntimeConfig", pb.UpdateRuntimeConfigRequest(runtime_config=config))

    def pull(self) -> None:
        self.images("PullImage", pb.PullImageRequest(image=self._other_image))

    def remove_image(self) -> None:
        self.images("RemoveImage", pb.RemoveImageRequest(image=self._other_image))

    def pull_profile(self) -> None:
        spec = pb.ImageSpec(image=self.world.profile)
        request = pb.PullSecurityProfileRequest(image=spec, profile_kind=pb.Seccomp)
        self.images("PullSecurityProfile", request)

    def remove_profile(self) -> None:
        digest = self.world.profile.partition("@")[2]
        self.images("RemoveSecurityProfile", pb.RemoveSecurityProfileRequest(digest=digest))

    @property
    def _other_image(self) -> pb.ImageSpec:
        return pb.ImageSpec(image=self.world.other_image)

    def end(self) -> None:
        """The program ends by itself, and the runtime learns of it."""
        self.await_up()
        if pid := self._pid_of_program():  # none, if an earlier attempt has ended it
            os.kill(pid, signal.SIGTERM)
        self.await_exited()

    def overeat(self) -> None:
        """The program takes more memory than it may, and the kernel ends it."""
        self.await_up()
        self.is_eaten = True
        if pid := self._pid_of_program():  # none, if an earlier attempt has ended it
            os.kill(pid, signal.SIGUSR1)
        self.await_exited()

    def status(self) -> pb.ContainerStatus:
        request = pb.ContainerStatusRequest(container_id=self.container_id)
        answer: pb.ContainerStatusResponse = self.runtime("ContainerStatus", request)
        return answer.status

    def _pid_of_program(self) -> int:
        command = f"sh -c {self._program}"[:60]
        parents, members = leaks.processes(), self.world.members()
        found = [pid for pid in members if leaks.command(pid).startswith(command)]
        return first_of({pid: parents.get(pid, 0) for pid in found})

    # --- waiting ---

    def await_up(self) -> None:
        self._await("the program is not up", (self.world.gate / f"{self.token}.up").exists)

    def await_exited(self) -> None:
        self._await("not EXITED", lambda: self.status().state == pb.CONTAINER_EXITED)

    def _await(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + RETRY_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise Wrong(what)
            time.sleep(0.02)

    def until_it_succeeds(self, what: str, call: Callable[[], None]) -> int:
        """Repeat a call as the kubelet does; returns the number of failures."""
        deadline = time.monotonic() + RETRY_SECONDS
        failures = 0
        while True:
            try:
                call()
            except grpc.RpcError as error:
                if (reason := unclear(error)) or time.monotonic() > deadline:
                    reason = reason or f"{error.code().name}: {error.details()}"
                    raise Wrong(f"retry of {what}: {reason}") from None
                failures += 1
                time.sleep(_RETRY_PAUSE_SECONDS)
            else:
                return failures

    @contextmanager
    def _found_by_name(self, find: Callable[[], bool]) -> Iterator[None]:
        """Take what a call has made whose answer did not come through, as the kubelet finds it by List."""
        try:
            yield
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.ALREADY_EXISTS or not find():
                raise

    def _find_pod(self) -> bool:
        for item in self.runtime("ListPodSandbox", pb.ListPodSandboxRequest()).items:
            if item.metadata.name == self.pod_config.metadata.name:
                self.pod_id = item.id
                return True
        return False

    def _find_container(self) -> bool:
        for item in self.runtime("ListContainers", pb.ListContainersRequest()).containers:
            if item.metadata.name == self.token:
                self.container_id = item.id
                return True
        return False

    def _has_log(self) -> bool:
        """Whether what was heard is in the log, but for lines that could not be written, and were counted."""
        log = (Path(self.pod_config.log_directory) / "main.log").read_text()
        return all(line in log for line in self._heard) or self._dropped_lines() > 0

    def _dropped_lines(self) -> int:
        request = pb.ContainerStatusRequest(container_id=self.container_id, verbose=True)
        info = json.loads(self.runtime("ContainerStatus", request).info["info"])
        return info["log"]["droppedLines"] if info["log"] else 0

    # --- the end ---

    def finish(self) -> None:
        """Bring the container to its end, compare its exit code with what it wrote, and remove all. Raises Wrong."""
        removed = [self.container_id]
        if self.container_id:
            self._finish_container()
        for pod in self._pods():
            self.pod_id = pod
            removed.append(pod)
            self.until_it_succeeds("StopPodSandbox", self.stop_pod)
            self.until_it_succeeds("RemovePodSandbox", self.remove_pod)
        left = self.runtime("ListContainers", pb.ListContainersRequest()).containers
        if left:
            raise Wrong(f"{len(left)} containers are listed")
        if self._watch is not None and (wrong := self._watch.problems(removed)):
            raise Wrong("; ".join(wrong))

    def leave(self) -> None:
        """Leave no thread of ours behind."""
        if self._watch is not None:
            self._watch.close()

    def _pods(self) -> list[str]:
        """All that are there: also one whose id nobody was told."""
        return [p.id for p in self.runtime("ListPodSandbox", pb.ListPodSandboxRequest()).items]

    def _finish_container(self) -> None:
        try:
            state = self.status().state
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.NOT_FOUND:
                return  # removed
            raise
        if state == pb.CONTAINER_CREATED:
            self.until_it_succeeds("StartContainer", self.start)
            state = self.status().state
        if state == pb.CONTAINER_RUNNING and not self.is_program_hit:
            self.await_up()
            self.until_it_succeeds("ExecSync", self.exec)
            self._await("what was heard is not in the log", self._has_log)
        self.until_it_succeeds("StopContainer", self.stop)
        self.await_exited()
        status = self.status()
        wrote = (self.world.gate / f"{self.token}.code").exists()
        if wrote and status.exit_code != CODE and not self.is_program_hit:
            raise Wrong(f"exit code {status.exit_code} ({status.reason}), the program wrote {CODE}")
        if status.exit_code == CODE and not wrote:
            raise Wrong("exit code 7, and the program has not written it")
        if self.is_watched and not self.is_program_hit:
            self._judge(status, wrote=wrote)

    def _judge(self, status: pb.ContainerStatus, *, wrote: bool) -> None:
        """See whether its log has all that it said, and whether an end by the OOM killer is called one."""
        directory = Path(self.pod_config.log_directory)
        logs = [path.read_text() for path in directory.glob("main*") if path.is_file()]
        said = {line.split(" ", 3)[-1] for log in logs for line in log.splitlines()}
        said = {text for text in said if not text.startswith("got ")}
        if wrote and said != _SAYS:
            raise Wrong(f"the log has {sorted(said)}, the program said {sorted(_SAYS)}")
        if self.is_eaten and status.reason != "OOMKilled":
            raise Wrong(f"ended by the OOM killer, and is {status.exit_code} {status.reason}")
