"""Records as the kubelet reads them."""

import pytest

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri import messages
from nodeagent.cri.translate_container import container_config
from nodeagent.cri.translate_sandbox import sandbox_config
from nodeagent.records import MountStatus
from nodeagent.requests import Namespaces, Resources
from tests.unit.cri import records, samples
from tests.unit.cri.test_translate_container import POD


def test_a_pod_comes_back_as_it_was_configured() -> None:
    asked = samples.sandbox()
    record = records.sandbox(runtime_handler="h", addresses=("10.0.0.5", "fd00::5"))
    record = type(record)(
        **{name: getattr(record, name) for name in record.__struct_fields__}
        | {"config": sandbox_config(asked)}
    )
    status, item = messages.sandbox_status(record), messages.sandbox_item(record)
    for message in (status, item):
        assert message.metadata == asked.metadata
        assert message.labels == asked.labels
        assert message.annotations == asked.annotations
        assert (message.id, message.created_at, message.runtime_handler) == ("s" * 64, 10, "h")
        assert message.state == pb.SANDBOX_READY
    wanted = asked.linux.security_context.namespace_options
    assert status.linux.namespaces.options == wanted
    assert status.network.ip == "10.0.0.5"
    assert [other.ip for other in status.network.additional_ips] == ["fd00::5"]


def test_a_stopped_pod() -> None:
    assert messages.sandbox_item(records.sandbox(stopped_at=30)).state == pb.SANDBOX_NOTREADY


def test_a_pod_on_the_nodes_network_has_no_network() -> None:
    """Present but without address, the kubelet would make the pod anew."""
    record = records.sandbox(config={"namespaces": Namespaces(network="node")})
    status = messages.sandbox_status(record)
    assert not status.HasField("network")
    assert status.linux.namespaces.options.network == pb.NODE


def test_a_container_comes_back_as_it_was_configured() -> None:
    asked = samples.container()
    config = container_config(asked, POD, "h")
    record = records.container(
        mounts=[MountStatus(config=mount, image_ref="m@sha256:1") for mount in config.mounts],
        resources=config.resources,
        stop_signal=config.stop_signal,
        uid=7,
        gid=8,
        groups=(8, 9),
    )
    record = type(record)(
        **{name: getattr(record, name) for name in record.__struct_fields__} | {"config": config}
    )
    status, item = messages.container_status(record), messages.container_item(record)
    for message in (status, item):
        assert message.metadata == asked.metadata
        assert message.labels == asked.labels
        assert message.annotations == asked.annotations
        assert message.image_id == "sha256:i"
        assert message.image_ref == "busybox@sha256:m"
        assert message.image == pb.ImageSpec(
            image="busybox",
            user_specified_image="busybox",
            runtime_handler="h",
            annotations={"i": "j"},
        )
        assert message.state == pb.CONTAINER_CREATED
        assert message.created_at == 30
    assert item.pod_sandbox_id == "s" * 64
    asked.mounts[1].image.image_ref = "m@sha256:1"
    assert list(status.mounts) == list(asked.mounts)
    assert status.resources.linux == asked.linux.resources
    assert status.stop_signal == pb.SIGNAL_SIGQUIT
    assert status.log_path == "/var/log/pods/web/main/0.log"
    assert (status.user.linux.uid, status.user.linux.gid) == (7, 8)
    assert status.user.linux.supplemental_groups == [8, 9]


def test_an_ended_container() -> None:
    status = messages.container_status(
        records.container(
            started_at=40, finished_at=50, exit_code=137, reason="OOMKilled", message="m"
        )
    )
    assert status.state == pb.CONTAINER_EXITED
    assert (status.started_at, status.finished_at, status.exit_code) == (40, 50, 137)
    assert (status.reason, status.message) == ("OOMKilled", "m")
    assert messages.container_item(records.container(started_at=1)).state == pb.CONTAINER_RUNNING


def test_resources_without_limits() -> None:
    status = messages.container_status(records.container(resources=Resources()))
    assert status.HasField("resources")
    assert status.resources.linux == pb.LinuxContainerResources()


@pytest.mark.parametrize(
    ("user", "uid", "username"),
    [
        ("", None, ""),
        ("1002", 1002, ""),
        ("1003:2", 1003, ""),
        ("www", None, "www"),
        ("www:10", None, "www"),
        (":10", None, ""),
        ("0", 0, ""),
    ],
)
def test_the_user_of_an_image(user: str, uid: int | None, username: str) -> None:
    message = messages.image(records.image(user=user))
    assert message.username == username
    assert (message.uid.value if message.HasField("uid") else None) == uid


def test_an_image() -> None:
    message = messages.image(records.image(pinned=True))
    assert (message.id, message.size, message.pinned) == ("sha256:i", 1234, True)
    assert message.repo_tags == ["docker.io/library/busybox:latest"]
    assert message.repo_digests == ["docker.io/library/busybox@sha256:m"]
