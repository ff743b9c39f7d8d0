"""Malformed requests get a code and a text that names the object, and leave nothing behind."""

import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.support.cri import Cri, Pod, options, refused

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND


@pytest.fixture
def pod(cri: Cri) -> Pod:
    return cri.pod()


def test_unknown_ids(cri: Cri) -> None:
    runtime = cri.agent.runtime
    refused(
        NOT_FOUND,
        "nope",
        lambda: runtime.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id="nope")),
    )
    refused(
        NOT_FOUND,
        "nope",
        lambda: runtime.ContainerStatus(pb.ContainerStatusRequest(container_id="nope")),
    )
    refused(
        NOT_FOUND,
        "nope",
        lambda: runtime.StartContainer(pb.StartContainerRequest(container_id="nope")),
    )
    refused(
        NOT_FOUND,
        "nope",
        lambda: runtime.ContainerStats(pb.ContainerStatsRequest(container_id="nope")),
    )
    refused(
        NOT_FOUND,
        "nope",
        lambda: runtime.ExecSync(pb.ExecSyncRequest(container_id="nope", cmd=["true"])),
    )
    runtime.StopContainer(pb.StopContainerRequest(container_id="nope"))
    runtime.RemoveContainer(pb.RemoveContainerRequest(container_id="nope"))
    runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id="nope"))
    runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id="nope"))


def test_missing_image(pod: Pod) -> None:
    image = pb.ImageSpec(image="registry.invalid/none:1")
    refused(NOT_FOUND, "registry.invalid/none:1", lambda: pod.container(image=image))


def test_missing_user(pod: Pod) -> None:
    linux = options(run_as_username="nobody-knows-me")
    refused(NOT_FOUND, "nobody-knows-me", lambda: pod.container(linux=linux))


@pytest.fixture
def missing(tmp_path: Path) -> pb.Mount:
    """The target of a host path that is a link to nothing: nothing is made where that leads."""
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    return pb.Mount(container_path="/data", host_path=f"{tmp_path}/link")


def test_missing_host_path(pod: Pod, missing: pb.Mount) -> None:
    refused(NOT_FOUND, missing.host_path, lambda: pod.container(mounts=[missing]))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"mounts": [pb.Mount(container_path="a/../../b", host_path="/tmp")]}, "container_path"),
        ({"envs": [pb.KeyValue(key="A=B", value=b"")]}, "envs[0].key"),
        ({"envs": [pb.KeyValue(key="A", value=b"\0")]}, "envs[0].value"),
        ({"log_path": "../../etc/cron.d/x"}, "log_path"),
        ({"working_dir": "relative"}, "working_dir"),
        ({"linux": options(run_as_group=pb.Int64Value(value=1))}, "run_as_group"),
        ({"linux": options(privileged=True)}, "privileged"),
        ({"linux": options(run_as_user=pb.Int64Value(value=-1))}, "run_as_user"),
    ],
)
def test_malformed_containers(pod: Pod, fields: dict[str, Any], text: str) -> None:
    refused(INVALID, text, lambda: pod.container(**fields))
    request = pb.ListContainersRequest(filter=pb.ContainerFilter(pod_sandbox_id=pod.id))
    assert not pod.cri.agent.runtime.ListContainers(request).containers
    pod.remove()


def test_malformed_pods(cri: Cri) -> None:
    refused(INVALID, "metadata", lambda: cri.agent.runtime.RunPodSandbox(pb.RunPodSandboxRequest()))
    refused(INVALID, "hostname", lambda: cri.pod(hostname="two words"))
    refused(
        INVALID,
        "cgroup_parent",
        lambda: cri.pod(linux=pb.LinuxPodSandboxConfig(cgroup_parent="a/../b")),
    )
    refused(
        INVALID,
        'cgroup "/": not an absolute path below the root',
        lambda: cri.pod(linux=pb.LinuxPodSandboxConfig(cgroup_parent="/")),
    )
    refused(INVALID, "log_directory", lambda: cri.pod(log_directory="relative"))


def test_unknown_runtime_handler(cri: Cri) -> None:
    config = pb.PodSandboxConfig(
        metadata=pb.PodSandboxMetadata(name="handler", uid="handler", namespace="test")
    )
    request = pb.RunPodSandboxRequest(config=config, runtime_handler="kata")
    refused(INVALID, "kata", lambda: cri.agent.runtime.RunPodSandbox(request))


def test_failures_leave_nothing(cri: Cri, missing: pb.Mount) -> None:
    pod = cri.pod()
    root = cri.agent.root / "lib"
    before = sorted(path.name for path in (root / "containers").iterdir())
    groups = set(cgroups_of(pod.id))
    for _ in range(3):
        refused(NOT_FOUND, missing.host_path, lambda: pod.container(mounts=[missing]))
    assert sorted(path.name for path in (root / "containers").iterdir()) == before
    assert set(cgroups_of(pod.id)) == groups
    pod.remove()
    time.sleep(0.1)
    assert not list(cgroups_of(pod.id))


def cgroups_of(pod_id: str) -> list[Path]:
    return [path for path in Path("/sys/fs/cgroup").glob(f"**/{pod_id}*") if path.is_dir()]
