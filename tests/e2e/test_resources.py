"""Limits in force, statistics that are true, metrics that Prometheus can read."""

import itertools
import json
import os
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cgroups.manager import Cgroups
from tests.cri import Container, Cri, options
from tests.node import wait_for

LIMITS = pb.LinuxContainerResources(
    cpu_period=100_000, cpu_quota=50_000, cpu_shares=512, memory_limit_in_bytes=64 << 20
)
MEMORY_LIMIT = (
    "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null; true"
)
CPU_LIMIT = "cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null; true"


def limited(cri: Cri, *command: str) -> Container:
    return cri.run(*command, linux=pb.LinuxContainerConfig(resources=LIMITS))


def test_limits_are_in_force(cri: Cri) -> None:
    container = limited(cri)
    assert container.shell(MEMORY_LIMIT) == str(64 << 20)
    assert container.shell(CPU_LIMIT).split()[0] == "50000"
    assert container.status.resources.linux.memory_limit_in_bytes == 64 << 20
    container.pod.remove()


def test_update(cri: Cri) -> None:
    container = limited(cri)
    update = pb.LinuxContainerResources(memory_limit_in_bytes=96 << 20, cpu_quota=75_000)
    request = pb.UpdateContainerResourcesRequest(container_id=container.id, linux=update)
    cri.agent.runtime.UpdateContainerResources(request)
    assert container.shell(MEMORY_LIMIT) == str(96 << 20)
    assert container.shell(CPU_LIMIT).split()[0] == "75000"
    resources = container.status.resources.linux
    assert (resources.memory_limit_in_bytes, resources.cpu_quota) == (96 << 20, 75_000)
    assert resources.cpu_shares == 512
    container.pod.remove()


def test_update_is_all_or_nothing(cri: Cri) -> None:
    container = limited(cri)
    nonsense = pb.LinuxContainerResources(cpu_quota=80_000, cpuset_cpus="999")
    request = pb.UpdateContainerResourcesRequest(container_id=container.id, linux=nonsense)
    with pytest.raises(grpc.RpcError):
        cri.agent.runtime.UpdateContainerResources(request)
    assert container.shell(CPU_LIMIT).split()[0] == "50000"
    assert container.status.resources.linux.cpu_quota == 50_000
    container.pod.remove()


def test_update_of_memory_alone_leaves_the_swap(cri: Cri) -> None:
    mib = 1 << 20
    limits = pb.LinuxContainerResources(
        memory_limit_in_bytes=64 * mib, memory_swap_limit_in_bytes=64 * mib
    )
    container = cri.run(linux=pb.LinuxContainerConfig(resources=limits))
    for memory, both in ((96 * mib, 96 * mib), (-1, -1)):
        update(container, memory_limit_in_bytes=memory)
        resources = container.status.resources.linux
        assert resources.memory_limit_in_bytes == memory
        assert resources.memory_swap_limit_in_bytes == both
    container.pod.remove()


def test_update_of_oom_score(cri: Cri) -> None:
    scores = "for p in /proc/[0-9]*; do case $(tr '\\0' ' ' < $p/cmdline) in sleep*) cat $p/oom_score_adj; esac; done"
    limits = pb.LinuxContainerResources(oom_score_adj=600)
    container = cri.run(
        "sh", "-c", "sleep 1000 & exec sleep 1000", linux=pb.LinuxContainerConfig(resources=limits)
    )
    wait_for("both", lambda: container.shell(scores).split() == ["600", "600"])
    update(container, oom_score_adj=700)
    assert container.shell(scores).split() == ["700", "700"]
    assert container.status.resources.linux.oom_score_adj == 700
    with pytest.raises(grpc.RpcError):
        update(container, oom_score_adj=800, cpuset_cpus="999")
    assert container.shell(scores).split() == ["700", "700"]
    assert container.status.resources.linux.oom_score_adj == 700
    container.pod.remove()


def update(container: Container, **limits: Any) -> None:
    request = pb.UpdateContainerResourcesRequest(
        container_id=container.id, linux=pb.LinuxContainerResources(**limits)
    )
    container.pod.cri.agent.runtime.UpdateContainerResources(request)


def test_update_of_a_pod_changes_what_it_names(cri: Cri) -> None:
    mib = 1 << 20
    limit = pb.LinuxContainerResources(memory_limit_in_bytes=64 * mib, cpu_quota=50_000)
    overhead = pb.LinuxContainerResources(memory_limit_in_bytes=16 * mib, cpu_quota=10_000)
    pod = cri.pod(linux=pb.LinuxPodSandboxConfig(resources=limit, overhead=overhead))
    container = pod.run()
    assert available(container) == (80 * mib, 60_000)
    for changes, expected in (
        ({"resources": pb.LinuxContainerResources(cpu_quota=70_000)}, (80 * mib, 80_000)),
        ({"overhead": pb.LinuxContainerResources(cpu_quota=20_000)}, (80 * mib, 90_000)),
    ):
        request = pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod.id, **changes)
        cri.agent.runtime.UpdatePodSandboxResources(request)
        assert available(container) == expected
    container.stop()
    container.remove()
    assert available(pod.run(name="next")) == (80 * mib, 90_000)
    pod.remove()


def available(container: Container) -> tuple[int, int]:
    """Memory limit and CPU quota of the group above a container's."""
    request = pb.ContainerStatusRequest(container_id=container.id, verbose=True)
    info = container.pod.cri.agent.runtime.ContainerStatus(request).info["info"]
    parent = os.path.dirname(json.loads(info)["cgroupPath"])
    node = Cgroups.open(driver="cgroupfs", default_parent="/unused")
    limits = node.open_existing(parent).resources()
    return limits.memory_limit_bytes, limits.cpu_quota_usec


def test_statistics(cri: Cri) -> None:
    container = limited(
        cri, "sh", "-c", "dd if=/dev/zero of=/file bs=1M count=8; while :; do :; done"
    )
    runtime = cri.agent.runtime
    request = pb.ContainerStatsRequest(container_id=container.id)
    first = runtime.ContainerStats(request).stats
    assert first.attributes.id == container.id
    assert first.attributes.metadata.name == "main"
    time.sleep(1.2)
    second = runtime.ContainerStats(request).stats
    burnt = second.cpu.usage_core_nano_seconds.value - first.cpu.usage_core_nano_seconds.value
    elapsed = second.cpu.timestamp - first.cpu.timestamp
    assert 0.2 < burnt / elapsed < 0.8, "half a CPU is allowed"
    assert second.cpu.usage_nano_cores.value > 0
    assert 0 < second.memory.working_set_bytes.value <= 64 << 20
    assert second.memory.available_bytes.value > 0
    assert second.writable_layer.fs_id.mountpoint
    pod = runtime.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=container.pod.id)).stats
    assert pod.linux.network.default_interface.name == "eth0"
    assert pod.linux.process.process_count.value >= 1
    assert [c.attributes.id for c in pod.linux.containers] == [container.id]
    everyone = runtime.ListContainerStats(pb.ListContainerStatsRequest()).stats
    assert container.id in {stats.attributes.id for stats in everyone}
    container.pod.remove()


def test_what_has_ended_stays_in_the_accounts_of_its_pod(cri: Cri) -> None:
    burnt_ns = 300_000_000
    pod = cri.pod()
    pod.run(name="witness")
    script = "while [ $(($(cut -d' ' -f14,15 /proc/$$/stat | tr ' ' '+'))) -lt 30 ]; do :; done"
    pod.run("sh", "-c", script).ended(60)
    request = pb.PodSandboxStatsRequest(pod_sandbox_id=pod.id)
    linux = cri.agent.runtime.PodSandboxStats(request).stats.linux
    assert linux.cpu.usage_core_nano_seconds.value > 0.8 * burnt_ns
    assert [c.attributes.metadata.name for c in linux.containers] == ["witness"]
    assert linux.process.process_count.value == 1
    pod.remove()


def test_pods_in_one_group_have_accounts_of_their_own(cri: Cri) -> None:
    shared = pb.LinuxPodSandboxConfig(cgroup_parent=f"/na-test-{os.getpid()}/shared")
    one, other = cri.pod(linux=shared), cri.pod(linux=shared)
    one.run("sh", "-c", "sleep 1000 & sleep 1000 & wait")
    other.run()

    def processes(pod_id: str) -> int:
        request = pb.PodSandboxStatsRequest(pod_sandbox_id=pod_id)
        linux = cri.agent.runtime.PodSandboxStats(request).stats.linux
        count: int = linux.process.process_count.value
        return count

    wait_for("three", lambda: processes(one.id) == 3)
    assert processes(other.id) == 1
    one.remove()
    wait_for("the group is the other's", lambda: processes(other.id) == 1)
    other.remove()


def test_written_bytes_are_counted(cri: Cri) -> None:
    container = cri.pod().container(
        "sh", "-c", "dd if=/dev/zero of=/file bs=1M count=8; sleep 1000"
    )
    container.start()
    wait_for("the file", lambda: container.exec("test", "-s", "/file").exit_code == 0)
    request = pb.ContainerStatsRequest(container_id=container.id)
    layer = cri.agent.runtime.ContainerStats(request).stats.writable_layer
    assert layer.used_bytes.value >= 1 << 20
    assert layer.inodes_used.value >= 1
    container.pod.remove()


def test_who_asks_while_a_container_is_removed_leaves_no_file_open(cri: Cri) -> None:
    pod = cri.pod()
    asked = [pod.container(name=f"c{number}") for number in range(20)]
    removed = threading.Event()

    def ask() -> None:
        for container in itertools.cycle(asked):
            if removed.is_set():
                return
            request = pb.ContainerStatsRequest(container_id=container.id)
            with suppress(grpc.RpcError):
                cri.agent.runtime.ContainerStats(request, timeout=10)

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    for container in asked:
        container.remove()
    removed.set()
    for asker in askers:
        asker.join()
    pod.remove()
    files = Path(f"/proc/{cri.agent.pid}/fd")
    gone = {container.id for container in asked}
    left = [path for file in files.iterdir() if gone & {*(path := target(file)).split("/")}]
    assert not left


def target(file: Path) -> str:
    """Where a descriptor leads, if it is still open."""
    try:
        return os.readlink(file)
    except FileNotFoundError:
        return ""


def test_metrics(cri: Cri) -> None:
    container = limited(cri)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{cri.agent.metrics}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    name = container.pod.config.metadata.name
    samples = [
        sample
        for family in families.values()
        for sample in family.samples
        if sample.labels.get("pod") == name and sample.labels.get("container") == "main"
    ]
    measured = {sample.name for sample in samples}
    for part in ("cpu", "memory", "threads"):
        assert any(part in metric for metric in measured), measured
    assert all(sample.labels["namespace"] == "test" for sample in samples)
    container.pod.remove()


def test_pids_and_capabilities(cri: Cri) -> None:
    container = cri.run()
    default = container.shell("grep CapEff /proc/self/status").split()[1]
    assert default == "00000000a80425fb"
    container.pod.remove()
    drop = pb.Capability(drop_capabilities=["ALL"], add_capabilities=["NET_RAW"])
    container = cri.run(linux=options(capabilities=drop))
    assert container.shell("grep CapEff /proc/self/status").split()[1] == f"{1 << 13:016x}"
    container.pod.remove()


def test_default_confinement(cri: Cri) -> None:
    profile = pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)
    container = cri.run(linux=options(no_new_privs=True, seccomp=profile))
    status = container.shell("cat /proc/self/status")
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    container.pod.remove()
    container = cri.run()
    assert container.shell("cat /proc/kcore | head -c 1 | wc -c") == "0"
    assert container.exec("sh", "-c", "echo 1 > /proc/sys/kernel/printk").exit_code != 0
    assert container.exec("sh", "-c", "echo x > /sys/kernel/x").exit_code != 0
    container.pod.remove()
