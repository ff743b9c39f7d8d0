"""Translation of NamespaceOption to `Namespaces`, and ID mappings."""

from collections.abc import Sequence
from typing import Literal

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri import validate
from nodeagent.linux.userns import MAX_ID
from nodeagent.requests import IdMapping, Namespaces, OwnOrNodes, SandboxConfig, UserNamespace
from nodeagent.words import NamespaceMode

_MAX_MAPPINGS = 340  # UID_GID_MAP_MAX_EXTENTS

_PID: dict[int, NamespaceMode] = {
    pb.POD: "pod",
    pb.CONTAINER: "container",
    pb.NODE: "node",
    pb.TARGET: "target",
}
_MODES: dict[str, pb.NamespaceMode] = {
    "pod": pb.POD,
    "container": pb.CONTAINER,
    "node": pb.NODE,
    "target": pb.TARGET,
}
_CONTAINER_OR_NODE: dict[int, Literal["container", "node"]] = {
    pb.CONTAINER: "container",
    pb.NODE: "node",
}
_POD_OR_NODE: dict[int, OwnOrNodes] = {pb.POD: "pod", pb.NODE: "node"}


def pod_namespaces(message: pb.NamespaceOption, field: str) -> Namespaces:
    """Translate a pod's options. An absent message counts as one of zero values: everything is shared by the pod."""
    pid = validate.word(message.pid, _PID, f"{field}.pid")
    if pid == "target":
        validate.refuse(f"{field}.pid", "TARGET is for containers")
    if message.target_id:
        validate.refuse(f"{field}.target_id", "is for containers")
    if message.HasField("cgroupns_options"):
        validate.refuse(f"{field}.cgroupns_options", "is for containers")
    return Namespaces(
        network=validate.word(message.network, _POD_OR_NODE, f"{field}.network"),
        pid=pid,
        ipc=validate.word(message.ipc, _POD_OR_NODE, f"{field}.ipc"),
        user=_user_namespace(message, f"{field}.userns_options"),
    )


def container_namespaces(message: pb.NamespaceOption, pod: SandboxConfig, field: str) -> Namespaces:
    """Return the pod's namespaces with the container's own PID mode; POD, the zero value, means as the pod was made.

    NODE is refused where the pod has a namespace of its own, and another user namespace than the pod's.
    """
    own = pod.namespaces
    for kind in ("network", "ipc"):
        mode = validate.word(getattr(message, kind), _POD_OR_NODE, f"{field}.{kind}")
        _no_escape(mode, getattr(own, kind), f"{field}.{kind}")
    pid = validate.word(message.pid, _PID, f"{field}.pid")
    _no_escape(pid, own.pid, f"{field}.pid")
    if (pid == "target") != bool(message.target_id):
        validate.refuse(f"{field}.target_id", "is needed with pid TARGET, and only then")
    asked = Namespaces(user=_user_namespace(message, f"{field}.userns_options"))
    if asked.user is not None and asked.user_mapping != own.user_mapping:
        validate.refuse(f"{field}.userns_options", "differs from the pod's")
    return Namespaces(
        network=own.network,
        pid=own.pid if pid == "pod" else pid,
        ipc=own.ipc,
        target=validate.text(message.target_id, f"{field}.target_id"),
        user=own.user,
        cgroup=_cgroup_namespace(message, f"{field}.cgroupns_options"),
    )


def _cgroup_namespace(message: pb.NamespaceOption, field: str) -> Literal["container", "node"]:
    if not message.HasField("cgroupns_options"):
        return "container"
    return validate.word(message.cgroupns_options.mode, _CONTAINER_OR_NODE, f"{field}.mode")


def _no_escape(asked: NamespaceMode, pod: NamespaceMode, field: str) -> None:
    if asked == "node" and pod != "node":
        validate.refuse(field, "NODE, but the pod has a namespace of its own")


def _user_namespace(message: pb.NamespaceOption, field: str) -> UserNamespace | None:
    if not message.HasField("userns_options"):
        return None
    options = message.userns_options
    mode = validate.word(options.mode, _POD_OR_NODE, f"{field}.mode")
    if mode == "node":
        if options.uids or options.gids:
            validate.refuse(f"{field}.mode", "NODE has no mappings")
        return UserNamespace(mode="node")
    return UserNamespace(
        mode="pod",
        uids=(_root_mapping(options.uids, f"{field}.uids"),),
        gids=(_root_mapping(options.gids, f"{field}.gids"),),
    )


def _root_mapping(messages: Sequence[pb.IDMapping], field: str) -> IdMapping:
    mappings = id_mappings(messages, field)
    if len(mappings) != 1:
        validate.refuse(field, f"has {len(mappings)} mappings, must be exactly one")
    if mappings[0].inside != 0:
        validate.refuse(f"{field}[0].container_id", "must be 0, so that root is mapped")
    return mappings[0]


def id_mappings(messages: Sequence[pb.IDMapping], field: str) -> tuple[IdMapping, ...]:
    validate.bounded(messages, field, _MAX_MAPPINGS)
    found = []
    for index, message in enumerate(messages):
        room = MAX_ID + 1 - max(message.container_id, message.host_id)
        validate.number(message.length, f"{field}[{index}].length", 1, room)
        found.append(
            IdMapping(inside=message.container_id, outside=message.host_id, length=message.length)
        )
    return tuple(found)


def namespace_message(namespaces: Namespaces) -> pb.NamespaceOption:
    return pb.NamespaceOption(
        network=_MODES[namespaces.network],
        pid=_MODES[namespaces.pid],
        ipc=_MODES[namespaces.ipc],
        target_id=namespaces.target,
        userns_options=_user_message(namespaces.user) if namespaces.user else None,
    )


def _user_message(user: UserNamespace) -> pb.UserNamespace:
    return pb.UserNamespace(
        mode=_MODES[user.mode],
        uids=mapping_messages(user.uids),
        gids=mapping_messages(user.gids),
    )


def mapping_messages(mappings: Sequence[IdMapping]) -> list[pb.IDMapping]:
    return [
        pb.IDMapping(container_id=m.inside, host_id=m.outside, length=m.length) for m in mappings
    ]
