"""Limits in force, statistics that are true, metrics that Prometheus can read."""

import itertools
import json
import os
import re
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nodeagent.api import runtime_pb2 as pb
from nodeagent.linux import capabilities, syscalls
from tests.e2e.conftest import client, running_agent
from tests.support import slices
from tests.support.cri import Container, Cri, options, pod_options, refused
from tests.support.node import wait_for
from tests.support.registry import Registry

CGROUPS = Path("/sys/fs/cgroup")
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


def test_a_small_quota_does_not_hold_up_the_creation(cri: Cri) -> None:
    """node-problem-detector's limit is 10m: what makes the container is not the container's work."""
    quota = pb.LinuxContainerResources(cpu_period=100_000, cpu_quota=1_000)
    container = cri.pod().container(linux=pb.LinuxContainerConfig(resources=quota))
    limit = quota_file(container)
    throttled = dict(line.split() for line in (limit.parent / "cpu.stat").read_text().splitlines())
    assert throttled["nr_throttled"] == "0"
    assert limit.read_text().split()[0] == "1000"
    container.pod.remove()


def quota_file(container: Container) -> Path:
    """The quota file of a container's group: on cgroup v2, groups with its id may have others in them."""
    names = ("cpu.cfs_quota_us", "cpu.max")
    groups = list(CGROUPS.rglob(f"*{container.id}*"))
    found = {path for group in groups for name in names for path in group.rglob(name)}
    (limited,) = (path for path in found if path.read_text().split()[0] not in ("max", "-1"))
    return limited


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
        update = pb.LinuxContainerResources(memory_limit_in_bytes=memory)
        cri.agent.runtime.UpdateContainerResources(
            pb.UpdateContainerResourcesRequest(container_id=container.id, linux=update)
        )
        resources = container.status.resources.linux
        assert resources.memory_limit_in_bytes == memory
        assert resources.memory_swap_limit_in_bytes == both
    container.pod.remove()


def test_update_of_the_oom_score(cri: Cri) -> None:
    """The score changes for processes that run, for those that are forked or executed later, and in the status."""
    pod = cri.pod(linux=pod_options(pid=pb.CONTAINER))
    container = pod.run("sh", "-c", "sleep 1000 & echo up; wait")
    container.said("up")
    scores = "cat /proc/self/oom_score_adj /proc/1/oom_score_adj /proc/2/oom_score_adj"
    assert set(container.shell(scores).split()) == {"0"}
    update = pb.LinuxContainerResources(oom_score_adj=500)
    request = pb.UpdateContainerResourcesRequest(container_id=container.id, linux=update)
    cri.agent.runtime.UpdateContainerResources(request)
    assert set(container.shell(scores).split()) == {"500"}
    assert container.status.resources.linux.oom_score_adj == 500
    request.linux.CopyFrom(pb.LinuxContainerResources(oom_score_adj=600, cpuset_cpus="999"))
    with pytest.raises(grpc.RpcError):
        cri.agent.runtime.UpdateContainerResources(request)
    assert set(container.shell(scores).split()) == {"500"}
    assert container.status.resources.linux.oom_score_adj == 500
    container.pod.remove()


def test_an_oom_score_that_cannot_be_had(cri: Cri) -> None:
    """Either it is in force, or the answer says why it is not."""
    container = cri.pod(linux=pod_options(pid=pb.CONTAINER)).run()
    update = pb.LinuxContainerResources(oom_score_adj=-900)
    request = pb.UpdateContainerResourcesRequest(container_id=container.id, linux=update)
    wanted = -900 if capabilities.mask(["SYS_RESOURCE"]) & syscalls.capget()[1] else 0
    if wanted:
        cri.agent.runtime.UpdateContainerResources(request)
    else:
        refused(
            grpc.StatusCode.PERMISSION_DENIED,
            "oom_score_adj -900: needs CAP_SYS_RESOURCE",
            lambda: cri.agent.runtime.UpdateContainerResources(request),
        )
    assert container.shell("cat /proc/1/oom_score_adj") == str(wanted)
    assert container.status.resources.linux.oom_score_adj == wanted
    container.pod.remove()


def test_a_memory_limit_that_is_too_low_to_prepare_the_container_is_named(cri: Cri) -> None:
    pod = cri.pod()
    limits = pb.LinuxContainerResources(memory_limit_in_bytes=128 << 10)
    refused(
        grpc.StatusCode.FAILED_PRECONDITION,
        'container "main": its first process was OOM-killed before it executed the program: the memory limit of '
        "131072 bytes is too low; raise it, to 4 MiB at least",
        lambda: pod.container(linux=pb.LinuxContainerConfig(resources=limits)),
    )
    pod.run()  # nothing of the one that failed is in the way of the next
    pod.remove()


def pod_memory_limit(container: Container) -> int:
    """The limit of the cgroup that the agent made for the pod: on v2, two levels above the container's.

    The one between has the container's ID as its name, or in the name of a scope.
    """
    request = pb.ContainerStatusRequest(container_id=container.id, verbose=True)
    info = json.loads(container.pod.cri.agent.runtime.ContainerStatus(request).info["info"])
    parent, _ = re.split(rf"/[^/]*{container.id}", info["cgroupPath"])
    files = (
        Path(f"/sys/fs/cgroup{parent}/memory.max"),
        Path(f"/sys/fs/cgroup/memory{parent}/memory.limit_in_bytes"),
    )
    return next(int(file.read_text()) for file in files if file.exists())


def test_limits_of_a_pod(cri: Cri) -> None:
    """What an update does not speak of stays, the overhead too."""
    mib = 1 << 20
    linux = pb.LinuxPodSandboxConfig(
        resources=pb.LinuxContainerResources(memory_limit_in_bytes=64 * mib, cpu_shares=512),
        overhead=pb.LinuxContainerResources(memory_limit_in_bytes=8 * mib),
    )
    container = cri.pod(linux=linux).run()
    assert pod_memory_limit(container) == 72 * mib
    more = pb.LinuxContainerResources(memory_limit_in_bytes=128 * mib)
    request = pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=container.pod.id, resources=more)
    cri.agent.runtime.UpdatePodSandboxResources(request)
    assert pod_memory_limit(container) == 136 * mib
    status = pb.PodSandboxStatusRequest(pod_sandbox_id=container.pod.id, verbose=True)
    info = json.loads(cri.agent.runtime.PodSandboxStatus(status).info["info"])
    assert info["config"]["resources"] == {"cpu_shares": 512, "memory_limit_bytes": 128 * mib}
    container.pod.remove()


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
    pod = cri.pod(linux=pod_options(pid=pb.CONTAINER))  # without a process that holds a namespace
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
    shared = pod_options(pid=pb.CONTAINER)
    shared.cgroup_parent = slices.place(f"/na-test-{os.getpid()}/shared")
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
                cri.agent.runtime.ContainerStats(request, timeout=60)

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
    with opener.open(f"http://{cri.agent.metrics}/metrics", timeout=60) as answer:
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


def test_a_limit_that_no_container_can_have_is_said_once(
    tmp_path_factory: pytest.TempPathFactory, registry: Registry
) -> None:
    """Nobody has more files open than fs.nr_open, with CAP_SYS_RESOURCE or without."""
    config = '[rlimits]\nnofile = "1024:unlimited"\n'
    with running_agent(tmp_path_factory, registry, config) as agent:
        pod = client(agent, registry).pod()
        first, _ = (pod.container(name=name) for name in ("one", "two"))
        warnings = [line for line in agent.log.read_text().splitlines() if "limit NOFILE" in line]
        assert len(warnings) == 1, warnings
        assert f'container "{first.id}": limit NOFILE: not raised above' in warnings[0]
        assert warnings[0].endswith("not repeated for other containers")
        pod.remove()


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
