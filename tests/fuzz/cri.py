"""What clients of the CRI send: the bytes of requests, up to the records that are kept of them."""

from collections.abc import Iterator

import msgspec
from google.protobuf.message import DecodeError

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cgroups import v1, v2
from nodeagent.cgroups.control import ControlFiles
from nodeagent.cri import listing, messages, verbose
from nodeagent.cri.translate_container import container_config
from nodeagent.cri.translate_resources import message_of, resources
from nodeagent.cri.translate_sandbox import sandbox_config
from nodeagent.errors import InvalidArgument, NodeAgentError, Unsupported
from nodeagent.lifecycle.plan import etc_files, process
from nodeagent.records import Container, ImageConfig, MountStatus, Sandbox
from nodeagent.requests import ContainerConfig, Resources, SandboxConfig
from nodeagent.sandbox import protocol
from tests.fuzz.target import Target

NOW = Resources(cpu_period_usec=100_000, cpu_quota_usec=-1, memory_limit_bytes=-1)


def run_pod_sandbox(data: bytes) -> None:
    request = pb.RunPodSandboxRequest.FromString(data)
    config = sandbox_config(request.config)
    assert msgspec.json.decode(msgspec.json.encode(config), type=SandboxConfig) == config
    check_path(config.log_directory)
    check_path(config.cgroup_parent)
    sandbox = Sandbox(id="s", config=config, cgroup_parent="/p", boot_id="b", created_at=1)
    messages.sandbox_item(sandbox).SerializeToString()
    messages.sandbox_status(sandbox).SerializeToString()
    verbose.sandbox_info(sandbox, {})
    protocol.encode({"hostname": etc_files.hostname(config), "sysctls": config.sysctls})
    for line in etc_files.resolv_conf(config.dns).splitlines():
        assert line.startswith(("search ", "nameserver ", "options "))


def create_container(data: bytes) -> None:
    request = pb.CreateContainerRequest.FromString(data)
    pod = SandboxConfig(name="p", uid="u", namespace="n", privileged=True)
    config = container_config(request.config, pod)
    assert msgspec.json.decode(msgspec.json.encode(config), type=ContainerConfig) == config
    for mount in config.mounts:
        check_path(mount.container_path)
        check_path(mount.host_path)
    for path in (*(config.masked_paths or ()), *(config.readonly_paths or ())):
        check_path(path)
    container = Container(
        id="c",
        config=config,
        sandbox_id="s",
        image_id="i",
        image_ref="r",
        image_name="n",
        cgroup_path="/p/c",
        log_path=config.log_path,
        resources=config.resources,
        stop_signal=config.stop_signal,
        mounts=tuple(MountStatus(config=mount) for mount in config.mounts),
        created_at=1,
    )
    messages.container_item(container).SerializeToString()
    messages.container_status(container).SerializeToString()
    verbose.container_info(container, {}, None)
    environment = process.environment(config, ImageConfig(), "h")
    assert not any("\0" in entry for entry in environment)
    protocol.encode({"env": environment, "user": process.user(config, ImageConfig())})
    process.capability_sets(config.capabilities, privileged=config.privileged)


def update_container_resources(data: bytes) -> None:
    """Up to what would be written to the control files; those that are absent here are as without a controller."""
    request = pb.UpdateContainerResourcesRequest.FromString(data)
    wanted = resources(request.linux, "linux")
    assert resources(message_of(wanted), "linux") == wanted
    files = ControlFiles({"": "/nonexistent"})
    for version in (v1, v2):
        try:
            lines = version.plan(wanted, NOW, files)
        except NodeAgentError:
            continue
        for name, line in lines:
            assert "/" not in name
            assert not {"\n", "\0"} & {*name, *line}


def list_containers(data: bytes) -> None:
    request = pb.ListContainersRequest.FromString(data)
    assert listing.containers([], request.filter) == []


def check_path(path: str) -> None:
    """Empty, or absolute and in its shortest form."""
    parts = path.split("/")
    assert path in ("", "/") or (
        parts[0] == "" and not {"", ".", ".."} & {*parts[1:]} and "\0" not in path
    )


# --- examples ---


def sandboxes() -> Iterator[bytes]:
    metadata = pb.PodSandboxMetadata(name="n", uid="u", namespace="s", attempt=1)
    yield pb.RunPodSandboxRequest(config=pb.PodSandboxConfig(metadata=metadata)).SerializeToString()
    mapping = [pb.IDMapping(host_id=100_000, container_id=0, length=65_536)]
    context = pb.LinuxSandboxSecurityContext(
        namespace_options=pb.NamespaceOption(
            pid=pb.CONTAINER,
            userns_options=pb.UserNamespace(mode=pb.POD, uids=mapping, gids=mapping),
        ),
        run_as_user=pb.Int64Value(value=7),
        run_as_group=pb.Int64Value(value=8),
        supplemental_groups=[9],
        seccomp=pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault),
        selinux_options=pb.SELinuxOption(level="s0:c1,c2"),
    )
    yield pb.RunPodSandboxRequest(
        config=pb.PodSandboxConfig(
            metadata=metadata,
            hostname="web-0",
            log_directory="/var/log/pods/a",
            dns_config=pb.DNSConfig(
                servers=["10.0.0.1", "fe80::1%eth0"], searches=["a.b"], options=["ndots:5"]
            ),
            port_mappings=[pb.PortMapping(container_port=80, host_port=8080, host_ip="127.0.0.1")],
            labels={"a": "b"},
            annotations={"c": "é"},
            linux=pb.LinuxPodSandboxConfig(
                cgroup_parent="/kubepods/pod1",
                sysctls={"net.core.somaxconn": "1024", "kernel.shmmax": "1"},
                security_context=context,
                resources=pb.LinuxContainerResources(cpu_shares=2),
            ),
        ),
        runtime_handler="",
    ).SerializeToString()


LIMITS = pb.LinuxContainerResources(
    cpu_period=100_000,
    cpu_quota=50_000,
    cpu_shares=1024,
    memory_limit_in_bytes=1 << 26,
    memory_swap_limit_in_bytes=1 << 27,
    oom_score_adj=-998,
    cpuset_cpus="0-1",
    cpuset_mems="0",
    hugepage_limits=[pb.HugepageLimit(page_size="2MB", limit=4096)],
    unified={"memory.high": "1000", "io.max": "8:0 rbps=1"},
)


def containers() -> Iterator[bytes]:
    metadata, image = pb.ContainerMetadata(name="c"), pb.ImageSpec(image="sha256:i")
    yield pb.CreateContainerRequest(
        config=pb.ContainerConfig(metadata=metadata, image=image)
    ).SerializeToString()
    context = pb.LinuxContainerSecurityContext(
        capabilities=pb.Capability(add_capabilities=["NET_ADMIN"], drop_capabilities=["ALL"]),
        run_as_username="app",
        readonly_rootfs=True,
        masked_paths=["/proc/kcore"],
        readonly_paths=["/proc/sys"],
        apparmor=pb.SecurityProfile(
            profile_type=pb.SecurityProfile.Localhost, localhost_ref="localhost/a"
        ),
        seccomp=pb.SecurityProfile(
            profile_type=pb.SecurityProfile.Localhost, localhost_ref="/p.json"
        ),
    )
    yield pb.CreateContainerRequest(
        pod_sandbox_id="s",
        config=pb.ContainerConfig(
            metadata=metadata,
            image=image,
            command=["sh"],
            args=["-c", "true"],
            working_dir="/w",
            envs=[pb.KeyValue(key="A", value=b"\xff")],
            mounts=[
                pb.Mount(
                    container_path="/m", host_path="/h", readonly=True, mount_options=["nodev"]
                ),
                pb.Mount(container_path="/i", image=image, readonly=True, image_sub_path="a/b"),
            ],
            devices=[pb.Device(container_path="/dev/x", host_path="/dev/y", permissions="rw")],
            CDI_devices=[pb.CDIDevice(name="v.com/gpu=0")],
            labels={"a": "b"},
            log_path="c/0.log",
            stdin=True,
            tty=True,
            stop_signal=pb.SIGNAL_SIGTERM,
            linux=pb.LinuxContainerConfig(resources=LIMITS, security_context=context),
        ),
    ).SerializeToString()


def updates() -> Iterator[bytes]:
    for linux in (LIMITS, pb.LinuxContainerResources(memory_limit_in_bytes=-1)):
        yield pb.UpdateContainerResourcesRequest(
            container_id="c", linux=linux, annotations={"a": "b"}
        ).SerializeToString()


def lists() -> Iterator[bytes]:
    chosen = pb.ContainerFilter(
        id="c",
        pod_sandbox_id="s",
        label_selector={"a": "b"},
        state=pb.ContainerStateValue(state=pb.CONTAINER_RUNNING),
    )
    yield pb.ListContainersRequest(filter=chosen).SerializeToString()


REFUSALS = (DecodeError, InvalidArgument, Unsupported)
TARGETS = (
    Target(run_pod_sandbox, REFUSALS, tuple(sandboxes())),
    Target(create_container, REFUSALS, tuple(containers())),
    Target(update_container_resources, REFUSALS, tuple(updates())),
    Target(list_containers, REFUSALS, tuple(lists())),
)
