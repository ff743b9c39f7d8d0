"""RuntimeService over its socket, on a node in memory: requests arrive, answers say what the records say."""

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri.features import Features
from nodeagent.cri.runtime_containers import MAX_OUTPUT_BYTES, fit
from nodeagent.cri.server import MAX_MESSAGE_BYTES
from nodeagent.lifecycle.containers.exec_sync import ExecResult
from nodeagent.records import Container, Sandbox
from nodeagent.requests import Resources
from nodeagent.streaming.backend import AttachRequest, ExecRequest, PortForwardRequest, Request
from tests.unit.cri import samples
from tests.unit.cri.node import Client, serving, until


class Urls:
    """A streaming server that nobody connects to."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def url(self, request: Request) -> str:
        request.check()
        self.requests.append(request)
        return f"http://127.0.0.1:1/{request.path}/t"


URLS = Urls()


@pytest.fixture(name="client")
async def client_of_node(tmp_path: Path) -> AsyncIterator[Client]:
    URLS.requests.clear()
    features = Features(user_namespaces=True, cgroup_mount_mode=True)
    async with serving(tmp_path / "s", streaming=URLS, features=features) as client:
        yield client


async def code(call: object) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call  # type: ignore[misc]
    return error.value.code()


async def pod(client: Client, **fields: object) -> Sandbox:
    request = pb.RunPodSandboxRequest(config=samples.simple_sandbox(**fields))
    return client.node.sandboxes.get((await client.runtime.RunPodSandbox(request)).pod_sandbox_id)


async def container(client: Client, **fields: object) -> Container:
    request = pb.CreateContainerRequest(
        pod_sandbox_id=(await pod(client)).id, config=samples.simple_container(**fields)
    )
    return client.node.containers.get((await client.runtime.CreateContainer(request)).container_id)


async def running(client: Client, **fields: object) -> Container:
    made = await container(client, **fields)
    await client.runtime.StartContainer(pb.StartContainerRequest(container_id=made.id))
    return client.node.containers.get(made.id)


# --- the node -------------------------------------------------------------------------------------------------------


async def test_version(client: Client) -> None:
    version = await client.runtime.Version(pb.VersionRequest(version="0.1.0"))
    assert version == pb.VersionResponse(
        version="0.1.0",
        runtime_name="nodeagent",
        runtime_version="0.1.0",
        runtime_api_version="v1",
    )


async def test_status(client: Client) -> None:
    status = await client.runtime.Status(pb.StatusRequest())
    assert [(c.type, c.status, c.reason, c.message) for c in status.status.conditions] == [
        ("RuntimeReady", True, "", ""),
        ("NetworkReady", False, "BridgeMissing", "na0: no such link"),
    ]
    assert [handler.name for handler in status.runtime_handlers] == ["", "kata"]
    assert all(handler.features.user_namespaces for handler in status.runtime_handlers)
    assert status.features.mount_options
    assert not status.features.user_namespaces_host_network
    assert status.features.cgroup_mount_mode
    assert not status.features.seccomp_profile_oci
    assert not any(handler.features.cgroup_namespaces for handler in status.runtime_handlers)
    assert not status.info
    verbose = await client.runtime.Status(pb.StatusRequest(verbose=True))
    assert json.loads(verbose.info["config"])["root"] == "/var/lib/nodeagent"
    assert json.loads(verbose.info["network"]) == {"problems": ["no masquerade: nf_tables"]}
    assert json.loads(verbose.info["backgroundTaskFailures"]) == {}
    assert json.loads(verbose.info["podsNotAnswering"]) == {"a": "process 7 does not answer"}
    client.node.tasks.failures.expect("warm slots")
    client.node.tasks.failures.note("trash", KeyError("id"))
    verbose = await client.runtime.Status(pb.StatusRequest(verbose=True))
    (task, failure), *others = json.loads(verbose.info["backgroundTaskFailures"]).items()
    assert (task, others) == ("trash", [])
    assert (failure["failures"], failure["lastError"]) == (1, "KeyError: 'id'")
    assert datetime.fromisoformat(failure["lastFailedAt"]) <= datetime.now(UTC)


@pytest.mark.parametrize(("driver", "value"), [("cgroupfs", pb.CGROUPFS), ("systemd", pb.SYSTEMD)])
async def test_runtime_config(client: Client, driver: str, value: pb.CgroupDriver) -> None:
    client.node.cgroups.driver = driver
    config = await client.runtime.RuntimeConfig(pb.RuntimeConfigRequest())
    assert config.linux.cgroup_driver == value


async def test_update_runtime_config(client: Client) -> None:
    config = pb.RuntimeConfig(network_config=pb.NetworkConfig(pod_cidr="10.1.0.0/24,fd00::/64"))
    await client.runtime.UpdateRuntimeConfig(pb.UpdateRuntimeConfigRequest(runtime_config=config))
    assert client.node.pod_cidrs == ["10.1.0.0/24,fd00::/64"]


async def subscribed(client: Client) -> Any:
    stream = client.runtime.GetContainerEvents(pb.GetEventsRequest())
    await until(lambda: client.node.events._readers)
    return stream


async def test_events(client: Client) -> None:
    sandbox = await pod(client)
    made = await container(client)
    stream = await subscribed(client)
    client.node.events.publish("stopped", made.id, sandbox, (made,))
    client.node.events.publish("deleted", sandbox.id, None, ())
    stopped, deleted = await stream.read(), await stream.read()
    assert stopped.container_event_type == pb.CONTAINER_STOPPED_EVENT
    assert stopped.container_id == made.id
    assert stopped.created_at > 0
    assert stopped.pod_sandbox_status.metadata.name == "web"
    assert [status.id for status in stopped.containers_statuses] == [made.id]
    assert deleted.container_event_type == pb.CONTAINER_DELETED_EVENT
    assert not deleted.HasField("pod_sandbox_status")
    stream.cancel()


async def test_a_slow_reader_of_events_is_cut_off(client: Client) -> None:
    stream = await subscribed(client)
    for number in range(2000):
        client.node.events.publish("created", str(number), None, ())
    for number in range(1000):
        assert (await stream.read()).container_id == str(number)
    assert await code(stream.read()) == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not client.node.events._readers


# --- pods -----------------------------------------------------------------------------------------------------------


async def test_life_of_a_pod(client: Client) -> None:
    config = samples.simple_sandbox(labels={"app": "x"}, annotations={"a": "b"})
    run = pb.RunPodSandboxRequest(config=config, runtime_handler="kata")
    pod_id = (await client.runtime.RunPodSandbox(run)).pod_sandbox_id
    assert client.node.sandboxes.handlers == ["kata"]
    request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod_id)
    status = await client.runtime.PodSandboxStatus(request)
    assert status.status.state == pb.SANDBOX_READY
    assert status.status.network.ip == "10.0.0.2"
    assert status.timestamp > 0
    await client.runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod_id))
    state = pb.PodSandboxStateValue(state=pb.SANDBOX_NOTREADY)
    listed = await client.runtime.ListPodSandbox(
        pb.ListPodSandboxRequest(filter=pb.PodSandboxFilter(state=state))
    )
    assert [(item.id, item.labels["app"]) for item in listed.items] == [(pod_id, "x")]
    await client.runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod_id))
    assert not (await client.runtime.ListPodSandbox(pb.ListPodSandboxRequest())).items
    assert await code(client.runtime.PodSandboxStatus(request)) == grpc.StatusCode.NOT_FOUND


async def test_status_of_a_pod_has_its_containers(client: Client) -> None:
    made = await container(client)
    request = pb.PodSandboxStatusRequest(pod_sandbox_id=made.sandbox_id, verbose=True)
    status = await client.runtime.PodSandboxStatus(request)
    assert [c.id for c in status.containers_statuses] == [made.id]
    info = json.loads(status.info["info"])
    assert info["config"]["name"] == "web"
    assert info["pid"] == 77


async def test_update_of_a_pods_resources(client: Client) -> None:
    sandbox = await pod(client)
    request = pb.UpdatePodSandboxResourcesRequest(
        pod_sandbox_id=sandbox.id, resources=pb.LinuxContainerResources(cpu_shares=7)
    )
    await client.runtime.UpdatePodSandboxResources(request)
    assert client.node.sandboxes.updates == [(sandbox.id, None, Resources(cpu_shares=7))]
    request.overhead.cpu_shares = -1
    call = client.runtime.UpdatePodSandboxResources(request)
    assert await code(call) == grpc.StatusCode.INVALID_ARGUMENT


async def test_streams_of_lists_have_each_item(client: Client) -> None:
    made = await running(client)
    pods = [p async for p in client.runtime.StreamPodSandboxes(pb.StreamPodSandboxesRequest())]
    assert [item.id for part in pods for item in part.pod_sandboxes] == [made.sandbox_id]
    found = [c async for c in client.runtime.StreamContainers(pb.StreamContainersRequest())]
    assert [item.id for part in found for item in part.containers] == [made.id]
    stats = client.runtime.StreamContainerStats(pb.StreamContainerStatsRequest())
    assert [s.container_stats[0].attributes.id async for s in stats] == [made.id]
    pod_stats = client.runtime.StreamPodSandboxStats(pb.StreamPodSandboxStatsRequest())
    assert [s.pod_sandbox_stats[0].attributes.id async for s in pod_stats] == [made.sandbox_id]
    [pod] = (
        await client.runtime.ListPodSandboxMetrics(pb.ListPodSandboxMetricsRequest())
    ).pod_metrics
    values = {m.name: m for one in pod.container_metrics for m in one.metrics}
    usage = values["container_cpu_usage_seconds_total"]
    assert (usage.value.value, usage.double_value.value) == (2, 2.5)
    assert not values["container_threads"].HasField("double_value")
    metrics = client.runtime.StreamPodSandboxMetrics(pb.StreamPodSandboxMetricsRequest())
    assert [m.pod_sandbox_metrics[0].pod_sandbox_id async for m in metrics] == [made.sandbox_id]


# --- containers -----------------------------------------------------------------------------------------------------


async def test_life_of_a_container(client: Client) -> None:
    made = await running(client, labels={"tier": "1"})
    request = pb.ContainerStatusRequest(container_id=made.id)
    assert (await client.runtime.ContainerStatus(request)).status.state == pb.CONTAINER_RUNNING
    await client.runtime.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=made.id))
    assert client.node.containers.reopened == [made.id]
    await client.runtime.StopContainer(pb.StopContainerRequest(container_id=made.id, timeout=1))
    status = (await client.runtime.ContainerStatus(request)).status
    assert (status.state, status.exit_code) == (pb.CONTAINER_EXITED, 143)
    listed = await client.runtime.ListContainers(
        pb.ListContainersRequest(filter=pb.ContainerFilter(label_selector={"tier": "1"}))
    )
    assert [item.id for item in listed.containers] == [made.id]
    await client.runtime.RemoveContainer(pb.RemoveContainerRequest(container_id=made.id))
    assert not (await client.runtime.ListContainers(pb.ListContainersRequest())).containers
    again = client.runtime.StartContainer(pb.StartContainerRequest(container_id=made.id))
    assert await code(again) == grpc.StatusCode.NOT_FOUND


async def test_a_container_is_checked_against_its_pod(client: Client) -> None:
    request = pb.CreateContainerRequest(
        pod_sandbox_id=(await pod(client)).id, config=samples.in_container(privileged=True)
    )
    call = client.runtime.CreateContainer(request)
    assert await code(call) == grpc.StatusCode.INVALID_ARGUMENT
    request.pod_sandbox_id = "f" * 64
    assert await code(client.runtime.CreateContainer(request)) == grpc.StatusCode.NOT_FOUND


async def test_an_image_may_be_meant_for_its_pods_handler(client: Client) -> None:
    run = pb.RunPodSandboxRequest(config=samples.simple_sandbox(), runtime_handler="kata")
    pod_id = (await client.runtime.RunPodSandbox(run)).pod_sandbox_id
    config = samples.simple_container(image=pb.ImageSpec(image="busybox", runtime_handler="kata"))
    request = pb.CreateContainerRequest(pod_sandbox_id=pod_id, config=config)
    assert (await client.runtime.CreateContainer(request)).container_id
    request.config.image.runtime_handler = "gvisor"
    call = client.runtime.CreateContainer(request)
    assert await code(call) == grpc.StatusCode.INVALID_ARGUMENT


async def test_verbose_status_of_a_container_is_json(client: Client) -> None:
    made = await container(client, command=["a"], envs=[pb.KeyValue(key="A", value=b"\xff=")])
    request = pb.ContainerStatusRequest(container_id=made.id, verbose=True)
    info = json.loads((await client.runtime.ContainerStatus(request)).info["info"])
    assert info["sandboxID"] == made.sandbox_id
    assert info["config"]["envs"] == ["A=\ufffd="]
    assert info["plan"] == {"argv": ["a"]}
    assert info["log"] == {"droppedLines": 3, "heldBackMs": 1500}
    assert {"pid", "cgroupPath"} <= set(info)


async def test_update_of_a_containers_resources(client: Client) -> None:
    made = await running(client)
    request = pb.UpdateContainerResourcesRequest(
        container_id=made.id, linux=pb.LinuxContainerResources(memory_limit_in_bytes=1 << 20)
    )
    await client.runtime.UpdateContainerResources(request)
    status = await client.runtime.ContainerStatus(pb.ContainerStatusRequest(container_id=made.id))
    assert status.status.resources.linux.memory_limit_in_bytes == 1 << 20
    odd = pb.UpdateContainerResourcesRequest(
        container_id=made.id, windows=pb.WindowsContainerResources(cpu_count=1)
    )
    call = client.runtime.UpdateContainerResources(odd)
    assert await code(call) == grpc.StatusCode.UNIMPLEMENTED


async def test_annotations_of_an_update_are_passed_over(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    made = await running(client)
    request = pb.UpdateContainerResourcesRequest(
        container_id=made.id,
        linux=pb.LinuxContainerResources(memory_limit_in_bytes=1 << 20),
        annotations={"a": "b"},
    )
    with caplog.at_level("INFO"):
        await client.runtime.UpdateContainerResources(request)
    assert f'container "{made.id}": the annotations of an update are ignored' in caplog.text
    status = await client.runtime.ContainerStatus(pb.ContainerStatusRequest(container_id=made.id))
    assert status.status.resources.linux.memory_limit_in_bytes == 1 << 20


@pytest.mark.parametrize("seconds", [-1, 1 << 40])
async def test_timeouts_are_checked(client: Client, seconds: int) -> None:
    stop = pb.StopContainerRequest(container_id="x", timeout=seconds)
    assert await code(client.runtime.StopContainer(stop)) == grpc.StatusCode.INVALID_ARGUMENT
    run = pb.ExecSyncRequest(container_id="x", cmd=["true"], timeout=seconds)
    assert await code(client.runtime.ExecSync(run)) == grpc.StatusCode.INVALID_ARGUMENT


# --- commands and streams -------------------------------------------------------------------------------------------


async def test_exec_sync(client: Client) -> None:
    made = await running(client)
    request = pb.ExecSyncRequest(container_id=made.id, cmd=["ls", "-l"], timeout=9)
    reply = await client.runtime.ExecSync(request)
    assert reply == pb.ExecSyncResponse(stdout=b"out", stderr=b"err", exit_code=3)
    assert client.node.containers.commands == [(made.id, ("ls", "-l"), 9)]
    client.node.containers.result = TimeoutError("too long")
    assert await code(client.runtime.ExecSync(request)) == grpc.StatusCode.DEADLINE_EXCEEDED
    request.ClearField("cmd")
    assert await code(client.runtime.ExecSync(request)) == grpc.StatusCode.INVALID_ARGUMENT


async def test_the_largest_output_fits_into_a_message(client: Client) -> None:
    full = b"x" * (16 << 20)
    made = await running(client)
    client.node.containers.result = ExecResult(stdout=full, stderr=full, exit_code=255)
    reply = await client.runtime.ExecSync(
        pb.ExecSyncRequest(container_id=made.id, cmd=["yes"]), timeout=30
    )
    assert reply.ByteSize() <= MAX_MESSAGE_BYTES
    assert len(reply.stdout) == len(reply.stderr) == MAX_OUTPUT_BYTES // 2


@pytest.mark.parametrize(
    ("stdout", "stderr", "kept"),
    [(4, 4, (4, 4)), (20, 0, (10, 0)), (0, 20, (0, 10)), (20, 3, (7, 3)), (9, 9, (5, 5))],
)
def test_each_stream_gets_what_the_other_leaves(
    stdout: int, stderr: int, kept: tuple[int, int]
) -> None:
    assert tuple(map(len, fit(b"o" * stdout, b"e" * stderr, 10))) == kept


async def test_urls_of_streams(client: Client) -> None:
    made = await running(client, tty=True)
    run = pb.ExecRequest(container_id=made.id, cmd=["sh"], tty=True, stdin=True, stdout=True)
    assert (await client.runtime.Exec(run)).url == "http://127.0.0.1:1/exec/t"
    attach = pb.AttachRequest(container_id=made.id, tty=True, stdout=True)
    assert (await client.runtime.Attach(attach)).url == "http://127.0.0.1:1/attach/t"
    forward = pb.PortForwardRequest(pod_sandbox_id=made.sandbox_id, port=[80])
    assert (await client.runtime.PortForward(forward)).url == "http://127.0.0.1:1/portforward/t"
    assert URLS.requests == [
        ExecRequest(container_id=made.id, command=("sh",), tty=True, stdin=True, stdout=True),
        AttachRequest(container_id=made.id, tty=True, stdout=True),
        PortForwardRequest(sandbox_id=made.sandbox_id, ports=(80,)),
    ]


async def test_streams_need_something_that_runs(client: Client) -> None:
    made = await container(client)
    run = pb.ExecRequest(container_id=made.id, cmd=["sh"], stdout=True)
    assert await code(client.runtime.Exec(run)) == grpc.StatusCode.FAILED_PRECONDITION
    await client.runtime.StartContainer(pb.StartContainerRequest(container_id=made.id))
    run.tty = run.stderr = True
    assert await code(client.runtime.Exec(run)) == grpc.StatusCode.INVALID_ARGUMENT
    attach = pb.AttachRequest(container_id=made.id, tty=True, stdout=True)
    assert await code(client.runtime.Attach(attach)) == grpc.StatusCode.INVALID_ARGUMENT
    attach = pb.AttachRequest(container_id=made.id, stdin=True, stdout=True)
    assert await code(client.runtime.Attach(attach)) == grpc.StatusCode.INVALID_ARGUMENT
    await client.runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=made.sandbox_id))
    forward = pb.PortForwardRequest(pod_sandbox_id=made.sandbox_id, port=[80])
    assert await code(client.runtime.PortForward(forward)) == grpc.StatusCode.FAILED_PRECONDITION


async def test_without_streaming_server_streams_are_unsupported(tmp_path: Path) -> None:
    async with serving(tmp_path / "s") as client:
        made = await running(client)
        run = pb.ExecRequest(container_id=made.id, cmd=["sh"], stdout=True)
        assert await code(client.runtime.Exec(run)) == grpc.StatusCode.UNIMPLEMENTED


OF_ONE_OBJECT = [
    method
    for method in pb.DESCRIPTOR.services_by_name["RuntimeService"].methods
    if {"container_id", "pod_sandbox_id"} & {*method.input_type.fields_by_name}
    and not method.name.startswith(("Checkpoint", "Restore"))
]


@pytest.mark.parametrize("method", OF_ONE_OBJECT, ids=lambda method: str(method.name))
async def test_an_id_is_required(client: Client, method: MethodDescriptor) -> None:
    call = getattr(client.runtime, method.name)
    request = GetMessageClass(method.input_type)()
    assert await code(call(request)) == grpc.StatusCode.INVALID_ARGUMENT
