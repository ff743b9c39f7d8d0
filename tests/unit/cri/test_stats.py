"""Usages as the kubelet reads them: it panics at messages that are not set."""

import dataclasses
from typing import Any

import pytest
from google.protobuf.message import Message

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cgroups.stats import CgroupStats, PressureStats
from nodeagent.cri import stats
from nodeagent.lifecycle.usage.disk import DiskUsage
from nodeagent.lifecycle.usage.stats import ContainerUsage, GroupUsage, SandboxUsage
from tests.unit.cri import records
from tests.unit.cri.node import SECOND, full_cgroup, interface

NO_PRESSURE = PressureStats(cpu=None, memory=None, io=None)
DISK = DiskUsage(mountpoint="/", used_bytes=8192, inodes_used=4, at_ns=7 * SECOND)


def usage(cgroup: CgroupStats | None = None, **fields: Any) -> ContainerUsage:
    values: dict[str, Any] = {"at_ns": 8 * SECOND, "usage_nano_cores": 250, "disk": DISK} | fields
    return ContainerUsage(
        container=records.container(config={"labels": {"a": "b"}}, started_at=31),
        cgroup=cgroup or full_cgroup(),
        **values,
    )


def pod(*containers: ContainerUsage, **fields: Any) -> SandboxUsage:
    values: dict[str, Any] = {
        "group": None,
        "interfaces": (interface(),),
        "at_ns": 9 * SECOND,
    } | fields
    return SandboxUsage(sandbox=records.sandbox(), containers=containers, **values)


def test_a_container() -> None:
    message = stats.container_stats(usage())
    assert message.attributes.metadata.name == "main"
    assert message.attributes.labels == {"a": "b"}
    assert message.cpu.usage_core_nano_seconds.value == 2_500_000_000
    assert message.cpu.usage_nano_cores.value == 250
    assert message.cpu.psi.Some == pb.PsiData(Total=2_500_000_000, Avg10=1.5, Avg60=2.5, Avg300=3.5)
    assert message.cpu.psi.Full.Total == 1_500_000_000
    memory = message.memory
    assert (memory.usage_bytes.value, memory.working_set_bytes.value) == (1000, 800)
    assert (memory.available_bytes.value, memory.rss_bytes.value) == (4200, 300)
    assert (memory.page_faults.value, memory.major_page_faults.value) == (21, 22)
    assert (message.swap.swap_usage_bytes.value, message.swap.swap_available_bytes.value) == (
        90,
        100,
    )
    assert message.writable_layer.used_bytes.value == 8192
    assert message.writable_layer.inodes_used.value == 4
    assert message.writable_layer.fs_id.mountpoint == "/"
    assert message.io.psi.Some.Avg300 == 3.5


def test_what_is_not_known_is_not_set() -> None:
    nothing = CgroupStats(
        at_ns=1, cpu=None, memory=None, pids=None, io=(), hugetlb=(), pressure=NO_PRESSURE
    )
    message = stats.container_stats(usage(nothing, usage_nano_cores=None))
    for part in ("cpu", "memory", "swap", "io"):
        assert not message.HasField(part), part
    assert message.HasField("writable_layer")
    message = stats.container_stats(usage(usage_nano_cores=None))
    assert not message.cpu.HasField("usage_nano_cores")


def test_without_limits_nothing_is_available() -> None:
    full = full_cgroup()
    assert full.memory is not None
    memory = dataclasses.replace(full.memory, limit_bytes=None, swap_limit_bytes=None)
    message = stats.container_stats(usage(dataclasses.replace(full, memory=memory)))
    assert not message.memory.HasField("available_bytes")
    assert not message.swap.HasField("swap_available_bytes")


def test_a_pod_without_group_is_the_sum_of_its_containers() -> None:
    message = stats.sandbox_stats(pod(usage(), usage()))
    linux = message.linux
    assert message.attributes.metadata.uid == "u"
    assert linux.cpu.usage_core_nano_seconds.value == 5_000_000_000
    assert linux.cpu.usage_nano_cores.value == 500
    assert linux.memory.working_set_bytes.value == 1600
    assert linux.memory.available_bytes.value == 8400
    assert linux.process.process_count.value == 12
    assert len(linux.containers) == 2
    assert linux.network.default_interface.name == "eth0"
    assert linux.network.default_interface.rx_bytes.value == 1
    assert linux.network.default_interface.tx_errors.value == 7
    assert not linux.network.interfaces


def test_a_pod_is_what_its_group_says() -> None:
    group = GroupUsage(cgroup=full_cgroup(), usage_nano_cores=77)
    linux = stats.sandbox_stats(pod(usage(), usage(), group=group)).linux
    assert linux.cpu.usage_core_nano_seconds.value == 2_500_000_000
    assert linux.cpu.usage_nano_cores.value == 77
    assert linux.memory.available_bytes.value == 4200
    assert linux.process.process_count.value == 6
    assert linux.cpu.psi.Some.Avg10 == linux.memory.psi.Some.Avg10 == linux.io.psi.Some.Avg10 == 1.5
    assert len(linux.containers) == 2


def test_a_pod_on_the_nodes_network_has_no_network() -> None:
    assert not stats.sandbox_stats(pod(usage(), interfaces=())).linux.HasField("network")


def test_an_empty_pod_uses_nothing() -> None:
    linux = stats.sandbox_stats(pod()).linux
    assert linux.cpu.usage_core_nano_seconds.value == 0
    assert linux.HasField("memory")
    assert linux.process.HasField("process_count")


def timestamps(message: Message) -> list[int]:
    found = []
    for field, value in message.ListFields():
        if field.name == "timestamp":
            found.append(value)
        children = value if field.is_repeated else [value]
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            found += [stamp for child in children for stamp in timestamps(child)]
    return found


@pytest.mark.parametrize(
    "message", [stats.container_stats(usage()), stats.sandbox_stats(pod(usage()))]
)
def test_every_block_has_its_time(message: Message) -> None:
    blocks = timestamps(message)
    assert len(blocks) >= 5
    assert all(stamp >= 7 * SECOND for stamp in blocks)
