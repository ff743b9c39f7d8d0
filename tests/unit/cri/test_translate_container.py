"""ContainerConfig to record: every field arrives or is refused by its name."""

import signal

import msgspec
import pytest

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri import signals
from nodeagent.cri.translate_container import container_config
from nodeagent.errors import InvalidArgument, Unsupported
from nodeagent.requests import (
    CapabilityChange,
    ContainerConfig,
    DeviceConfig,
    IdMapping,
    MountConfig,
    Namespaces,
    Profile,
    SandboxConfig,
    SELinux,
    UserNamespace,
)
from nodeagent.words import NamespaceMode
from tests.unit.cri import samples
from tests.unit.cri.test_translate_sandbox import LIMITS

POD = SandboxConfig(
    name="web",
    uid="u-1",
    namespace="default",
    log_directory="/var/log/pods/web",
    privileged=True,
    namespaces=Namespaces(),
)
UNPRIVILEGED = msgspec.structs.replace(POD, privileged=False)
BLOCK = (IdMapping(inside=0, outside=65_536, length=65_536),)


def test_every_field_arrives() -> None:
    assert container_config(samples.container(), POD, "h") == ContainerConfig(
        name="main",
        attempt=2,
        image="sha256:abc",
        image_user_specified="busybox",
        image_annotations={"i": "j"},
        image_runtime_handler="h",
        command=("/bin/sh",),
        args=("-c",),
        working_dir="/srv",
        envs=(("LANG", b"\xff"),),
        mounts=(
            MountConfig(
                container_path="/data",
                host_path="/srv/data",
                readonly=True,
                recursive_read_only=True,
                selinux_relabel=True,
                uids=BLOCK,
                gids=BLOCK,
                options=("noexec",),
            ),
            MountConfig(
                container_path="/model",
                readonly=True,
                image="sha256:def",
                image_user_specified="model:1",
                image_annotations={"k": "v"},
                image_runtime_handler="h",
                image_sub_path="weights",
            ),
        ),
        devices=(DeviceConfig(container_path="/dev/a", host_path="/dev/b", permissions="rw"),),
        cdi_devices=("vendor.com/gpu=0",),
        labels={"tier": "front"},
        annotations={"hash": "1f"},
        log_path="main/2.log",
        stdin=True,
        stdin_once=True,
        tty=True,
        stop_signal=signal.SIGQUIT,
        resources=LIMITS,
        namespaces=Namespaces(pid="target", target="t-1", cgroup="node"),
        privileged=True,
        readonly_rootfs=True,
        no_new_privs=True,
        capabilities=CapabilityChange(add=("NET_ADMIN",), drop=("ALL",), add_ambient=("CHOWN",)),
        run_as_user=7,
        run_as_group=8,
        supplemental_groups=(9,),
        groups_policy="strict",
        masked_paths=("/proc/keys",),
        readonly_paths=("/proc/sys",),
        seccomp=Profile(kind="oci", ref="reg/p@sha256:1", base="/base.json"),
        cgroup_mount="writable",
        apparmor=Profile(kind="unconfined"),
        selinux=SELinux(user="u", role="r", type="t", level="s0"),
    )


CONTEXT = "linux.security_context."
ELSEWHERE = {
    "image.image_ref",
    "mounts.image.image_ref",
    "mounts.propagation",
    "mounts.uidMappings.container_id",
    "mounts.gidMappings.container_id",
    f"{CONTEXT}run_as_username",
    f"{CONTEXT}apparmor_profile",
    f"{CONTEXT}seccomp_profile_path",
    f"{CONTEXT}seccomp.localhost_ref",
    f"{CONTEXT}apparmor.localhost_ref",
    f"{CONTEXT}apparmor.oci_ref",
    f"{CONTEXT}apparmor.base_profile.type",
    f"{CONTEXT}apparmor.base_profile.localhost_ref",
}


@pytest.mark.parametrize("path", list(samples.leaves(pb.ContainerConfig.DESCRIPTOR)))
def test_no_field_is_forgotten(path: str) -> None:
    of_pod = path.startswith(f"{CONTEXT}namespace_options") and ".pid" not in path
    if path.startswith("windows.") or path in ELSEWHERE or of_pod:
        return
    config = samples.container()
    assert samples.without(config, path), "the sample has not got this field"
    try:
        whole = container_config(samples.container(), POD, "h")
        assert container_config(config, POD, "h") != whole
    except InvalidArgument:
        return


def test_the_least_config() -> None:
    assert container_config(samples.simple_container(), UNPRIVILEGED) == ContainerConfig(
        name="main", image="busybox", seccomp=Profile(kind="default")
    )


def test_the_cgroups_of_a_privileged_container_are_writable() -> None:
    for mode in (pb.CGROUP_MOUNT_MODE_UNSPECIFIED, pb.CGROUP_MOUNT_MODE_READ_WRITE):
        container_config(samples.in_container(privileged=True, cgroup_mount_mode=mode), POD)
    asked = samples.in_container(privileged=True, cgroup_mount_mode=pb.CGROUP_MOUNT_MODE_READ_ONLY)
    with pytest.raises(InvalidArgument, match="cgroup_mount_mode: read-only, but a privileged"):
        container_config(asked, POD)


def test_windows_is_unsupported() -> None:
    with pytest.raises(Unsupported, match=r"config\.windows"):
        container_config(samples.simple_container(windows=pb.WindowsContainerConfig()), POD)


def test_no_security_context_masks_paths_an_empty_one_does_not() -> None:
    bare = container_config(samples.simple_container(), POD)
    assert (bare.masked_paths, bare.readonly_paths) == (None, None)
    unmasked = container_config(samples.in_container(), POD)
    assert (unmasked.masked_paths, unmasked.readonly_paths) == ((), ())


@pytest.mark.parametrize(
    ("asked", "of_pod", "got"),
    [
        (pb.POD, "pod", "pod"),
        (pb.POD, "container", "container"),
        (pb.POD, "node", "node"),
        (pb.CONTAINER, "pod", "container"),
        (pb.CONTAINER, "node", "container"),
        (pb.NODE, "node", "node"),
    ],
)
def test_pid_namespaces(asked: pb.NamespaceMode, of_pod: NamespaceMode, got: NamespaceMode) -> None:
    pod = SandboxConfig(name="p", uid="u", namespace="n", namespaces=Namespaces(pid=of_pod))
    options = pb.NamespaceOption(pid=asked)
    config = container_config(samples.in_container(namespace_options=options), pod)
    assert config.namespaces.pid == got


def test_the_other_namespaces_are_the_pods() -> None:
    user = UserNamespace(mode="pod", uids=BLOCK, gids=BLOCK)
    own = Namespaces(network="node", ipc="node", user=user)
    pod = SandboxConfig(name="p", uid="u", namespace="n", namespaces=own)
    assert container_config(samples.simple_container(), pod).namespaces == own
    mapping = pb.IDMapping(container_id=0, host_id=65_536, length=65_536)
    options = pb.NamespaceOption(
        network=pb.NODE,
        ipc=pb.NODE,
        pid=pb.CONTAINER,
        userns_options=pb.UserNamespace(mode=pb.POD, uids=[mapping], gids=[mapping]),
    )
    assert container_config(samples.in_container(namespace_options=options), pod).namespaces == own


def test_an_image_volume_is_mapped_as_its_pod() -> None:
    user = UserNamespace(mode="pod", uids=BLOCK, gids=BLOCK)
    pod = msgspec.structs.replace(POD, namespaces=Namespaces(user=user))
    mapping = pb.IDMapping(container_id=0, host_id=65_536, length=65_536)
    config = container_config(volume(uidMappings=[mapping], gidMappings=[mapping]), pod)
    assert (config.mounts[0].uids, config.mounts[0].gids) == (BLOCK, BLOCK)


def test_a_log_needs_a_directory() -> None:
    pod = SandboxConfig(name="web", uid="u-1", namespace="default")
    with pytest.raises(
        InvalidArgument, match=r"config\.log_path: is given, but the pod has no log_directory"
    ):
        container_config(samples.simple_container(log_path="main.log"), pod)


def test_users_by_name() -> None:
    config = container_config(
        samples.in_container(run_as_username="www", run_as_group=pb.Int64Value(value=3)), POD
    )
    assert (config.run_as_user, config.run_as_username, config.run_as_group) == (None, "www", 3)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/a/", "/a"),
        ("//a//b/.", "/a/b"),
        ("/a/../b", "/b"),
        ("/a/b/../../c/..//d", "/d"),
        ("/../a/../../b", "/b"),
        ("a/b", "/a/b"),
        ("./a/../b", "/b"),
    ],
)
def test_where_things_are_in_a_container(path: str, found: str) -> None:
    """In its shortest form, as runc takes it."""
    wanted = mount(container_path=path)
    wanted.devices.add(container_path=path, host_path="/dev/b", permissions="r")
    config = container_config(wanted, POD)
    assert (config.mounts[0].container_path, config.devices[0].container_path) == (found, found)
    if path.startswith("/"):
        security = samples.in_container(masked_paths=[path], readonly_paths=[path])
        config = container_config(security, POD)
        assert (config.masked_paths, config.readonly_paths) == ((found,), (found,))
        config = container_config(samples.simple_container(working_dir=path), POD)
        assert config.working_dir == found


def test_a_device_is_where_it_is_on_the_node_unless_the_request_says_where() -> None:
    config = container_config(device(container_path=""), POD)
    assert config.devices[0].container_path == "/dev/b"


def test_capabilities_in_any_spelling() -> None:
    change = pb.Capability(add_capabilities=["cap_net_raw", "Sys_Admin", "all"])
    config = container_config(samples.in_container(capabilities=change), POD)
    assert config.capabilities.add == ("NET_RAW", "SYS_ADMIN", "ALL")


def test_capabilities_that_nobody_knows_are_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    change = pb.Capability(
        add_capabilities=["SYS_NOTHING", "NET_RAW"], drop_capabilities=["CAP_CAP_KILL\n", "ALL"]
    )
    config = container_config(samples.in_container(capabilities=change), POD)
    assert (config.capabilities.add, config.capabilities.drop) == (("NET_RAW",), ("ALL",))
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "'SYS_NOTHING' is not a known capability; ignored",
        "'CAP_CAP_KILL\\n' is not a known capability; ignored",
    ]


@pytest.mark.parametrize("propagation", [1, 2])
def test_an_image_may_be_mounted_with_any_propagation(propagation: int) -> None:
    (mounted,) = container_config(volume(propagation=propagation), POD).mounts
    assert mounted.image


@pytest.mark.parametrize(
    ("fields", "profile"),
    [
        ({"apparmor_profile": "runtime/default"}, Profile(kind="default")),
        ({"apparmor_profile": "unconfined"}, Profile(kind="unconfined")),
        ({"apparmor_profile": "localhost/mine"}, Profile(kind="localhost", ref="mine")),
        (
            {"apparmor": pb.SecurityProfile(profile_type="Localhost", localhost_ref="localhost/m")},
            Profile(kind="localhost", ref="m"),
        ),
        (
            {"apparmor_profile": "unconfined", "apparmor": pb.SecurityProfile()},
            Profile(kind="default"),
        ),
        ({}, None),
    ],
)
def test_apparmor_in_both_forms(fields: dict[str, object], profile: Profile | None) -> None:
    assert container_config(samples.in_container(**fields), POD).apparmor == profile


LOCALHOST = pb.SecurityProfileBase.Localhost


def oci(**fields: object) -> pb.SecurityProfile:
    return pb.SecurityProfile(profile_type=pb.SecurityProfile.OCI, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "base",
    [
        None,
        pb.SecurityProfileBase(),
        pb.SecurityProfileBase(localhost_ref="/b.json", type=LOCALHOST),
    ],
)
def test_the_base_of_an_artifact(base: pb.SecurityProfileBase | None) -> None:
    """An absent one, and one of zero values, are the default profile."""
    config = samples.in_container(seccomp=oci(oci_ref="reg/p@sha256:1", base_profile=base))
    found = container_config(config, POD).seccomp
    path = base.localhost_ref if base is not None else ""
    assert found == Profile(kind="oci", ref="reg/p@sha256:1", base=path)


@pytest.mark.parametrize("mode", [pb.CONTAINER, pb.NODE])
def test_cgroup_namespaces(mode: pb.NamespaceMode) -> None:
    config = namespaces(cgroupns_options=pb.CgroupNamespace(mode=mode))
    found = container_config(config, UNPRIVILEGED).namespaces.cgroup
    assert found == {pb.CONTAINER: "container", pb.NODE: "node"}[mode]


@pytest.mark.parametrize("value", [value for _, value in pb.Signal.items()])
def test_every_stop_signal(value: int) -> None:
    config = container_config(samples.simple_container(stop_signal=value), POD)
    assert 0 <= config.stop_signal <= signal.SIGRTMAX
    assert signals.NUMBERS[signals.signal_value(config.stop_signal)] == config.stop_signal


def test_some_stop_signals_by_number() -> None:
    wanted = {"SIGTERM": 15, "SIGRTMIN": 34, "SIGRTMINPLUS3": 37, "SIGRTMAXMINUS14": 50}
    for name, number in wanted.items():
        assert signals.NUMBERS[pb.Signal.Value(f"SIGNAL_{name}")] == number
    assert signals.signal_value(99) == pb.SIGNAL_RUNTIME_DEFAULT
    assert signals.signal_value(signal.SIGCHLD) == pb.SIGNAL_SIGCHLD


def mount(**fields: object) -> pb.ContainerConfig:
    values: dict[str, object] = {"container_path": "/a", "host_path": "/b"} | fields
    return samples.simple_container(mounts=[pb.Mount(**values)])  # type: ignore[arg-type]


def volume(**fields: object) -> pb.ContainerConfig:
    image = pb.ImageSpec(image="sha256:1")
    return mount(**{"host_path": "", "readonly": True, "image": image} | fields)


def device(**fields: str) -> pb.ContainerConfig:
    values = {"container_path": "/dev/a", "host_path": "/dev/b", "permissions": "r"} | fields
    return samples.simple_container(devices=[pb.Device(**values)])


def env(key: str, value: bytes = b"") -> pb.ContainerConfig:
    return samples.simple_container(envs=[pb.KeyValue(key=key, value=value)])


def namespaces(**fields: object) -> pb.ContainerConfig:
    return samples.in_container(namespace_options=pb.NamespaceOption(**fields))  # type: ignore[arg-type]


ROOT = pb.IDMapping(container_id=0, host_id=1, length=1)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (pb.ContainerConfig(), "config.metadata.name: is required"),
        (pb.ContainerConfig(metadata=pb.ContainerMetadata(name="x")), "config.image.image"),
        (samples.simple_container(image=pb.ImageSpec(image="a\n")), "config.image.image"),
        (
            samples.simple_container(image=pb.ImageSpec(runtime_handler="h")),
            'config.image.runtime_handler: "h" is none of ""',
        ),
        (
            samples.simple_container(image=pb.ImageSpec(image_ref="a@sha256:b")),
            "config.image.image_ref: is for answers",
        ),
        (samples.simple_container(command=["a", "b\0"]), "config.command[1]: has a NUL"),
        (samples.simple_container(args=["\0"]), "config.args[0]"),
        (samples.simple_container(args=["x"] * 100_001), "config.args: has 100001 entries"),
        (samples.simple_container(working_dir="tmp"), "config.working_dir"),
        (
            samples.simple_container(working_dir="proc/self/fd/8/../../../../.."),
            "config.working_dir",
        ),
        (env(""), "config.envs[0].key"),
        (env("A=B"), "config.envs[0].key"),
        (env("A\0"), "config.envs[0].key"),
        (env("A", b"x\0"), "config.envs[0].value"),
        (mount(container_path=""), "config.mounts[0].container_path: is required"),
        (mount(container_path="/"), "config.mounts[0].container_path"),
        (mount(container_path="/a/.."), "config.mounts[0].container_path"),
        (mount(container_path="/a/../.."), "config.mounts[0].container_path"),
        (mount(container_path="../a"), "config.mounts[0].container_path"),
        (mount(host_path="/a/../b"), "config.mounts[0].host_path"),
        (mount(host_path=""), "config.mounts[0].host_path: is required"),
        (mount(host_path="b"), "config.mounts[0].host_path"),
        (mount(host_path="/b\0"), "config.mounts[0].host_path"),
        (mount(propagation=3), "config.mounts[0].propagation: 3"),
        (mount(recursive_read_only=True), "mounts[0].recursive_read_only: needs readonly"),
        (
            mount(recursive_read_only=True, readonly=True, propagation=1),
            "mounts[0].recursive_read_only: needs PROPAGATION_PRIVATE",
        ),
        (mount(uidMappings=[ROOT]), "config.mounts[0].gidMappings"),
        (mount(gidMappings=[ROOT]), "config.mounts[0].uidMappings"),
        (mount(uidMappings=[ROOT] * 341), "config.mounts[0].uidMappings: has 341"),
        (mount(uidMappings=[pb.IDMapping()]), "config.mounts[0].uidMappings[0].length"),
        (mount(mount_options=["noexec", "ro"]), "config.mounts[0].mount_options[1]"),
        (mount(image_sub_path="x"), "config.mounts[0].image_sub_path"),
        (volume(host_path="/b"), "config.mounts[0].image: a mount has a host_path or an image"),
        (volume(image=pb.ImageSpec()), "config.mounts[0].image.image"),
        (volume(image=pb.ImageSpec(runtime_handler="h")), "mounts[0].image.runtime_handler"),
        (volume(image=pb.ImageSpec(image_ref="r")), "mounts[0].image.image_ref"),
        (
            volume(uidMappings=[ROOT], gidMappings=[ROOT]),
            "config.mounts[0].uidMappings: an image is mapped as its pod is",
        ),
        (volume(readonly=False), "config.mounts[0].readonly"),
        (volume(image_sub_path="../etc"), "config.mounts[0].image_sub_path"),
        (volume(image_sub_path="/etc"), "config.mounts[0].image_sub_path"),
        (device(container_path="/.."), "config.devices[0].container_path"),
        (device(container_path="/a/.."), "config.devices[0].container_path: the root"),
        (device(host_path="sda"), "config.devices[0].host_path"),
        (device(permissions=""), "config.devices[0].permissions"),
        (device(permissions="rx"), "config.devices[0].permissions"),
        (device(permissions="rr"), "config.devices[0].permissions"),
        (samples.simple_container(CDI_devices=[pb.CDIDevice(name="gpu")]), "CDI_devices[0].name"),
        (samples.simple_container(labels={"a": "x" * (1 << 20)}), "config.labels"),
        (samples.simple_container(log_path="/var/log/x"), "config.log_path"),
        (samples.simple_container(log_path="../x"), "config.log_path"),
        (samples.simple_container(stop_signal=66), "config.stop_signal: 66"),
        (samples.in_container(privileged=True), "privileged: the pod is not privileged"),
        (namespaces(network=pb.NODE), "namespace_options.network: NODE, but the pod"),
        (namespaces(network=pb.CONTAINER), "namespace_options.network"),
        (namespaces(ipc=pb.NODE), "namespace_options.ipc: NODE, but the pod"),
        (namespaces(pid=pb.NODE), "namespace_options.pid: NODE, but the pod"),
        (namespaces(pid=pb.TARGET), "namespace_options.target_id"),
        (namespaces(target_id="x"), "namespace_options.target_id"),
        (
            namespaces(userns_options=pb.UserNamespace(mode=pb.POD, uids=[ROOT], gids=[ROOT])),
            "namespace_options.userns_options: differs",
        ),
        (
            namespaces(cgroupns_options=pb.CgroupNamespace()),
            "namespace_options.cgroupns_options.mode: 0 is none of 1 (container), 2 (node)",
        ),
        (
            namespaces(cgroupns_options=pb.CgroupNamespace(mode=pb.TARGET)),
            "namespace_options.cgroupns_options.mode: 3",
        ),
        (
            samples.in_container(
                cgroup_mount_mode=pb.CGROUP_MOUNT_MODE_READ_WRITE,
                namespace_options=pb.NamespaceOption(
                    cgroupns_options=pb.CgroupNamespace(mode=pb.NODE)
                ),
            ),
            "cgroup_mount_mode: read-write, but cgroupns_options are NODE",
        ),
        (samples.in_container(cgroup_mount_mode=3), "cgroup_mount_mode: 3 is none of"),
        (samples.in_container(seccomp=oci()), "seccomp.oci_ref: is needed with OCI"),
        (
            samples.in_container(seccomp=pb.SecurityProfile(oci_ref="reg/p@sha256:1")),
            "seccomp.oci_ref: is needed with OCI",
        ),
        (
            samples.in_container(seccomp=oci(oci_ref="r", localhost_ref="/p.json")),
            "seccomp.localhost_ref",
        ),
        (
            samples.in_container(seccomp=pb.SecurityProfile(base_profile=pb.SecurityProfileBase())),
            "seccomp.base_profile: is for OCI",
        ),
        (
            samples.in_container(
                seccomp=oci(oci_ref="r", base_profile=pb.SecurityProfileBase(type=LOCALHOST))
            ),
            "seccomp.base_profile.localhost_ref: is needed with Localhost",
        ),
        (
            samples.in_container(
                seccomp=oci(oci_ref="r", base_profile=pb.SecurityProfileBase(localhost_ref="/p"))
            ),
            "seccomp.base_profile.localhost_ref: is needed with Localhost",
        ),
        (
            samples.in_container(
                seccomp=oci(
                    oci_ref="r",
                    base_profile=pb.SecurityProfileBase(type=LOCALHOST, localhost_ref="p"),
                )
            ),
            "seccomp.base_profile.localhost_ref",
        ),
        (samples.in_container(apparmor=oci(oci_ref="r")), "apparmor.profile_type: OCI is for"),
        (samples.in_container(run_as_group=pb.Int64Value()), "run_as_group: needs a user"),
        (
            samples.in_container(run_as_user=pb.Int64Value(), run_as_username="x"),
            "run_as_username: run_as_user is given as well",
        ),
        (samples.in_container(run_as_username="a:b"), "run_as_username"),
        (samples.in_container(run_as_username="a\n"), "run_as_username"),
        (samples.in_container(masked_paths=["proc"]), "masked_paths[0]"),
        (samples.in_container(readonly_paths=["../etc"]), "readonly_paths[0]"),
        (samples.in_container(apparmor_profile="mine"), "apparmor_profile"),
    ],
)
def test_refusals_name_the_field(config: pb.ContainerConfig, field: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        container_config(config, UNPRIVILEGED)
    assert field in str(error.value)
    assert str(error.value).startswith("config.")
