"""RuntimeService: the calls about usage. The methods have the names of the RPCs."""
# ruff: noqa: N802

from collections.abc import AsyncGenerator

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri import listing, stats
from nodeagent.cri.runtime_containers import container_id
from nodeagent.cri.runtime_sandboxes import sandbox_id
from nodeagent.lifecycle.node import Node
from nodeagent.lifecycle.usage.stats import ContainerUsage, SandboxUsage
from nodeagent.metrics import pod_metrics as metrics

_TYPES: dict[str, pb.MetricType] = {"counter": pb.COUNTER, "gauge": pb.GAUGE}


class StatsCalls:
    def __init__(self, node: Node) -> None:
        self._node = node
        self._stats = node.stats

    # --- containers ---

    async def ContainerStats(self, request: pb.ContainerStatsRequest) -> pb.ContainerStatsResponse:
        usage = await self._stats.container(container_id(request.container_id))
        return pb.ContainerStatsResponse(stats=stats.container_stats(usage))

    async def ListContainerStats(
        self, request: pb.ListContainerStatsRequest
    ) -> pb.ListContainerStatsResponse:
        usages = await self._container_usages(request.filter)
        return pb.ListContainerStatsResponse(stats=map(stats.container_stats, usages))

    async def StreamContainerStats(
        self, request: pb.StreamContainerStatsRequest
    ) -> AsyncGenerator[pb.StreamContainerStatsResponse, None]:
        for usage in await self._container_usages(request.filter):
            yield pb.StreamContainerStatsResponse(container_stats=[stats.container_stats(usage)])

    async def _container_usages(self, given: pb.ContainerStatsFilter) -> list[ContainerUsage]:
        usages = {usage.container.id: usage for usage in await self._stats.containers()}
        wanted = listing.members(
            [usage.container for usage in usages.values()],
            given.id,
            given.pod_sandbox_id,
            given.label_selector,
        )
        return [usages[container.id] for container in wanted]

    # --- pods ---

    async def PodSandboxStats(
        self, request: pb.PodSandboxStatsRequest
    ) -> pb.PodSandboxStatsResponse:
        usage = await self._stats.sandbox(sandbox_id(request.pod_sandbox_id))
        return pb.PodSandboxStatsResponse(stats=stats.sandbox_stats(usage))

    async def ListPodSandboxStats(
        self, request: pb.ListPodSandboxStatsRequest
    ) -> pb.ListPodSandboxStatsResponse:
        usages = await self._sandbox_usages(request.filter)
        return pb.ListPodSandboxStatsResponse(stats=map(stats.sandbox_stats, usages))

    async def StreamPodSandboxStats(
        self, request: pb.StreamPodSandboxStatsRequest
    ) -> AsyncGenerator[pb.StreamPodSandboxStatsResponse, None]:
        for usage in await self._sandbox_usages(request.filter):
            yield pb.StreamPodSandboxStatsResponse(pod_sandbox_stats=[stats.sandbox_stats(usage)])

    async def _sandbox_usages(self, given: pb.PodSandboxStatsFilter) -> list[SandboxUsage]:
        usages = {usage.sandbox.id: usage for usage in await self._stats.sandboxes()}
        found = listing.by_id([usage.sandbox for usage in usages.values()], given.id)
        return [
            usages[sandbox.id]
            for sandbox in found
            if listing.has_labels(sandbox.config.labels, given.label_selector)
        ]

    # --- metrics ---

    async def ListMetricDescriptors(
        self, request: pb.ListMetricDescriptorsRequest
    ) -> pb.ListMetricDescriptorsResponse:
        return pb.ListMetricDescriptorsResponse(
            descriptors=[
                pb.MetricDescriptor(name=d.name, help=d.help, label_keys=d.label_keys)
                for d in metrics.DESCRIPTORS
            ]
        )

    async def ListPodSandboxMetrics(
        self, request: pb.ListPodSandboxMetricsRequest
    ) -> pb.ListPodSandboxMetricsResponse:
        pods = await metrics.read_pods(self._node)
        return pb.ListPodSandboxMetricsResponse(pod_metrics=map(_pod_metrics, pods))

    async def StreamPodSandboxMetrics(
        self, request: pb.StreamPodSandboxMetricsRequest
    ) -> AsyncGenerator[pb.StreamPodSandboxMetricsResponse, None]:
        for pod in await metrics.read_pods(self._node):
            yield pb.StreamPodSandboxMetricsResponse(pod_sandbox_metrics=[_pod_metrics(pod)])


def _pod_metrics(pod: metrics.PodMetrics) -> pb.PodSandboxMetrics:
    return pb.PodSandboxMetrics(
        pod_sandbox_id=pod.sandbox_id,
        metrics=map(_metric, pod.metrics),
        container_metrics=[
            pb.ContainerMetrics(container_id=container_id, metrics=map(_metric, values))
            for container_id, values in pod.containers.items()
        ],
    )


def _metric(metric: metrics.Metric) -> pb.Metric:
    """The whole number, and the value with its fraction if it has one: a kubelet before 1.38 reads the former only."""
    whole = int(metric.value)
    return pb.Metric(
        name=metric.name,
        timestamp=metric.at_ns,
        metric_type=_TYPES[metric.kind],
        label_values=metric.label_values,
        value=pb.UInt64Value(value=whole),
        double_value=pb.DoubleValue(value=metric.value) if metric.value != whole else None,
    )
