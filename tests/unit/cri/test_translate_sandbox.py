"""PodSandboxConfig to record: every field arrives or is refused by its name."""

import msgspec
import pytest
from google.protobuf.message import Message

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri.translate_sandbox import sandbox_config
from nodeagent.errors import InvalidArgument, Unsupported
from nodeagent.requests import (
    DNS,
    IdMapping,
    Namespaces,
    PortMapping,
    Profile,
    Resources,
    SandboxConfig,
    SELinux,
    UserNamespace,
)
from tests.unit.cri import samples

OVERHEAD = Resources(
    cpu_period_usec=50_000, cpu_quota_usec=25_000, cpu_shares=512, memory_limit_bytes=1 << 20
)
LIMITS = Resources(
    cpu_period_usec=50_000,
    cpu_quota_usec=25_000,
    cpu_shares=512,
    memory_limit_bytes=1 << 20,
    memory_swap_limit_bytes=2 << 20,
    oom_score_adj=-5,
    cpuset_cpus="0-3,7",
    cpuset_mems="0",
    hugepage_limits={"2MB": 4096},
    unified={"memory.high": "max"},
)


def test_every_field_arrives() -> None:
    assert sandbox_config(samples.sandbox()) == SandboxConfig(
        name="web",
        uid="u-1",
        namespace="default",
        attempt=3,
        hostname="web-0",
        log_directory="/var/log/pods/web",
        dns=DNS(servers=("10.0.0.10",), searches=("svc.local",), options=("ndots:5",)),
        port_mappings=(
            PortMapping(protocol="udp", container_port=53, host_port=5353, host_ip="127.0.0.1"),
        ),
        labels={"app": "web"},
        annotations={"note": "two\nlines"},
        cgroup_parent="/kubepods/podu-1",
        namespaces=Namespaces(
            network="pod",
            pid="container",
            ipc="pod",
            user=UserNamespace(
                mode="pod",
                uids=(IdMapping(inside=0, outside=65_536, length=65_536),),
                gids=(IdMapping(inside=0, outside=131_072, length=65_536),),
            ),
        ),
        sysctls={"net.ipv4.tcp_syncookies": "1"},
        privileged=True,
        readonly_rootfs=True,
        run_as_user=1000,
        run_as_group=1001,
        supplemental_groups=(5, 6),
        groups_policy="strict",
        seccomp=Profile(kind="localhost", ref="/p.json"),
        apparmor=Profile(kind="localhost", ref="mine"),
        selinux=SELinux(user="u", role="r", type="t", level="s0:c1,c2"),
        overhead=OVERHEAD,
        resources=msgspec.structs.replace(LIMITS, oom_score_adj=0),
    )


# Those that the sample cannot have beside others, or has at their zero value, and those that are refused.
ELSEWHERE = {
    "linux.resources.oom_score_adj",
    "linux.overhead.memory_swap_limit_in_bytes",
    "linux.overhead.oom_score_adj",
    "linux.overhead.cpuset_cpus",
    "linux.overhead.cpuset_mems",
    "linux.overhead.hugepage_limits.page_size",
    "linux.overhead.hugepage_limits.limit",
    "linux.overhead.unified",
    "linux.security_context.seccomp_profile_path",
    "linux.security_context.seccomp.oci_ref",
    "linux.security_context.seccomp.base_profile.type",
    "linux.security_context.seccomp.base_profile.localhost_ref",
    "linux.security_context.apparmor.oci_ref",
    "linux.security_context.apparmor.base_profile.type",
    "linux.security_context.apparmor.base_profile.localhost_ref",
    "linux.security_context.namespace_options.cgroupns_options.mode",
    "linux.security_context.namespace_options.network",
    "linux.security_context.namespace_options.ipc",
    "linux.security_context.namespace_options.target_id",
    "linux.security_context.namespace_options.userns_options.mode",
    "linux.security_context.namespace_options.userns_options.uids.container_id",
    "linux.security_context.namespace_options.userns_options.gids.container_id",
}


@pytest.mark.parametrize("path", list(samples.leaves(pb.PodSandboxConfig.DESCRIPTOR)))
def test_no_field_is_forgotten(path: str) -> None:
    if path.startswith("windows.") or path in ELSEWHERE:
        return
    config = samples.sandbox()
    assert samples.without(config, path), "the sample has not got this field"
    assert changes_or_is_refused(config)


def changes_or_is_refused(config: pb.PodSandboxConfig) -> bool:
    try:
        return sandbox_config(config) != sandbox_config(samples.sandbox())
    except InvalidArgument:
        return True


def test_the_least_config() -> None:
    assert sandbox_config(samples.simple_sandbox()) == SandboxConfig(
        name="web", uid="u-1", namespace="default", namespaces=Namespaces(pid="pod")
    )


def test_windows_is_unsupported() -> None:
    with pytest.raises(Unsupported, match=r"config\.windows"):
        sandbox_config(samples.simple_sandbox(windows=pb.WindowsPodSandboxConfig()))


def test_paths_are_shortened_and_labels_kept() -> None:
    labels = {"": "\x00", "ключ": "значение ", "a b": "\n"}
    config = sandbox_config(
        samples.simple_sandbox(log_directory="//var/./log/", labels=labels, annotations=labels)
    )
    assert config.log_directory == "/var/log"
    assert config.labels == config.annotations == labels


def test_a_slice_by_its_name() -> None:
    linux = pb.LinuxPodSandboxConfig(cgroup_parent="kubepods-pod1.slice")
    config = sandbox_config(samples.simple_sandbox(linux=linux))
    assert config.cgroup_parent == "/kubepods-pod1.slice"


def test_a_mapping_without_host_port_is_kept() -> None:
    config = sandbox_config(
        samples.simple_sandbox(port_mappings=[pb.PortMapping(container_port=80)])
    )
    assert config.port_mappings == (PortMapping(protocol="tcp", container_port=80, host_port=0),)


def test_ports_on_the_nodes_network_are_what_they_are() -> None:
    mappings = [pb.PortMapping(container_port=80), pb.PortMapping(container_port=81, host_port=81)]
    ports = sandbox_config(on_node(port_mappings=mappings)).port_mappings
    assert [port.host_port for port in ports] == [0, 81]


def test_network_and_ipc_of_the_node() -> None:
    options = pb.NamespaceOption(network=pb.NODE, ipc=pb.NODE, pid=pb.NODE)
    config = sandbox_config(samples.in_sandbox(namespace_options=options))
    assert config.namespaces == Namespaces(network="node", ipc="node", pid="node")


def test_user_namespace_of_the_node() -> None:
    options = pb.NamespaceOption(userns_options=pb.UserNamespace(mode=pb.NODE))
    config = sandbox_config(samples.in_sandbox(namespace_options=options))
    assert config.namespaces.user == UserNamespace(mode="node")


def linux(**fields: object) -> pb.PodSandboxConfig:
    return samples.simple_sandbox(linux=pb.LinuxPodSandboxConfig(**fields))  # type: ignore[arg-type]


def context(**fields: object) -> pb.PodSandboxConfig:
    return samples.in_sandbox(**fields)


def namespaces(**fields: object) -> pb.PodSandboxConfig:
    return context(namespace_options=pb.NamespaceOption(**fields))  # type: ignore[arg-type]


def users(**fields: object) -> pb.PodSandboxConfig:
    return namespaces(userns_options=pb.UserNamespace(**fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["web-0.sub.ns.svc.", "-x", "a_b", "ü", "x" * 64, "a/b"])
def test_hostnames_that_sethostname_takes(name: str) -> None:
    assert sandbox_config(samples.simple_sandbox(hostname=name)).hostname == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("net/ipv4/ip_forward", "1"),
        ("net.ipv4.conf.eth0/1.forwarding", "1"),
        ("net/ipv4/conf/eth0.1/forwarding", "1"),
        ("net.ipv4.tcp_rmem", "4096\t87380\t6291456"),
        ("net.ipv4.ip_forward", "1\n"),
        ("kernel/shmmax", "1"),
    ],
)
def test_sysctls_as_sysctl_writes_them(name: str, value: str) -> None:
    assert sandbox_config(linux(sysctls={name: value})).sysctls == {name: value}


def limits(**fields: object) -> pb.PodSandboxConfig:
    return linux(resources=pb.LinuxContainerResources(**fields))  # type: ignore[arg-type]


def overhead(**fields: object) -> pb.PodSandboxConfig:
    return linux(overhead=pb.LinuxContainerResources(**fields))  # type: ignore[arg-type]


def on_node(**fields: object) -> pb.PodSandboxConfig:
    options = pb.NamespaceOption(network=pb.NODE, ipc=pb.NODE)
    config = context(namespace_options=options)
    config.MergeFrom(samples.simple_sandbox(**fields))
    return config


ROOT = pb.IDMapping(container_id=0, host_id=1000, length=10)
LATER = pb.IDMapping(container_id=1, host_id=1000, length=10)
OVER = pb.IDMapping(container_id=0, host_id=4_000_000_000, length=1_000_000_000)
LOCALHOST = pb.SecurityProfile.Localhost


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (pb.PodSandboxConfig(), "config.metadata.name: is required"),
        (samples.simple_sandbox(metadata=pb.PodSandboxMetadata(uid="a/b")), "config.metadata.uid"),
        (
            samples.simple_sandbox(metadata=pb.PodSandboxMetadata(name="a\n")),
            "config.metadata.name",
        ),
        (samples.simple_sandbox(hostname="a" * 65), "config.hostname: is longer"),
        (samples.simple_sandbox(hostname="ü" * 33), "config.hostname: is longer"),
        (samples.simple_sandbox(hostname="a\n"), "config.hostname: has a control character"),
        (samples.simple_sandbox(hostname="a b"), "config.hostname"),
        (on_node(hostname="x"), "config.hostname: a pod on the node's network"),
        (samples.simple_sandbox(log_directory="logs"), "config.log_directory"),
        (samples.simple_sandbox(log_directory="/a/../b"), "config.log_directory"),
        (samples.simple_sandbox(log_directory="/" + "a" * 256), "config.log_directory"),
        (samples.simple_sandbox(log_directory="/a" * 2048), "config.log_directory"),
        (samples.simple_sandbox(log_directory="/a\0"), "config.log_directory"),
        (samples.simple_sandbox(labels={"a": "x" * (1 << 20)}), "config.labels"),
        (samples.simple_sandbox(annotations={"a": "x" * (1 << 20)}), "config.annotations"),
        (samples.simple_sandbox(dns_config=pb.DNSConfig(servers=["dns"])), "dns_config.servers[0]"),
        (samples.simple_sandbox(dns_config=pb.DNSConfig(searches=["a b"])), "searches[0]"),
        (samples.simple_sandbox(dns_config=pb.DNSConfig(options=["a\nb"])), "options[0]"),
        (samples.simple_sandbox(port_mappings=[pb.PortMapping(host_port=1)]), "container_port"),
        (
            samples.simple_sandbox(port_mappings=[pb.PortMapping(container_port=70_000)]),
            "config.port_mappings[0].container_port",
        ),
        (
            samples.simple_sandbox(port_mappings=[pb.PortMapping(container_port=1, host_port=-1)]),
            "config.port_mappings[0].host_port",
        ),
        (
            samples.simple_sandbox(port_mappings=[pb.PortMapping(protocol=9)]),  # type: ignore[arg-type]
            "config.port_mappings[0].protocol: 9",
        ),
        (
            samples.simple_sandbox(port_mappings=[pb.PortMapping(host_ip="here")]),
            "config.port_mappings[0].host_ip",
        ),
        (
            on_node(port_mappings=[pb.PortMapping(container_port=80, host_port=8080)]),
            "port_mappings[0].host_port: 8080 is not the container's 80",
        ),
        (linux(cgroup_parent="pods"), "config.linux.cgroup_parent"),
        (linux(cgroup_parent="/a/../b"), "config.linux.cgroup_parent"),
        (linux(sysctls={"kernel.shm_rmid_forced+x": "1"}), "config.linux.sysctls"),
        (linux(sysctls={"net/../kernel/sem": "1"}), "config.linux.sysctls"),
        (linux(sysctls={"net.ipv4.ip_forward": "1\n2"}), "config.linux.sysctls"),
        (linux(sysctls={"kernel.core_pattern": "x"}), "is of the whole node"),
        (linux(sysctls={"kernel.shmmax.x": "x"}), "is of the whole node"),
        (linux(sysctls={"kernel.hostname": "x"}), "is of the whole node"),
        (on_node(linux=linux(sysctls={"net.core.somaxconn": "1"}).linux), "does not have"),
        (on_node(linux=linux(sysctls={"kernel.sem": "1"}).linux), "does not have"),
        (on_node(linux=linux(sysctls={"fs.mqueue.msg_max": "1"}).linux), "does not have"),
        (
            namespaces(network=pb.CONTAINER),
            "namespace_options.network: 1 is none of 0 (pod), 2 (node)",
        ),
        (namespaces(ipc=pb.TARGET), "namespace_options.ipc"),
        (namespaces(pid=pb.TARGET, target_id="x"), "namespace_options.pid"),
        (namespaces(target_id="x"), "namespace_options.target_id"),
        (namespaces(pid=7), "namespace_options.pid: 7"),
        (users(mode=pb.POD), "userns_options.uids: has 0 mappings"),
        (users(mode=pb.POD, uids=[ROOT]), "userns_options.gids: has 0 mappings"),
        (users(mode=pb.POD, uids=[ROOT, ROOT], gids=[ROOT]), "uids: has 2 mappings"),
        (users(mode=pb.POD, uids=[LATER], gids=[ROOT]), "uids[0].container_id"),
        (users(mode=pb.POD, uids=[OVER], gids=[ROOT]), "uids[0].length"),
        (users(mode=pb.NODE, uids=[ROOT]), "userns_options.mode"),
        (users(mode=pb.CONTAINER), "userns_options.mode"),
        (users(mode=pb.TARGET), "userns_options.mode"),
        (context(run_as_group=pb.Int64Value(value=1)), "run_as_group: needs a user"),
        (context(run_as_user=pb.Int64Value(value=-1)), "run_as_user: -1"),
        (context(run_as_user=pb.Int64Value(value=(1 << 32) - 1)), "run_as_user: 4294967295"),
        (context(supplemental_groups=[1, -1]), "supplemental_groups[1]"),
        (context(supplemental_groups=[1] * 65_537), "supplemental_groups: has 65537"),
        (context(supplemental_groups_policy=5), "supplemental_groups_policy: 5"),
        (context(seccomp=pb.SecurityProfile(profile_type=LOCALHOST)), "seccomp.localhost_ref"),
        (
            context(seccomp=pb.SecurityProfile(profile_type=LOCALHOST, localhost_ref="p.json")),
            "seccomp.localhost_ref",
        ),
        (context(seccomp=pb.SecurityProfile(localhost_ref="/p")), "seccomp.localhost_ref"),
        (context(seccomp=pb.SecurityProfile(profile_type=8)), "seccomp.profile_type: 8"),  # type: ignore[arg-type]
        (context(seccomp_profile_path="p.json"), "seccomp_profile_path"),
        (context(seccomp_profile_path="localhost/"), "seccomp_profile_path"),
        (context(seccomp_profile_path="localhost/p.json"), "seccomp_profile_path"),
        (context(apparmor=pb.SecurityProfile(profile_type=LOCALHOST)), "apparmor.localhost_ref"),
        (context(selinux_options=pb.SELinuxOption(user="a:b")), "selinux_options.user"),
        (context(selinux_options=pb.SELinuxOption(level="a\n")), "selinux_options.level"),
        (limits(cpu_period=999), "config.linux.resources.cpu_period: 999"),
        (limits(cpu_period=1_000_001), "resources.cpu_period"),
        (limits(cpu_quota=-2), "resources.cpu_quota: -2"),
        (limits(cpu_quota=999), "resources.cpu_quota"),
        (limits(cpu_shares=-1), "resources.cpu_shares"),
        (limits(memory_limit_in_bytes=-2), "resources.memory_limit_in_bytes"),
        (limits(memory_swap_limit_in_bytes=-2), "resources.memory_swap_limit_in_bytes"),
        (
            limits(memory_limit_in_bytes=3, memory_swap_limit_in_bytes=2),
            "resources.memory_swap_limit_in_bytes",
        ),
        (
            limits(memory_limit_in_bytes=-1, memory_swap_limit_in_bytes=2),
            "resources.memory_swap_limit_in_bytes",
        ),
        (limits(oom_score_adj=1), "resources.oom_score_adj: is of a container"),
        (limits(cpuset_cpus="0-"), "resources.cpuset_cpus"),
        (limits(cpuset_mems="0\n1"), "resources.cpuset_mems"),
        (limits(hugepage_limits=[pb.HugepageLimit(page_size="2M")]), 'hugepage_limits["2M"]'),
        (
            limits(hugepage_limits=[pb.HugepageLimit(page_size="2MB")] * 2),
            "hugepage_limits[1].page_size",
        ),
        (limits(unified={"cgroup.procs": "1"}), "resources.unified"),
        (limits(unified={"../memory.max": "1"}), "resources.unified"),
        (limits(unified={"memory": "1"}), "resources.unified"),
        (limits(unified={"memory.max": "1\n2"}), 'resources.unified["memory.max"]'),
        (limits(unified={f"a.b{n}": "" for n in range(257)}), "resources.unified"),
        (overhead(cpu_shares=-1), "linux.overhead.cpu_shares"),
        (overhead(cpuset_cpus="0"), "linux.overhead.cpuset_cpus: cannot be added"),
        (overhead(unified={"pids.max": "1"}), "linux.overhead.unified: cannot be added"),
    ],
)
def test_refusals_name_the_field(config: Message, field: str) -> None:
    assert isinstance(config, pb.PodSandboxConfig)
    with pytest.raises(InvalidArgument) as error:
        sandbox_config(config)
    assert field in str(error.value)
    assert str(error.value).startswith("config.")


@pytest.mark.parametrize(
    ("path", "profile"),
    [
        ("", None),
        ("unconfined", Profile(kind="unconfined")),
        ("runtime/default", Profile(kind="default")),
        ("docker/default", Profile(kind="default")),
        ("localhost//p.json", Profile(kind="localhost", ref="/p.json")),
    ],
)
def test_the_deprecated_seccomp_path(path: str, profile: Profile | None) -> None:
    assert sandbox_config(context(seccomp_profile_path=path)).seccomp == profile


def test_the_new_seccomp_field_wins() -> None:
    config = context(seccomp_profile_path="unconfined", seccomp=pb.SecurityProfile())
    assert sandbox_config(config).seccomp == Profile(kind="default")


@pytest.mark.parametrize("value", [-1, 0, 1000, 1 << 62])
def test_quotas_that_are_fine(value: int) -> None:
    config = sandbox_config(limits(cpu_quota=value)).resources
    assert config is not None
    assert config.cpu_quota_usec == value
