"""What a node tells about itself over the CRI: metrics, events, streamed lists."""

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.support.cri import Cri
from tests.support.node import wait_for


def test_every_metric_has_a_value_for_a_plain_pod(cri: Cri) -> None:
    container = cri.run()
    runtime = cri.agent.runtime
    descriptors = runtime.ListMetricDescriptors(pb.ListMetricDescriptorsRequest()).descriptors
    keys = {descriptor.name: len(descriptor.label_keys) for descriptor in descriptors}
    assert len(keys) == 58
    pods = runtime.ListPodSandboxMetrics(pb.ListPodSandboxMetricsRequest()).pod_metrics
    (pod,) = [pod for pod in pods if pod.pod_sandbox_id == container.pod.id]
    found = [*pod.metrics, *(metric for c in pod.container_metrics for metric in c.metrics)]
    assert {metric.name for metric in found} == set(keys)
    for metric in found:
        assert len(metric.label_values) == keys[metric.name], metric
        assert metric.HasField("value")
        assert metric.timestamp > 0
    values = {metric.name: metric.value.value for metric in found}
    assert values["container_processes"] >= 1
    assert values["container_file_descriptors"] >= 3
    assert values["container_memory_usage_bytes"] > 0
    assert abs(values["container_start_time_seconds"] - time.time()) < 60
    container.pod.remove()


def test_streams_have_what_lists_have(cri: Cri) -> None:
    container = cri.run()
    runtime = cri.agent.runtime
    containers = list(runtime.ListContainers(pb.ListContainersRequest()).containers)
    streamed = runtime.StreamContainers(pb.StreamContainersRequest())
    assert [item for part in streamed for item in part.containers] == containers
    pods = list(runtime.ListPodSandbox(pb.ListPodSandboxRequest()).items)
    streamed_pods = runtime.StreamPodSandboxes(pb.StreamPodSandboxesRequest())
    assert [item for part in streamed_pods for item in part.pod_sandboxes] == pods
    ids = {
        part.container_stats[0].attributes.id
        for part in runtime.StreamContainerStats(pb.StreamContainerStatsRequest())
    }
    assert container.id in ids
    container.pod.remove()


@pytest.fixture(name="events")
def recorded_events(cri: Cri) -> Iterator[list[Any]]:
    """Everything that the agent tells while a test runs."""
    stream = cri.agent.runtime.GetContainerEvents(pb.GetEventsRequest())
    seen: list[Any] = []

    def read() -> None:
        with suppress(grpc.RpcError):  # the end cancels it
            for event in stream:
                seen.append(event)  # noqa: PERF402, each is looked at when it comes

    reader = threading.Thread(target=read)
    reader.start()
    _warm_up(cri, seen)
    yield seen
    stream.cancel()
    reader.join(timeout=60)


def _warm_up(cri: Cri, seen: list[Any]) -> None:
    """The stream begins some time after the call: make pods until one is told of."""

    def told() -> bool:
        cri.pod().remove()
        return bool(seen)

    wait_for("a first event", told)


def test_events_tell_a_life(cri: Cri, events: list[Any]) -> None:
    container = cri.run("sh", "-c", "exit 3")
    container.ended()
    pod = container.pod
    pod.remove()
    wait_for("the last event", lambda: (pod.id, 3) in kinds(events, pod.id, container.id))
    assert kinds(events, pod.id, container.id) == [
        (pod.id, pb.CONTAINER_CREATED_EVENT),
        (pod.id, pb.CONTAINER_STARTED_EVENT),
        (container.id, pb.CONTAINER_CREATED_EVENT),
        (container.id, pb.CONTAINER_STARTED_EVENT),
        (container.id, pb.CONTAINER_STOPPED_EVENT),
        (pod.id, pb.CONTAINER_STOPPED_EVENT),
        (container.id, pb.CONTAINER_DELETED_EVENT),
        (pod.id, pb.CONTAINER_DELETED_EVENT),
    ]
    (ended,) = [
        event
        for event in events
        if (event.container_id, event.container_event_type)
        == (container.id, pb.CONTAINER_STOPPED_EVENT)
    ]
    assert ended.pod_sandbox_status.metadata.name == pod.config.metadata.name
    assert [(c.state, c.exit_code) for c in ended.containers_statuses] == [(pb.CONTAINER_EXITED, 3)]


def kinds(events: list[Any], *ids: str) -> list[tuple[str, int]]:
    return [(e.container_id, e.container_event_type) for e in events if e.container_id in ids]
