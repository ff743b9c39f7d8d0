"""Translation of records to the messages that describe them.

The kubelet relies on more than the contract says: it drops a container without image, panics at usages that are not
set, and makes a pod anew whose network is present but has no address.
"""

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri.signals import signal_value
from nodeagent.cri.translate_mounts import mount_message
from nodeagent.cri.translate_namespaces import namespace_message
from nodeagent.cri.translate_resources import message_of
from nodeagent.records import Container, Image, Sandbox

_STATES = {
    "created": pb.CONTAINER_CREATED,
    "running": pb.CONTAINER_RUNNING,
    "exited": pb.CONTAINER_EXITED,
}


# --- pods -----------------------------------------------------------------------------------------------------------


def sandbox_state(sandbox: Sandbox) -> pb.PodSandboxState:
    return pb.SANDBOX_READY if sandbox.ready else pb.SANDBOX_NOTREADY


def sandbox_metadata(sandbox: Sandbox) -> pb.PodSandboxMetadata:
    config = sandbox.config
    return pb.PodSandboxMetadata(
        name=config.name, uid=config.uid, namespace=config.namespace, attempt=config.attempt
    )


def sandbox_item(sandbox: Sandbox) -> pb.PodSandbox:
    """A pod in a list."""
    return pb.PodSandbox(
        id=sandbox.id,
        metadata=sandbox_metadata(sandbox),
        state=sandbox_state(sandbox),
        created_at=sandbox.created_at,
        labels=sandbox.config.labels,
        annotations=sandbox.config.annotations,
        runtime_handler=sandbox.runtime_handler,
    )


def sandbox_status(sandbox: Sandbox) -> pb.PodSandboxStatus:
    return pb.PodSandboxStatus(
        id=sandbox.id,
        metadata=sandbox_metadata(sandbox),
        state=sandbox_state(sandbox),
        created_at=sandbox.created_at,
        network=_network(sandbox.addresses),
        linux=pb.LinuxPodSandboxStatus(
            namespaces=pb.Namespace(options=namespace_message(sandbox.config.namespaces))
        ),
        labels=sandbox.config.labels,
        annotations=sandbox.config.annotations,
        runtime_handler=sandbox.runtime_handler,
    )


def _network(addresses: tuple[str, ...]) -> pb.PodSandboxNetworkStatus | None:
    if not addresses:
        return None
    first, *others = addresses
    return pb.PodSandboxNetworkStatus(
        ip=first, additional_ips=[pb.PodIP(ip=address) for address in others]
    )


# --- containers -----------------------------------------------------------------------------------------------------


def container_state(container: Container) -> pb.ContainerState:
    return _STATES[container.state]


def container_metadata(container: Container) -> pb.ContainerMetadata:
    return pb.ContainerMetadata(name=container.config.name, attempt=container.config.attempt)


def container_item(container: Container) -> pb.Container:
    """A container in a list."""
    return pb.Container(
        id=container.id,
        pod_sandbox_id=container.sandbox_id,
        metadata=container_metadata(container),
        image=_image_spec(container),
        image_ref=container.image_ref,
        image_id=container.image_id,
        state=container_state(container),
        created_at=container.created_at,
        labels=container.config.labels,
        annotations=container.config.annotations,
    )


def container_status(container: Container) -> pb.ContainerStatus:
    return pb.ContainerStatus(
        id=container.id,
        metadata=container_metadata(container),
        state=container_state(container),
        created_at=container.created_at,
        started_at=container.started_at,
        finished_at=container.finished_at,
        exit_code=container.exit_code,
        image=_image_spec(container),
        image_ref=container.image_ref,
        image_id=container.image_id,
        reason=container.reason,
        message=container.message,
        labels=container.config.labels,
        annotations=container.config.annotations,
        mounts=[mount_message(mount) for mount in container.mounts],
        log_path=container.log_path,
        resources=pb.ContainerResources(linux=message_of(container.resources)),
        user=pb.ContainerUser(
            linux=pb.LinuxContainerUser(
                uid=container.uid, gid=container.gid, supplemental_groups=container.groups
            )
        ),
        stop_signal=pb.Signal.Name(signal_value(container.stop_signal)),
    )


def _image_spec(container: Container) -> pb.ImageSpec:
    """The image as the user asked for it."""
    config = container.config
    return pb.ImageSpec(
        image=container.image_name,
        annotations=config.image_annotations,
        user_specified_image=config.image_user_specified,
        runtime_handler=config.image_runtime_handler,
    )


# --- images ---------------------------------------------------------------------------------------------------------


def image(record: Image) -> pb.Image:
    """An image, with the uid or the name of its user; neither stands for root."""
    user = record.config.user.partition(":")[0]
    numeric = user.isdecimal()
    return pb.Image(
        id=record.id,
        repo_tags=record.repo_tags,
        repo_digests=record.repo_digests,
        size=record.size_bytes,
        uid=pb.Int64Value(value=int(user)) if numeric else None,
        username="" if numeric else user,
        pinned=record.pinned,
    )
