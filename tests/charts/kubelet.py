"""What a kubelet makes of a pod: files and mounts on the node, cgroups, and the CRI's messages.

The paths, modes, defaults and the order of things are those of Kubernetes 1.37; its cgroups are below one of the test's
own.
"""

from __future__ import annotations

import os
import re
import shlex
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

from nodeagent.api import runtime_pb2 as pb
from tests.charts.chart import Chart, Json
from tests.charts.node import NAME
from tests.support import slices

PODS = "/var/lib/kubelet/pods"
LOGS = "/var/log/pods"
CGROUPS = Path("/sys/fs/cgroup")
HAS_SELINUX = Path("/sys/fs/selinux/enforce").exists()
CLUSTER_DNS, CLUSTER_DOMAIN = "10.96.0.10", "cluster.local"
MASKED = [
    *(
        f"/proc/{name}"
        for name in "asound acpi interrupts kcore keys latency_stats timer_list timer_stats".split()
    ),
    *("/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap"),
]
READONLY = [f"/proc/{name}" for name in ("bus", "fs", "irq", "sys", "sysrq-trigger")]
TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"
TERMINATION_LOG = "/dev/termination-log"
CAPACITY_BYTES = 16 << 30
IDS = pb.IDMapping(host_id=7 * 65_536, container_id=0, length=65_536)

_PROPAGATION = {
    "None": pb.PROPAGATION_PRIVATE,
    "HostToContainer": pb.PROPAGATION_HOST_TO_CONTAINER,
    "Bidirectional": pb.PROPAGATION_BIDIRECTIONAL,
}
_PROFILE = {
    "RuntimeDefault": pb.SecurityProfile.RuntimeDefault,
    "Unconfined": pb.SecurityProfile.Unconfined,
    "Localhost": pb.SecurityProfile.Localhost,
}
_QUANTITY = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


class Kubelet:
    """A kubelet of one pod. cgroup_root: where its cgroups are. user_namespace: own, as with `hostUsers: false`."""

    def __init__(self, chart: Chart, cgroup_root: str, *, user_namespace: bool = False) -> None:
        self.chart = chart
        self.directory = f"{PODS}/{chart.uid}"
        self.log_directory = f"{LOGS}/{chart.namespace}_{chart.pod_name}_{chart.uid}"
        self.cgroup = slices.place(f"{cgroup_root}/{self._qos}pod{chart.uid}")
        self._ids = [IDS] if user_namespace else []
        self._volumes = {volume["name"]: volume for volume in chart.spec.get("volumes", ())}

    # --- files of the node ---

    def set_up(self) -> str:
        """A script that makes what the pod's requests name."""
        lines = [f"mkdir -p -m 0755 {self.log_directory} {self.directory}"]
        lines.append(f"printf '127.0.0.1\\tlocalhost\\n' > {self.directory}/etc-hosts")
        if self._has_token:
            lines += _files(self._token, ["token", "ca.crt", "namespace"], 0o644, memory=True)
        for volume in self._volumes.values():
            lines += self._volume(volume)
        for container in self.chart.all_containers:
            name = container["name"]
            lines.append(f"mkdir -p {self.directory}/containers/{name}")
            lines.append(f": > {self._termination_log(name)}")
            lines.append(f"chmod 0666 {self._termination_log(name)}")
            for number, mount in enumerate(container.get("volumeMounts", ())):
                if "subPath" in mount:
                    lines += self._sub_path(container, number, mount)
        return "\n".join(lines)

    def tear_down(self) -> str:
        """A script that undoes it; what the pod has left mounted in its own directory is an error."""
        return "\n".join(
            (
                f"awk '$5 ~ \"^{self.directory}/\" {{ print $5 }}' /proc/self/mountinfo | tac | xargs -r umount",
                f"rm -rf --one-file-system {self.directory} {self.log_directory}",
            )
        )

    def _volume(self, volume: Json) -> Iterator[str]:
        path = self._volume_path(volume)
        group = self._fs_group
        if "hostPath" in volume:
            yield from _host_path(path, volume["hostPath"].get("type", ""))
        elif "emptyDir" in volume:
            yield f"mkdir -p {path}; chmod 0777 {path}"
            if volume["emptyDir"].get("medium") == "Memory":
                yield f"mount -t tmpfs -o mode=777 tmpfs {path}"
            if group is not None:
                yield f"chgrp {group} {path}; chmod 2777 {path}"
        elif "persistentVolumeClaim" in volume:
            yield f"mkdir -p {path}"
            if group is not None:
                yield f"chgrp {group} {path}; chmod 2775 {path}"
        else:
            kind = next(kind for kind in ("configMap", "secret", "projected") if kind in volume)
            given = volume[kind]
            mode = given.get("defaultMode", 0o644)
            yield from _files(path, given["keys"], mode, memory=kind != "configMap", group=group)

    def _sub_path(self, container: Json, number: int, mount: Json) -> Iterator[str]:
        source = f"{self._volume_path(self._volumes[mount['name']])}/{mount['subPath']}"
        target = self._sub_path_mount(container, number, mount)
        yield f"mkdir -p {os.path.dirname(target)}"
        yield f"[ -e {source} ] || mkdir -m 0777 {source}"
        yield f"if [ -d {source} ]; then mkdir -p {target}; else : > {target}; fi"
        yield f"mount --bind {source} {target}"

    def _sub_path_mount(self, container: Json, number: int, mount: Json) -> str:
        return f"{self.directory}/volume-subpaths/{mount['name']}/{container['name']}/{number}"

    def _volume_path(self, volume: Json) -> str:
        if "hostPath" in volume:
            return str(volume["hostPath"]["path"])
        plugin = {
            "emptyDir": "empty-dir",
            "configMap": "configmap",
            "secret": "secret",
            "projected": "projected",
            "persistentVolumeClaim": "local-volume",
        }
        kind = next(kind for kind in plugin if kind in volume)
        return f"{self.directory}/volumes/kubernetes.io~{plugin[kind]}/{volume['name']}"

    @property
    def _token(self) -> str:
        return f"{self.directory}/volumes/kubernetes.io~projected/kube-api-access-x7k2p"

    @property
    def _has_token(self) -> bool:
        return bool(self.chart.spec.get("automountServiceAccountToken", True))

    def _termination_log(self, container: str) -> str:
        return f"{self.directory}/containers/{container}/0badc0de"

    @property
    def _fs_group(self) -> int | None:
        group: int | None = self.chart.spec.get("securityContext", {}).get("fsGroup")
        return group

    # --- cgroups ---

    @property
    def _qos(self) -> str:
        """The directory of its class: only what has the same limits as requests is Guaranteed."""
        given = [container.get("resources", {}) for container in self.chart.all_containers]
        if not any(given):
            return "kubepods/besteffort/"
        guaranteed = all(
            resources.get("limits", {}).keys() == {"cpu", "memory"}
            and resources.get("requests", resources["limits"]) == resources["limits"]
            for resources in given
        )
        return "kubepods/" if guaranteed else "kubepods/burstable/"

    # --- RunPodSandbox ---

    def sandbox(self) -> pb.PodSandboxConfig:
        chart = self.chart
        names = {
            "io.kubernetes.pod.name": chart.pod_name,
            "io.kubernetes.pod.namespace": chart.namespace,
            "io.kubernetes.pod.uid": chart.uid,
        }
        return pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(
                name=chart.pod_name, uid=chart.uid, namespace=chart.namespace
            ),
            hostname="" if chart.on_node_network else chart.host_name,
            log_directory=self.log_directory,
            dns_config=self._dns(),
            port_mappings=self._port_mappings(),
            labels=chart.metadata.get("labels", {}) | names,
            annotations=chart.metadata.get("annotations", {})
            | {"kubernetes.io/config.source": "api", "kubernetes.io/config.seen": "2026-01-01"},
            linux=pb.LinuxPodSandboxConfig(
                cgroup_parent=self.cgroup,
                security_context=self._pod_security(),
                sysctls={
                    entry["name"]: entry["value"]
                    for entry in chart.spec.get("securityContext", {}).get("sysctls", ())
                },
                overhead=pb.LinuxContainerResources(),
                resources=self._pod_resources(),
            ),
        )

    def _dns(self) -> pb.DNSConfig:
        searches = [f"{self.chart.namespace}.svc.{CLUSTER_DOMAIN}", f"svc.{CLUSTER_DOMAIN}"]
        return pb.DNSConfig(
            servers=[CLUSTER_DNS], searches=[*searches, CLUSTER_DOMAIN], options=["ndots:5"]
        )

    def _port_mappings(self) -> Iterator[pb.PortMapping]:
        """On the node's network the API has set the host port of each to the container's."""
        for container in self.chart.containers:
            for port in container.get("ports", ()):
                usual = port["containerPort"] if self.chart.on_node_network else 0
                yield pb.PortMapping(
                    protocol=port.get("protocol", "TCP"),
                    container_port=port["containerPort"],
                    host_port=port.get("hostPort", usual),
                )

    def _pod_security(self) -> pb.LinuxSandboxSecurityContext:
        given = self.chart.spec.get("securityContext", {})
        context = pb.LinuxSandboxSecurityContext(
            namespace_options=self._namespaces(),
            privileged=any(
                container.get("securityContext", {}).get("privileged", False)
                for container in self.chart.all_containers
            ),
            supplemental_groups=self._groups,
            seccomp=pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault),
        )
        _set_user(context, given)
        if "seLinuxOptions" in given:
            context.selinux_options.MergeFrom(pb.SELinuxOption(**given["seLinuxOptions"]))
        return context

    def _namespaces(self) -> pb.NamespaceOption:
        spec = self.chart.spec
        shared = pb.POD if spec.get("shareProcessNamespace") else pb.CONTAINER
        return pb.NamespaceOption(
            network=pb.NODE if spec.get("hostNetwork") else pb.POD,
            pid=pb.NODE if spec.get("hostPID") else shared,
            ipc=pb.NODE if spec.get("hostIPC") else pb.POD,
            userns_options=pb.UserNamespace(
                mode=pb.POD if self._ids else pb.NODE, uids=self._ids, gids=self._ids
            ),
        )

    @property
    def _groups(self) -> list[int]:
        given = self.chart.spec.get("securityContext", {})
        first = [self._fs_group] if self._fs_group is not None else []
        return [*first, *given.get("supplementalGroups", ())]

    def _pod_resources(self) -> pb.LinuxContainerResources:
        given = [container.get("resources", {}) for container in self.chart.containers]
        resources = pb.LinuxContainerResources(
            cpu_period=100_000, cpu_shares=_shares(sum(map(_cpu_request, given)))
        )
        limits = [each.get("limits", {}) for each in given]
        if all("cpu" in each for each in limits):
            resources.cpu_quota = sum(_milli(each["cpu"]) for each in limits) * 100
        if all("memory" in each for each in limits):
            resources.memory_limit_in_bytes = sum(_bytes(each["memory"]) for each in limits)
        return resources

    # --- CreateContainer ---

    def container(self, spec: Json, image: str, pod_ip: str) -> pb.ContainerConfig:
        name = spec["name"]
        chart = self.chart
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name),
            image=pb.ImageSpec(image=image, user_specified_image=image),
            working_dir=spec.get("workingDir", ""),
            envs=list(self._envs(spec, pod_ip)),
            mounts=list(self._mounts(spec)),
            labels={
                "io.kubernetes.container.name": name,
                "io.kubernetes.pod.name": chart.pod_name,
                "io.kubernetes.pod.namespace": chart.namespace,
                "io.kubernetes.pod.uid": chart.uid,
            },
            annotations={
                "io.kubernetes.container.hash": "3f2a91c8",
                "io.kubernetes.container.restartCount": "0",
                "io.kubernetes.container.terminationMessagePath": TERMINATION_LOG,
                "io.kubernetes.container.terminationMessagePolicy": spec.get(
                    "terminationMessagePolicy", "File"
                ),
                "io.kubernetes.pod.terminationGracePeriod": str(chart.grace_seconds),
            },
            log_path=f"{name}/0.log",
            stdin=spec.get("stdin", False),
            tty=spec.get("tty", False),
            linux=pb.LinuxContainerConfig(
                resources=self._resources(spec), security_context=self._security(spec)
            ),
        )
        self._command(config, spec)
        return config

    def _command(self, config: pb.ContainerConfig, spec: Json) -> None:
        """The program of an image is ours: it serves the ports that it is given, and ends when it is told."""
        ports = [str(port) for port in self.chart.ports(spec)]
        ports += [
            f"{port['containerPort']}/udp"
            for port in spec.get("ports", ())
            if port.get("protocol") == "UDP"
        ]
        if spec not in self.chart.staying:
            config.command.extend(["sh", "-ec", spec.get("does", ":")])
            return
        if "does" in spec:
            config.command.extend(["sh", "-ec", f'{spec["does"]}\nexec /stand-in "$@"', "sh"])
        elif "program" in spec:
            config.command.append(spec["program"])
        config.args.extend(ports)

    def _envs(self, spec: Json, pod_ip: str) -> Iterator[pb.KeyValue]:
        known = {
            "nodeName": NAME,
            "podName": self.chart.pod_name,
            "namespace": self.chart.namespace,
            "podIP": pod_ip or "127.0.0.1",
        }
        service = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
        for key, value in (spec.get("env", {}) | service).items():
            text = string.Template(value).substitute(known)
            yield pb.KeyValue(key=key, value=text.encode())

    def _mounts(self, spec: Json) -> Iterator[pb.Mount]:
        """Each with the mapping of the pod's ids, where it has one; what is the pod's own is to be relabelled."""
        for mount in self._all_mounts(spec):
            mount.selinux_relabel = HAS_SELINUX and mount.host_path.startswith(f"{self.directory}/")
            mount.uidMappings.extend(self._ids)
            mount.gidMappings.extend(self._ids)
            yield mount

    def _all_mounts(self, spec: Json) -> Iterator[pb.Mount]:
        given = spec.get("volumeMounts", ())
        for number, mount in enumerate(given):
            source = self._volume_path(self._volumes[mount["name"]])
            if "subPath" in mount:
                source = self._sub_path_mount(spec, number, mount)
            yield pb.Mount(
                container_path=mount["mountPath"],
                host_path=source,
                readonly=mount.get("readOnly", False),
                propagation=_PROPAGATION[mount.get("mountPropagation", "None")],
            )
        if self._has_token:
            yield pb.Mount(container_path=TOKEN, host_path=self._token, readonly=True)
        if "/etc/hosts" not in [mount["mountPath"] for mount in given]:
            yield pb.Mount(container_path="/etc/hosts", host_path=f"{self.directory}/etc-hosts")
        yield pb.Mount(
            container_path=TERMINATION_LOG, host_path=self._termination_log(spec["name"])
        )

    def _security(self, spec: Json) -> pb.LinuxContainerSecurityContext:
        given = self.chart.security(spec)
        privileged = given.get("privileged", False)
        context = pb.LinuxContainerSecurityContext(
            privileged=privileged,
            namespace_options=self._namespaces(),
            readonly_rootfs=given.get("readOnlyRootFilesystem", False),
            supplemental_groups=self._groups,
            no_new_privs=not given.get("allowPrivilegeEscalation", True),
            masked_paths=MASKED,
            readonly_paths=READONLY,
            seccomp=_profile(given.get("seccompProfile", {"type": "Unconfined"})),
        )
        if "capabilities" in given:
            context.capabilities.add_capabilities.extend(given["capabilities"].get("add", ()))
            context.capabilities.drop_capabilities.extend(given["capabilities"].get("drop", ()))
        if "appArmorProfile" in given:
            context.apparmor.MergeFrom(_profile(given["appArmorProfile"]))
            if given["appArmorProfile"]["type"] == "Unconfined":
                context.apparmor_profile = "unconfined"
        if "seLinuxOptions" in given:
            context.selinux_options.MergeFrom(pb.SELinuxOption(**given["seLinuxOptions"]))
        _set_user(context, given)
        user = spec.get("image", {}).get("User", "")
        if "runAsUser" not in given and user:
            name = user.partition(":")[0]
            if name.isdecimal():
                context.run_as_user.value = int(name)
            else:
                context.run_as_username = name
        elif "runAsUser" not in given:
            context.run_as_user.value = 0
        return context

    def _resources(self, spec: Json) -> pb.LinuxContainerResources:
        given = spec.get("resources", {})
        limits = given.get("limits", {})
        resources = pb.LinuxContainerResources(
            cpu_period=100_000,
            cpu_shares=_shares(_cpu_request(given)),
            oom_score_adj=self._oom_score_adj(given),
            hugepage_limits=[pb.HugepageLimit(page_size=size, limit=0) for size in _page_sizes()],
        )
        if "cpu" in limits:
            resources.cpu_quota = max(1000, _milli(limits["cpu"]) * 100)
        if "memory" in limits:
            resources.memory_limit_in_bytes = _bytes(limits["memory"])
        if (CGROUPS / "cgroup.controllers").exists():
            resources.unified.update({"memory.oom.group": "1", "memory.swap.max": "0"})
            resources.unified.update({"memory.min": "0", "memory.low": "0"})
            if not (CGROUPS / self.cgroup[1:] / "memory.swap.max").exists():
                del resources.unified["memory.swap.max"]
        elif "memory" in limits and (CGROUPS / "memory/memory.memsw.usage_in_bytes").exists():
            resources.memory_swap_limit_in_bytes = _bytes(limits["memory"])
        return resources

    def _oom_score_adj(self, given: Json) -> int:
        if self.chart.spec.get("priorityClassName") == "system-node-critical":
            return -997
        if "besteffort" in self._qos:
            return 1000
        request = _bytes(_requests(given).get("memory", "0"))
        return min(999, max(3, 1000 - 1000 * request // CAPACITY_BYTES))


def _files(
    path: str, keys: Sequence[str], mode: int, *, memory: bool, group: int | None = None
) -> Iterator[str]:
    """A volume of files, as the kubelet's atomic writer makes it."""
    data = f"{path}/..2026_01_01"
    yield f"mkdir -p {path}"
    if memory:
        yield f"mount -t tmpfs -o mode=777 tmpfs {path}"
    yield f"chmod 0777 {path}; mkdir {data}; ln -s ..2026_01_01 {path}/..data"
    for key in keys:
        yield f"echo {shlex.quote(f'{key} of {os.path.basename(path)}')} > {data}/{key}"
        yield f"chmod {mode | (0o040 if group is not None else 0):o} {data}/{key}"
        yield f"ln -s ..data/{key} {path}/{key}"
    if group is not None:
        yield f"chgrp -R {group} {path}; chmod g+s {path} {data}"


def _host_path(path: str, kind: str) -> Iterator[str]:
    """What the kubelet makes or checks before it asks for the container."""
    quoted = shlex.quote(path)
    tests = {"Directory": "-d", "File": "-f", "Socket": "-S", "CharDevice": "-c"}
    if kind == "DirectoryOrCreate":
        yield f"mkdir -p -m 0755 {quoted}"
    elif kind == "FileOrCreate":
        yield f"[ -e {quoted} ] || {{ : > {quoted}; chmod 0644 {quoted}; }}"
    elif kind:
        yield f"test {tests[kind]} {quoted}"


def _profile(given: Json) -> pb.SecurityProfile:
    return pb.SecurityProfile(profile_type=_PROFILE[given["type"]])


def _set_user(
    context: pb.LinuxSandboxSecurityContext | pb.LinuxContainerSecurityContext, given: Json
) -> None:
    if "runAsUser" in given:
        context.run_as_user.value = given["runAsUser"]
    if "runAsGroup" in given and ("runAsUser" in given):
        context.run_as_group.value = given["runAsGroup"]


def _cpu_request(resources: Json) -> int:
    return _milli(_requests(resources).get("cpu", "0"))


def _requests(resources: Json) -> Json:
    """What is requested is what it is limited to, where nothing else is said."""
    given: Json = resources["requests"] if "requests" in resources else resources.get("limits", {})
    return given


def _shares(milli: int) -> int:
    return max(2, milli * 1024 // 1000)


def _milli(text: str) -> int:
    return int(text.removesuffix("m")) * (1 if text.endswith("m") else 1000)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)(|Ki|Mi|Gi)", text)
    assert found is not None, text
    return int(found[1]) * _QUANTITY[found[2]]


def _page_sizes() -> Iterator[str]:
    folder = Path("/sys/kernel/mm/hugepages")
    for entry in sorted(folder.iterdir()) if folder.exists() else ():
        kib = int(entry.name.removeprefix("hugepages-").removesuffix("kB"))
        yield f"{kib >> 20}GB" if kib >= 1 << 20 else f"{kib >> 10}MB"
