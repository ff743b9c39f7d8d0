"""The life of a chart's pod, in the order and with the calls of a kubelet, and what it can be asked."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from nodeagent.api import runtime_pb2 as pb
from tests.charts import cgroups, images
from tests.charts.chart import Chart, Json, exec_commands
from tests.charts.kubelet import Kubelet
from tests.charts.node import Node
from tests.support import cri
from tests.support.node import PATIENCE_SECONDS, wait_for

SMALL_QUOTA_USEC = 10_000  # of a period of 100 ms


class Container(cri.Container):
    """Its log is a file of the node."""

    def serves(self) -> None:
        """Return once its program says so; one that has ended before never will."""
        name = self.config.metadata.name
        wait_for(f"{name} serves", lambda: self._has_said("serving") or self._has_ended())
        assert self._has_said("serving"), (name, self.status.exit_code, self.output)

    @property
    def output(self) -> str:
        """The output, as that of any container; a terminal's lines have carriage returns in them."""
        lines = self.log.read_bytes().decode().split("\n")[:-1]
        return "\n".join(line.split(" ", 3)[3] for line in lines)

    def _has_said(self, text: str) -> bool:
        return self.log.exists() and text in self.output

    def _has_ended(self) -> bool:
        return bool(self.status.state == cri.EXITED)

    @property
    def log(self) -> Path:
        node = self.pod.cri.agent
        assert isinstance(node, Node)
        directory = self.pod.config.log_directory
        return Path(f"/proc/{node.first}/root{directory}/{self.config.log_path}")


@dataclass(slots=True)
class ChartPod:
    """The pod of one chart. The containers are those that were started last, by name."""

    chart: Chart
    node: Node
    kubelet: Kubelet
    containers: dict[str, Container] = field(default_factory=dict)
    pod: cri.Pod | None = None

    @classmethod
    def of(
        cls, chart: Chart, node: Node, cgroup_root: str, *, user_namespace: bool = False
    ) -> ChartPod:
        kubelet = Kubelet(chart, cgroup_root, user_namespace=user_namespace)
        return cls(chart, node, kubelet)

    @property
    def address(self) -> str:
        """Where the kubelet's probes find it."""
        return "127.0.0.1" if self.chart.on_node_network else self.sandbox.ip

    @property
    def sandbox(self) -> cri.Pod:
        assert self.pod is not None
        return self.pod

    def run(self) -> None:
        """RunPodSandbox, the init containers in their order, then all others."""
        cgroups.make(self.kubelet.cgroup)
        self.node.shell(self.kubelet.set_up())
        config = self.kubelet.sandbox()
        request = pb.RunPodSandboxRequest(config=config)
        answer = self.node.runtime.RunPodSandbox(request, timeout=PATIENCE_SECONDS)
        client = cri.Cri(self.node, "", Path(config.log_directory))
        self.pod = cri.Pod(client, config, answer.pod_sandbox_id)
        assert bool(self.pod.ip) != self.chart.on_node_network
        for spec in self.chart.init_containers:
            container = self._start(spec)
            if spec in self.chart.sidecars:
                self._hook(container, spec, "postStart")
                container.serves()
            else:
                status = container.ended()
                assert status.exit_code == 0, (spec["name"], container.output)
        for spec in self.chart.containers:
            container = self._start(spec)
            self._hook(container, spec, "postStart")
        for spec in self.chart.containers:
            self.containers[spec["name"]].serves()
            self._resize(self.containers[spec["name"]])

    def _resize(self, container: Container) -> None:
        """To no quota, of one that is so small that whatever is looked at would take seconds."""
        quota = container.config.linux.resources.cpu_quota
        if 0 < quota < SMALL_QUOTA_USEC:
            assert container.status.resources.linux.cpu_quota == quota
            limits = pb.LinuxContainerResources(cpu_quota=-1)
            request = pb.UpdateContainerResourcesRequest(container_id=container.id, linux=limits)
            self.node.runtime.UpdateContainerResources(request, timeout=PATIENCE_SECONDS)

    def _start(self, spec: Json) -> Container:
        name = images.reference(spec.get("image", {}))
        status = self.node.images.ImageStatus(
            pb.ImageStatusRequest(image=pb.ImageSpec(image=name)), timeout=PATIENCE_SECONDS
        )
        assert status.HasField("image"), name
        config = self.kubelet.container(spec, status.image.id, self.sandbox.ip)
        self.node.shell(
            f"mkdir -p {os.path.dirname(f'{self.kubelet.log_directory}/{config.log_path}')}"
        )
        request = pb.CreateContainerRequest(
            pod_sandbox_id=self.sandbox.id, config=config, sandbox_config=self.sandbox.config
        )
        answer = self.node.runtime.CreateContainer(request, timeout=PATIENCE_SECONDS)
        container = Container(self.sandbox, config, answer.container_id)
        container.start()
        self.containers[spec["name"]] = container
        return container

    def probe(self) -> None:
        """Every probe once: commands in the containers, the rest from the node to the pod's address."""
        urls = []
        for spec in self.chart.staying:
            for command in exec_commands(spec):
                answer = self.containers[spec["name"]].exec(*command, timeout=10)
                said = " ".join([os.path.basename(command[0]), *command[1:]])
                assert (answer.exit_code, answer.stdout.decode().strip()) == (0, said), answer
            urls += [f"{port}{path}" for port, path in self.chart.network_probes(spec)]
            urls += [f"{port}/" for port in self.chart.ports(spec)]
        if urls:
            found = [f"http://{self.address}:{url}" for url in urls]
            answered = self.node.run("curl", "-sS", "--fail", "--max-time", "20", *found)
            assert answered == "ok\n" * len(urls)

    def stop(self) -> None:
        """preStop, SIGTERM and the grace period for all containers at once; then those that were sidecars."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._stop, self.chart.containers))
        for spec in reversed(self.chart.sidecars):
            self._stop(spec)
        for _ in range(2):  # the kubelet asks again before it removes
            self.sandbox.stop()

    def _stop(self, spec: Json) -> None:
        container = self.containers[spec["name"]]
        self._hook(container, spec, "preStop")
        container.stop(self.chart.grace_seconds)
        status = container.status
        assert (status.state, status.exit_code) == (cri.EXITED, 0), status
        assert "terminated" in container.output

    def _hook(self, container: Container, spec: Json, name: str) -> None:
        hook = spec.get("lifecycle", {}).get(name)
        if hook is not None:
            assert container.exec(*hook["exec"]["command"], timeout=0).exit_code == 0

    def remove(self) -> None:
        """All of the pod, whatever has become of it."""
        if self.pod is not None:
            for container in self.containers.values():
                container.remove()
            self.pod.remove()
        self.node.shell(self.kubelet.tear_down())
        wait_for("end of the pod's cgroup", lambda: _removed(self.kubelet.cgroup))


def _removed(cgroup: str) -> bool:
    try:
        cgroups.remove(cgroup)
    except OSError:
        return False
    return True
