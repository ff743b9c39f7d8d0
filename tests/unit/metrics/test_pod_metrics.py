"""The metrics of the CRI: the names that the public validation suite wants, each with a value."""

import dataclasses

from nodeagent.cgroups.stats import CgroupStats, PressureStats
from nodeagent.metrics import pod_metrics
from nodeagent.metrics.families import device_name
from nodeagent.metrics.inspection import filesystem
from nodeagent.requests import ContainerConfig, Namespaces, SandboxConfig
from tests.unit.cri import records
from tests.unit.cri.node import FakeNode

WANTED = """
    blkio_device_usage_total cpu_cfs_periods_total cpu_cfs_throttled_periods_total
    cpu_cfs_throttled_seconds_total cpu_system_seconds_total cpu_usage_seconds_total cpu_user_seconds_total
    file_descriptors fs_inodes_free fs_inodes_total fs_limit_bytes fs_reads_bytes_total fs_reads_total
    fs_usage_bytes fs_writes_bytes_total fs_writes_total hugetlb_max_usage_bytes hugetlb_usage_bytes last_seen
    memory_cache memory_failcnt memory_failures_total memory_kernel_usage memory_mapped_file
    memory_max_usage_bytes memory_rss memory_swap memory_usage_bytes memory_working_set_bytes
    network_receive_bytes_total network_receive_errors_total network_receive_packets_dropped_total
    network_receive_packets_total network_transmit_bytes_total network_transmit_errors_total
    network_transmit_packets_dropped_total network_transmit_packets_total oom_events_total
    pressure_cpu_stalled_seconds_total pressure_cpu_waiting_seconds_total pressure_io_stalled_seconds_total
    pressure_io_waiting_seconds_total pressure_memory_stalled_seconds_total
    pressure_memory_waiting_seconds_total processes sockets spec_cpu_period spec_cpu_quota spec_cpu_shares
    spec_memory_limit_bytes spec_memory_reservation_limit_bytes spec_memory_swap_limit_bytes
    start_time_seconds threads threads_max ulimits_soft
""".split()

# What cAdvisor and containerd have besides, and dashboards draw: every pod has a value for it.
MORE = ["memory_total_active_file_bytes", "memory_total_inactive_file_bytes"]


async def running_pod() -> FakeNode:
    node = FakeNode()
    config = SandboxConfig(name="web", uid="u", namespace="prod")
    pod = await node.sandboxes.run(config, "")
    container = await node.containers.create(pod, ContainerConfig(name="main", image="i"))
    await node.containers.start(container)
    return node


async def values(node: FakeNode) -> dict[str, pod_metrics.Metric]:
    """One metric of each name."""
    (pod,) = await pod_metrics.read_pods(node.node)
    (of_container,) = pod.containers.values()
    return {metric.name: metric for metric in (*pod.metrics, *of_container)}


def test_the_names_are_those_that_are_wanted() -> None:
    assert len(WANTED) == 56
    named = sorted(descriptor.name for descriptor in pod_metrics.DESCRIPTORS)
    assert named == sorted(f"container_{name}" for name in WANTED + MORE)
    assert all(descriptor.help and descriptor.label_keys for descriptor in pod_metrics.DESCRIPTORS)


async def test_every_descriptor_has_a_value_with_its_labels() -> None:
    found = await values(await running_pod())
    for descriptor in pod_metrics.DESCRIPTORS:
        metric = found[descriptor.name]
        assert len(metric.label_values) == len(descriptor.label_keys), descriptor.name
        assert metric.label_values[:2] == ("web", "prod")
        assert metric.at_ns > 0
        assert metric.value >= 0


async def test_what_the_kernel_does_not_account_is_zero() -> None:
    node = await running_pod()
    nothing = CgroupStats(
        at_ns=1,
        cpu=None,
        memory=None,
        pids=None,
        io=(),
        hugetlb=(),
        pressure=PressureStats(cpu=None, memory=None, io=None),
    )
    node.stats.cgroup = nothing
    found = await values(node)
    assert {f"container_{name}" for name in WANTED + MORE} == set(found)
    assert found["container_pressure_cpu_waiting_seconds_total"].value == 0


async def test_some_values() -> None:
    found = await values(await running_pod())
    wanted = {
        "container_cpu_usage_seconds_total": 2.5,
        "container_memory_working_set_bytes": 800,
        "container_memory_failcnt": 23,
        "container_memory_total_active_file_bytes": 400,
        "container_memory_total_inactive_file_bytes": 200,
        "container_oom_events_total": 24,
        "container_threads": 6,
        "container_threads_max": 0,
        "container_processes": 1,
        "container_spec_cpu_period": 100_000,
        "container_fs_usage_bytes": 8192,
        "container_network_transmit_packets_dropped_total": 8,
        "container_hugetlb_max_usage_bytes": 42,
    }
    assert {name: found[name].value for name in wanted} == wanted
    assert found["container_file_descriptors"].value > 0
    assert found["container_fs_limit_bytes"].value > 0
    assert found["container_hugetlb_usage_bytes"].label_values[-1] == "2MB"
    assert found["container_network_receive_bytes_total"].label_values[-1] == "eth0"


async def test_a_pod_on_the_nodes_network_has_no_network_metrics() -> None:
    node = FakeNode()
    config = SandboxConfig(name="p", uid="u", namespace="n", namespaces=Namespaces(network="node"))
    await node.sandboxes.run(config, "")
    (pod,) = await pod_metrics.read_pods(node.node)
    assert (pod.metrics, pod.containers) == ([], {})


async def test_a_container_whose_file_system_is_gone_keeps_its_accounts() -> None:
    node = await running_pod()
    (usage,) = await node.stats.containers()
    gone = dataclasses.replace(usage, disk=dataclasses.replace(usage.disk, mountpoint="/no/such"))
    assert pod_metrics._inspect_all([(gone, [1]), (usage, [1])]).keys() == {usage.container.id}
    metrics = pod_metrics._container(records.sandbox(), gone, None)
    assert "container_cpu_usage_seconds_total" in {metric.name for metric in metrics}


def test_devices_by_name_or_number() -> None:
    assert device_name(4095, 4095) == "4095:4095"
    assert filesystem("/").device
