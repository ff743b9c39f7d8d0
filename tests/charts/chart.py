"""The charts' data: a TOML file each, with the pod as its public manifest has it, and what of it can be seen.

    source, version     where the pod's fields and values are from
    [metadata], [spec]  of the pod, in the words of Kubernetes; what only the scheduler or the API reads is left out

Of a volume's configMap, secret or projected sources, `keys` has the names of the files. An environment variable may
have names of the node and the pod in it: ${nodeName}, ${podName}, ${namespace}, ${podIP}. A container has besides, of
ours:

    image       what its image says: User, Volumes, StopSignal; systemd = true: it has this machine's systemd
    does        what it does in the place of the program, as a script; a regular container then serves its ports
    program     what serves them, where it is not the usual one of the image
    serves      its ports, where they are not those that it declares and those of its probes

    remounts    true where that changes the propagation of its own mounts

    [[see]]     what a shell prints (says, a regular expression) in a container, or on the node ("node"), in this order
    needs       what the machine must have, or the chart is skipped here: a file; cgroups = "v2"
    leaves      mount points that stay on the node when the pod is gone, until the test removes them
"""

from __future__ import annotations

import functools
import tomllib
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"

Json = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    name: str
    source: str
    version: str
    metadata: Json
    spec: Json
    needs: Json
    see: tuple[Json, ...]
    leaves: tuple[str, ...]

    @property
    def lacking(self) -> str:
        """What this machine has not got of what the chart needs; "" for nothing."""
        if (file := self.needs.get("file")) and not Path(file).exists():
            return str(file)
        is_v2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
        return "cgroup v2" if self.needs.get("cgroups") == "v2" and not is_v2 else ""

    @property
    def uid(self) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, self.name))

    @property
    def pod_name(self) -> str:
        return str(self.metadata["name"])

    @property
    def host_name(self) -> str:
        """The host name of a pod with a network of its own."""
        return str(self.spec.get("hostname", self.pod_name)[:63])

    @property
    def namespace(self) -> str:
        return str(self.metadata["namespace"])

    @property
    def init_containers(self) -> list[Json]:
        return list(self.spec.get("initContainers", ()))

    @property
    def containers(self) -> list[Json]:
        return list(self.spec["containers"])

    @property
    def sidecars(self) -> list[Json]:
        """Init containers that stay."""
        return [spec for spec in self.init_containers if spec.get("restartPolicy") == "Always"]

    @property
    def staying(self) -> list[Json]:
        """All that run as long as the pod does."""
        return [*self.sidecars, *self.containers]

    @property
    def all_containers(self) -> list[Json]:
        return [*self.init_containers, *self.containers]

    @property
    def on_node_network(self) -> bool:
        return bool(self.spec.get("hostNetwork"))

    @property
    def grace_seconds(self) -> int:
        """What the kubelet gives: never less than two seconds."""
        return max(2, int(self.spec.get("terminationGracePeriodSeconds", 30)))

    @property
    def takes_a_user_namespace(self) -> bool:
        """Whether it wants nothing of the node's: no namespace, no path, no more rights than any pod."""
        shared = any(self.spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))
        paths = any("hostPath" in volume for volume in self.spec.get("volumes", ()))
        privileged = any(self.security(spec).get("privileged") for spec in self.all_containers)
        return not (shared or paths or privileged)

    def security(self, container: Json) -> Json:
        """The container's security context over the pod's."""
        pod = self.spec.get("securityContext", {})
        return {**pod, **container.get("securityContext", {})}

    def ports(self, container: Json) -> list[int]:
        """The TCP ports that the stand-in serves."""
        if "serves" in container:
            return list(container["serves"])
        declared = {
            int(port["containerPort"])
            for port in container.get("ports", ())
            if port.get("protocol", "TCP") == "TCP"
        }
        return sorted(declared | {port for port, _ in self.network_probes(container)})

    def network_probes(self, container: Json) -> set[tuple[int, str]]:
        """Port and path of each probe that the kubelet makes over the network."""
        found = set()
        for probe in probes(container):
            for kind in ("httpGet", "tcpSocket", "grpc"):
                if kind in probe:
                    port = self._port(container, probe[kind]["port"])
                    found.add((port, probe[kind].get("path", "/")))
        return found

    def _port(self, container: Json, named: int | str) -> int:
        if isinstance(named, int):
            return named
        ports = {port.get("name"): port["containerPort"] for port in container["ports"]}
        return int(ports[named])


def probes(container: Json) -> list[Json]:
    kinds = ("startupProbe", "livenessProbe", "readinessProbe")
    return [container[kind] for kind in kinds if kind in container]


def exec_commands(container: Json) -> list[list[str]]:
    """What the kubelet executes in a container: probes and hooks."""
    hooks = container.get("lifecycle", {}).values()
    return [entry["exec"]["command"] for entry in (*probes(container), *hooks) if "exec" in entry]


@functools.cache
def charts() -> tuple[Chart, ...]:
    return tuple(_read(path) for path in sorted(DATA.glob("*.toml")))


def _read(path: Path) -> Chart:
    data = tomllib.loads(path.read_text())
    return Chart(
        name=path.stem,
        source=data["source"],
        version=data["version"],
        metadata=data["metadata"],
        spec=data["spec"],
        needs=data.get("needs", {}),
        see=tuple(data.get("see", ())),
        leaves=tuple(data.get("leaves", ())),
    )
