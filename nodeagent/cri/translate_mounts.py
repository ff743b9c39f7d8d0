"""Translation of Mount to `MountConfig`, and what ContainerStatus says about mounts."""

from collections.abc import Sequence

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri import translate_images, validate
from nodeagent.cri.translate_namespaces import id_mappings, mapping_messages
from nodeagent.records import MountStatus
from nodeagent.requests import MountConfig, SandboxConfig
from nodeagent.words import Propagation

_OPTIONS = ("noexec", "nodev", "nosuid")

_PROPAGATION: dict[int, Propagation] = {
    pb.PROPAGATION_PRIVATE: "private",
    pb.PROPAGATION_HOST_TO_CONTAINER: "slave",
    pb.PROPAGATION_BIDIRECTIONAL: "shared",
}
_PROPAGATION_VALUE = {word: pb.MountPropagation.Name(n) for n, word in _PROPAGATION.items()}


def mounts(
    messages: Sequence[pb.Mount], pod: SandboxConfig, handler: str
) -> tuple[MountConfig, ...]:
    """Translate mounts. pod: the config that the container's sandbox was made with; handler: its runtime handler."""
    validate.bounded(messages, "config.mounts")
    return tuple(
        _mount(m, f"config.mounts[{index}]", pod, handler) for index, m in enumerate(messages)
    )


def _mount(message: pb.Mount, field: str, pod: SandboxConfig, handler: str) -> MountConfig:
    translate_images.check(message.image, f"{field}.image", {"", handler})
    path = validate.container_path(message.container_path, f"{field}.container_path")
    mount = MountConfig(
        container_path=path,
        asked_path=message.container_path if message.container_path != path else "",
        host_path=validate.optional_path(message.host_path, f"{field}.host_path"),
        readonly=message.readonly,
        recursive_read_only=message.recursive_read_only,
        selinux_relabel=message.selinux_relabel,
        propagation=validate.word(message.propagation, _PROPAGATION, f"{field}.propagation"),
        uids=id_mappings(message.uidMappings, f"{field}.uidMappings"),
        gids=id_mappings(message.gidMappings, f"{field}.gidMappings"),
        image=validate.text(message.image.image, f"{field}.image.image"),
        image_user_specified=validate.text(
            message.image.user_specified_image, f"{field}.image.user_specified_image"
        ),
        image_annotations=validate.metadata(
            message.image.annotations, f"{field}.image.annotations"
        ),
        image_runtime_handler=message.image.runtime_handler,
        image_sub_path=validate.relative_path(message.image_sub_path, f"{field}.image_sub_path"),
        options=_options(message.mount_options, f"{field}.mount_options"),
    )
    if message.HasField("image"):
        _check_image(mount, field, pod)
    else:
        _check_bind(mount, field)
    _check_together(mount, field)
    return mount


def _options(values: Sequence[str], field: str) -> tuple[str, ...]:
    validate.bounded(values, field)
    for index, value in enumerate(values):
        validate.one_of(value, _OPTIONS, f"{field}[{index}]")
    return tuple(dict.fromkeys(values))


def _check_bind(mount: MountConfig, field: str) -> None:
    if not mount.host_path:
        validate.refuse(f"{field}.host_path", "is required without an image")
    if mount.image_sub_path:
        validate.refuse(f"{field}.image_sub_path", "needs an image")


def _check_image(mount: MountConfig, field: str, pod: SandboxConfig) -> None:
    """Check a mount of an image: its files get the ids of the pod, as those of the container's own image do.

    The mount is made for this container alone and nothing is mounted in it: all propagation modes mean the same.
    """
    if mount.host_path:
        validate.refuse(f"{field}.image", "a mount has a host_path or an image, not both")
    validate.given(mount.image, f"{field}.image.image")
    if not mount.readonly:
        validate.refuse(f"{field}.readonly", "an image can only be mounted read-only")
    own = pod.namespaces.user_mapping
    if mount.uids and (own is None or (mount.uids, mount.gids) != (own.uids, own.gids)):
        validate.refuse(f"{field}.uidMappings", "an image is mapped as its pod is, or not at all")


def _check_together(mount: MountConfig, field: str) -> None:
    if mount.container_path == "/":
        validate.refuse(f"{field}.container_path", "the root file system cannot be covered")
    if bool(mount.uids) != bool(mount.gids):
        missing = "gidMappings" if mount.uids else "uidMappings"
        validate.refuse(f"{field}.{missing}", "user and group mappings go together")
    if mount.recursive_read_only and not mount.readonly:
        validate.refuse(f"{field}.recursive_read_only", "needs readonly")
    if mount.recursive_read_only and mount.propagation != "private":
        validate.refuse(f"{field}.recursive_read_only", "needs PROPAGATION_PRIVATE")


def mount_message(status: MountStatus) -> pb.Mount:
    """A mount as reported, with the path as requested: by it the kubelet finds the file of a termination message."""
    mount = status.config
    message = pb.Mount(
        container_path=mount.asked_path or mount.container_path,
        host_path=mount.host_path,
        readonly=mount.readonly,
        recursive_read_only=mount.recursive_read_only,
        selinux_relabel=mount.selinux_relabel,
        propagation=_PROPAGATION_VALUE[mount.propagation],
        uidMappings=mapping_messages(mount.uids),
        gidMappings=mapping_messages(mount.gids),
        image_sub_path=mount.image_sub_path,
        mount_options=mount.options,
    )
    if mount.image:
        message.image.image = mount.image
        message.image.user_specified_image = mount.image_user_specified
        message.image.annotations.update(mount.image_annotations)
        message.image.runtime_handler = mount.image_runtime_handler
        message.image.image_ref = status.image_ref
    return message
