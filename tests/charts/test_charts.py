"""The most used charts and add-ons: their pods start and behave, and nothing is left of them.

Each pod goes through the whole of its life on a node of the tests' own: see `tests.charts.node` for the node,
`tests.charts.chart` for the data, and `tests.charts.kubelet` for what a kubelet makes of them.
"""

import re
from collections.abc import Iterator

import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.charts.chart import Chart, Json, charts
from tests.charts.conftest import skipped
from tests.charts.kubelet import IDS
from tests.charts.node import Node
from tests.charts.observation import observe
from tests.charts.pods import ChartPod
from tests.support import slices
from tests.support.node import PATIENCE_SECONDS

# What the agent says that it skips of the charts: labels, and what it may not do itself without CAP_SYS_RESOURCE.
KNOWN = re.compile(
    r"INFO nodeagent\.lifecycle\.plan\.selinux: this kernel has no SELinux: "
    r"selinux_options of all containers are ignored|"
    r'WARNING nodeagent\.lifecycle\.containers\.\w+: container "[0-9a-f]{64}": '
    r"(capability SYS_RESOURCE: not available|oom_score_adj -997: not permitted|limit NOFILE: not raised above)"
)


@pytest.fixture
def pod(request: pytest.FixtureRequest, node: Node, cgroup_root: str) -> Iterator[ChartPod]:
    pod = ChartPod.of(request.param, node, cgroup_root)
    yield pod
    pod.remove()


@pytest.mark.parametrize("pod", charts(), ids=lambda chart: chart.name, indirect=True)
def test_chart(pod: ChartPod, node: Node) -> None:
    if pod.chart.lacking:
        pytest.skip(f"this machine lacks {pod.chart.lacking}")
    before = node.mounts()
    pod.run()
    pod.probe()
    for spec in pod.chart.staying:
        observe(pod, spec)
    for seen in pod.chart.see:
        _see(pod, seen)
    pod.stop()
    pod.remove()
    for point in reversed(pod.chart.leaves):
        node.shell(f"umount {point}")
    assert node.mounts() == before


@pytest.mark.parametrize(
    "chart", [c for c in charts() if c.takes_a_user_namespace], ids=lambda chart: chart.name
)
def test_chart_in_a_user_namespace(chart: Chart, node: Node, cgroup_root: str) -> None:
    """A chart with `hostUsers: false`: inside, all is as it is without."""
    pod = ChartPod.of(chart, node, cgroup_root, user_namespace=True)
    try:
        pod.run()
        pod.probe()
        for spec in chart.staying:
            observe(pod, spec)
            mapped = pod.containers[spec["name"]].shell("cat /proc/self/uid_map").split()
            assert mapped == ["0", str(IDS.host_id), str(IDS.length)]
        for seen in chart.see:
            _see(pod, seen)
        pod.stop()
    finally:
        pod.remove()


def _see(pod: ChartPod, seen: Json) -> None:
    if seen["in"] == "node":
        text = pod.node.run("env", f"POD_IP={pod.address}", "sh", "-ec", seen["run"]).strip()
    else:
        text = pod.containers[seen["in"]].shell(seen["run"])
    assert re.search(seen["says"], text), text


def test_the_driver_is_that_of_the_kubelet_s_cgroups(node: Node) -> None:
    """The kubelet goes by what the agent says: with systemd beside cgroup v2, the pods above were in slices."""
    answer = node.runtime.RuntimeConfig(pb.RuntimeConfigRequest(), timeout=PATIENCE_SECONDS)
    assert answer.linux.cgroup_driver == (pb.SYSTEMD if slices.are_used() else pb.CGROUPFS)


def test_what_is_skipped_is_known(node: Node) -> None:
    """Runs after the charts; the list is printed at the end of the run."""
    assert [line for line in skipped(node) if not KNOWN.search(line)] == []


def test_the_data_name_their_source() -> None:
    assert len(charts()) >= 25
    for chart in charts():
        assert chart.source.startswith("https://"), chart.name
        assert chart.version, chart.name


def test_every_chart_is_seen_from_inside_or_from_the_node() -> None:
    blind = [chart.name for chart in charts() if not chart.see]
    assert not blind


def _unused(chart: Chart) -> set[str]:
    mounted = {m["name"] for spec in chart.all_containers for m in spec.get("volumeMounts", ())}
    return {volume["name"] for volume in chart.spec.get("volumes", ())} - mounted


def test_no_volume_of_the_data_is_without_a_mount() -> None:
    assert not {chart.name: _unused(chart) for chart in charts() if _unused(chart)}
