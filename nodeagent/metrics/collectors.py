"""The Prometheus metrics: the agent's own, and those of containers, which are read for each scrape."""

from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from nodeagent.images.usage import Counters
from nodeagent.lifecycle.node import Node
from nodeagent.lifecycle.usage.stats import LogUsage, SandboxUsage
from nodeagent.metrics.families import ACCOUNTED, NETWORK, Family, T

RPC_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
PULL_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)

PULL = "PullImage"
POD_LABELS = ("namespace", "pod")

MetricFamily = CounterMetricFamily | GaugeMetricFamily


class RpcMetrics:
    """Counts and durations of RPCs, noted as they end."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "nodeagent_rpc_duration_seconds",
            "Time from a call's arrival to its end",
            ["method"],
            buckets=RPC_SECONDS,
            registry=registry,
        )
        self._errors = Counter(
            "nodeagent_rpc_errors_total",
            "Calls that did not end with OK, by gRPC code",
            ["method", "code"],
            registry=registry,
        )
        self._pull_seconds = Histogram(
            "nodeagent_image_pull_duration_seconds",
            "Time of pulls that succeeded",
            buckets=PULL_SECONDS,
            registry=registry,
        )

    def observe(self, method: str, code: str, seconds: float) -> None:
        self._seconds.labels(method).observe(seconds)
        if code != "OK":
            self._errors.labels(method, code).inc()
        elif method == PULL:
            self._pull_seconds.observe(seconds)


class NodeCollector(Collector):
    """The objects of the node at the time of the scrape. A number that does not fall when objects go shows a leak."""

    def __init__(self, node: Node) -> None:
        pods = Tally("ready" if pod.ready else "notready" for pod in node.sandboxes.list())
        containers: Tally[str] = Tally(container.state for container in node.containers.list())
        images = node.images.list()
        self._families = (
            InfoMetricFamily("nodeagent_build", "The agent", {"version": node.version}),
            _gauge("nodeagent_pods", "Pods by state", pods, ("ready", "notready")),
            GaugeMetricFamily(
                "nodeagent_pods_not_answering",
                "Pods whose supervisor does not answer; the log and verbose Status say why",
                value=len(node.sandboxes.not_answering),
            ),
            _gauge(
                "nodeagent_containers",
                "Containers by state",
                containers,
                ("created", "running", "exited"),
            ),
            GaugeMetricFamily(
                "nodeagent_warm_slots",
                "Warm slots: pods prepared in advance",
                value=node.slots.ready,
            ),
            GaugeMetricFamily("nodeagent_images", "Images", value=len(images)),
            GaugeMetricFamily(
                "nodeagent_images_bytes",
                "Bytes of all images as transferred",
                value=sum(image.size_bytes for image in images),
            ),
            *_images(node.images.counters),
            _counter(
                "nodeagent_leaks_total",
                "Things that no record explained and that were removed; the log names each",
                "kind",
                node.reconciliation.leaks,
            ),
            _counter(
                "nodeagent_background_task_failures_total",
                "Failures of background tasks, by task; the log and verbose Status have the errors",
                "task",
                {name: failure.count for name, failure in node.tasks.failures.by_name.items()},
            ),
        )

    def collect(self) -> Iterable[MetricFamily | InfoMetricFamily]:
        return self._families


def _images(counters: Counters) -> Iterator[MetricFamily]:
    yield _counter(
        "nodeagent_image_pulls_total",
        "Pulls that ended",
        "result",
        {result: counters.pulls[result] for result in ("success", "failure")},
    )
    yield GaugeMetricFamily(
        "nodeagent_image_pulls_in_progress", "Pulls under way", value=counters.pulls_in_progress
    )
    yield _counter(
        "nodeagent_image_bytes_total",
        "Bytes of blobs that were fetched, or skipped because they were there",
        "how",
        {"fetched": counters.fetched_bytes, "skipped": counters.skipped_bytes},
    )
    yield _counter(
        "nodeagent_image_layers_total",
        "Layers that were fetched, or skipped because they were there",
        "how",
        {"fetched": counters.layers_fetched, "skipped": counters.layers_skipped},
    )


def _counter(name: str, help_: str, label: str, values: Mapping[str, float]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help_, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family


def _gauge(name: str, help_: str, counts: Tally[str], states: Iterable[str]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, help_, labels=["state"])
    for state in states:
        family.add_metric([state], counts[state])
    return family


class UsageCollector(Collector):
    """Usage of containers and pods, as it was read before."""

    def __init__(self, pods: Sequence[SandboxUsage]) -> None:
        self._pods = pods

    def collect(self) -> Iterator[MetricFamily]:
        containers = [
            ([*_names(pod), usage.container.config.name, usage.container.id], usage)
            for pod in self._pods
            for usage in pod.containers
        ]
        interfaces = [
            ([*_names(pod), pod.sandbox.id], interface)
            for pod in self._pods
            for interface in pod.interfaces
        ]
        for family in ACCOUNTED:
            yield _metric(family, (*POD_LABELS, "container", "id"), containers)
        for network in NETWORK:
            yield _metric(network, (*POD_LABELS, "id"), interfaces)


class LogCollector(Collector):
    """Losses and delays of containers' logs, counted since their supervisors started."""

    def __init__(self, logs: Sequence[LogUsage]) -> None:
        self._logs = logs

    def collect(self) -> Iterator[MetricFamily]:
        labels = (*POD_LABELS, "container", "id")
        dropped = CounterMetricFamily(
            "nodeagent_container_log_dropped_lines_total",
            "Lines that were lost: the log's disk was full, or the log could not be opened",
            labels=labels,
        )
        held_back = CounterMetricFamily(
            "nodeagent_container_log_held_back_seconds_total",
            "Time for which a container's output waited because of its log's rate limit",
            labels=labels,
        )
        for log in self._logs:
            whose = [*_names(log), log.container.config.name, log.container.id]
            dropped.add_metric(whose, log.dropped_lines)
            held_back.add_metric(whose, log.held_back_ms / 1000)
        yield from (dropped, held_back)


def _names(pod: SandboxUsage | LogUsage) -> tuple[str, str]:
    return pod.sandbox.config.namespace, pod.sandbox.config.name


def _metric(
    family: Family[T], labels: Sequence[str], things: Iterable[tuple[list[str], T]]
) -> MetricFamily:
    make = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = make(family.name, family.help, labels=[*labels, *family.labels])
    for whose, thing in things:
        for values, number in family.read(thing):
            metric.add_metric([*whose, *values], number)
    return metric
