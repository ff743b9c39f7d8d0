"""Translation of ContainerConfig to that of `nodeagent.requests`: each field is mapped, or refused by its name."""

import re
from collections.abc import Sequence

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri import signals, translate_images, validate
from nodeagent.cri import translate_security as security
from nodeagent.cri.translate_mounts import mounts
from nodeagent.cri.translate_namespaces import container_namespaces
from nodeagent.cri.translate_resources import resources
from nodeagent.errors import Unsupported
from nodeagent.lifecycle.plan import cdi_specs
from nodeagent.requests import CgroupMount, ContainerConfig, DeviceConfig, Profile, SandboxConfig

_PERMISSIONS = re.compile(r"(?!.*(.).*\1)[rwm]{1,3}")
_USERNAME_BYTES = 256

_CGROUP_MOUNTS: dict[int, CgroupMount] = {
    pb.CGROUP_MOUNT_MODE_UNSPECIFIED: "default",
    pb.CGROUP_MOUNT_MODE_READ_ONLY: "readonly",
    pb.CGROUP_MOUNT_MODE_READ_WRITE: "writable",
}

# For a container whose caller says nothing of security at all: masked and read-only paths are the agent's own then.
_RUNTIME_DEFAULT = Profile(kind="default")


def container_config(
    message: pb.ContainerConfig, pod: SandboxConfig, handler: str = ""
) -> ContainerConfig:
    """Translate a config. pod: that of the container's sandbox when it was made; handler: its runtime handler."""
    if message.HasField("windows"):
        raise Unsupported("config.windows: this is a Linux node")
    translate_images.check(message.image, "config.image", {"", handler})
    context = message.linux.security_context
    field = "config.linux.security_context"
    if context.privileged and not pod.privileged:
        validate.refuse(f"{field}.privileged", "the pod is not privileged")
    user, username = _user(context, field)
    has_context = message.linux.HasField("security_context")
    return ContainerConfig(
        name=validate.name(message.metadata.name, "config.metadata.name"),
        attempt=message.metadata.attempt,
        image=validate.given(message.image.image, "config.image.image"),
        image_user_specified=validate.text(
            message.image.user_specified_image, "config.image.user_specified_image"
        ),
        image_annotations=validate.metadata(message.image.annotations, "config.image.annotations"),
        image_runtime_handler=message.image.runtime_handler,
        command=validate.strings(message.command, "config.command"),
        args=validate.strings(message.args, "config.args"),
        working_dir=_working_dir(message.working_dir),
        envs=_envs(message.envs),
        mounts=mounts(message.mounts, pod, handler),
        devices=_devices(message.devices),
        cdi_devices=_cdi_devices(message.CDI_devices),
        labels=validate.metadata(message.labels, "config.labels"),
        annotations=validate.metadata(message.annotations, "config.annotations"),
        log_path=_log_path(message.log_path, pod),
        stdin=message.stdin,
        stdin_once=message.stdin_once,
        tty=message.tty,
        stop_signal=_stop_signal(message.stop_signal),
        resources=resources(message.linux.resources, "config.linux.resources"),
        namespaces=container_namespaces(
            context.namespace_options, pod, f"{field}.namespace_options"
        ),
        privileged=context.privileged,
        readonly_rootfs=context.readonly_rootfs,
        cgroup_mount=_cgroup_mount(context, field),
        no_new_privs=context.no_new_privs,
        capabilities=security.capability_change(context.capabilities, f"{field}.capabilities"),
        run_as_user=user,
        run_as_username=username,
        run_as_group=security.group_id(context, field, has_user=user is not None or bool(username)),
        supplemental_groups=security.groups(context, field),
        groups_policy=security.groups_policy(context, field),
        masked_paths=(
            validate.container_paths(context.masked_paths, f"{field}.masked_paths")
            if has_context
            else None
        ),
        readonly_paths=(
            validate.container_paths(context.readonly_paths, f"{field}.readonly_paths")
            if has_context
            else None
        ),
        seccomp=security.seccomp(context, field) if has_context else _RUNTIME_DEFAULT,
        apparmor=security.apparmor(context, field),
        selinux=security.selinux(context, field),
    )


def _working_dir(value: str) -> str:
    return validate.absolute_container_path(value, "config.working_dir") if value else ""


def _user(context: pb.LinuxContainerSecurityContext, field: str) -> tuple[int | None, str]:
    user = security.user_id(context, field)
    where = f"{field}.run_as_username"
    username = validate.text(context.run_as_username, where, max_bytes=_USERNAME_BYTES)
    if ":" in username:
        validate.refuse(where, "has a colon in it")
    if username and user is not None:
        validate.refuse(where, "run_as_user is given as well")
    return user, username


def _cgroup_mount(context: pb.LinuxContainerSecurityContext, field: str) -> CgroupMount:
    """How the container sees its cgroups: only privileged ones may write where others' groups are to be seen too."""
    where = f"{field}.cgroup_mount_mode"
    mode = validate.word(context.cgroup_mount_mode, _CGROUP_MOUNTS, where)
    if mode == "readonly" and context.privileged:
        validate.refuse(where, "read-only, but a privileged container's is writable")
    options = context.namespace_options.cgroupns_options
    if mode == "writable" and options.mode == pb.NODE and not context.privileged:
        validate.refuse(where, "read-write, but cgroupns_options are NODE without privileged")
    return mode


def _log_path(value: str, pod: SandboxConfig) -> str:
    if value and not pod.log_directory:
        validate.refuse("config.log_path", "is given, but the pod has no log_directory")
    return validate.relative_path(value, "config.log_path")


def _stop_signal(value: int) -> int:
    if value not in signals.NUMBERS:
        validate.refuse("config.stop_signal", f"{value} is not a signal")
    return signals.NUMBERS[value]


def _envs(messages: Sequence[pb.KeyValue]) -> tuple[tuple[str, bytes], ...]:
    validate.bounded(messages, "config.envs")
    for index, message in enumerate(messages):
        field = f"config.envs[{index}]"
        if not message.key or "=" in message.key:
            validate.refuse(f"{field}.key", f'"{message.key}" is not the name of a variable')
        validate.string(message.key, f"{field}.key")
        if b"\0" in message.value:
            validate.refuse(f"{field}.value", "has a NUL in it")
    return tuple((message.key, message.value) for message in messages)


def _devices(messages: Sequence[pb.Device]) -> tuple[DeviceConfig, ...]:
    field = "config.devices"
    validate.bounded(messages, field)
    return tuple(_device(message, f"{field}[{index}]") for index, message in enumerate(messages))


def _device(message: pb.Device, field: str) -> DeviceConfig:
    host_path = validate.path(message.host_path, f"{field}.host_path")
    path = message.container_path or host_path  # which plug-ins leave out where both are the same
    container_path = validate.container_path(path, f"{field}.container_path")
    if container_path == "/":
        validate.refuse(f"{field}.container_path", "the root file system is no place of a device")
    return DeviceConfig(
        container_path=container_path,
        host_path=host_path,
        permissions=validate.matching(
            message.permissions, _PERMISSIONS, f"{field}.permissions", "some of r, w and m"
        ),
    )


def _cdi_devices(messages: Sequence[pb.CDIDevice]) -> tuple[str, ...]:
    field = "config.CDI_devices"
    validate.bounded(messages, field)
    return tuple(
        validate.matching(
            message.name, cdi_specs.QUALIFIED, f"{field}[{index}].name", "vendor/class=device"
        )
        for index, message in enumerate(messages)
    )
