"""A real kubelet runs static pods on the agent. The tests are one story and stand in its order."""

import json
import os
import re
import time
import urllib.request
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nodeagent.api import runtime_pb2 as pb
from tests.conformance.suite import NO_HOST_PORTS
from tests.kubelet import manifests
from tests.kubelet.conftest import Node
from tests.kubelet.node import LoggedError, cgroups
from tests.support import images, slices
from tests.support.node import wait_for

pytestmark = pytest.mark.timeout(240)

ROUNDS_SECONDS = 5  # some rounds of the kubelet's probes and lists
READY = ("web", "health", "graceful")
STEADY = (("web", "server"), ("web", "client"), ("web", "sidecar"), ("health", "health"))

MEMORY_LIMIT_FILES = ("memory.limit_in_bytes", "memory.max")  # of cgroup v1 and v2

# What the kubelet logs as errors on a healthy node of this kind, by a regular expression, and why.
EXPLAINED = {
    "no default routes found": "a machine without a network has no address",
    "failed to check if node is newer": "without an API server a node has no version",
    "Failed to set rlimit on max file handles": "root may lack CAP_SYS_RESOURCE",
    "Failed to find cgroups of kubelet": "it was not given a cgroup of its own",
    "failed to find pid namespace of init process": "a process with more capabilities than root's",
    "checkpoint is not found": "the first start",
    "Skipping pod synchronization": "until the first list of the runtime's pods",
    "no imagefs label for configured runtime": "it knows a split disk of one runtime only",
    'PodSandbox.*podSandboxID=""': "whether a runtime has statistics of pods is asked with no ID",
    "with CrashLoopBackOff": "what the pods are for",
    "(ContainerStatus|get container status).* code = NotFound": "it removed the container since it listed it",
    "ContainerStatus.* code = Canceled": "who followed a log went away",
    "ExecSync.* code = FailedPrecondition": "its probe came when the container had just ended",
    "Housekeeping took longer than expected": "a busy or slow machine",
    "Version.* code = Canceled": "it gave up what it was doing for a pod that was deleted",
    "stats for.*unable to find data in memory cache": "its own group, until the first of its rounds",
    "Set failed: openat2.*/cpuset.cpus: no such file": "the kernel has no controller of processors",
    "Failed to get network devices": "a link of a pod went away since it listed the node's",
    # The runtime has no part in these: other tests judge streams, and what is left of a pod.
    r'^(conn|upgradeaware)\.go.*"Error (on socket receive|proxying data)': "a stream's client went away",
    r"^(?!kuberuntime_|remote_|pod_workers)(?!.* code = ).*/(lib/pods|sys/fs/cgroup)/.*: no such file or directory": (
        "it looked at a pod's folder or group while another of its workers removed it"
    ),
}
# What it logs, besides, while the agent or itself is stopped, and until it has connected again.
OF_AN_OUTAGE = (
    "code = Unavailable",
    "connection error|error reading from server",  # the texts of Unavailable, where it drops the code
    "code = Canceled desc = context canceled",
    "container runtime is down",
    "PLEG is not healthy",
)
RECONNECTED = timedelta(seconds=10)  # gRPC's pause between two attempts, and a busy machine

# Of each running container, in /metrics/cadvisor.
CONTAINER_METRICS = {
    "container_cpu_usage_seconds",
    "container_cpu_user_seconds",
    "container_cpu_system_seconds",
    "container_last_seen",
    "container_memory_cache",
    "container_memory_rss",
    "container_memory_usage_bytes",
    "container_memory_working_set_bytes",
    "container_memory_failcnt",
    "container_processes",
    "container_threads",
    "container_start_time_seconds",
    "container_spec_cpu_shares",
    "container_oom_events",
}
# Of each pod with a network of its own.
POD_METRICS = {
    "container_network_receive_bytes",
    "container_network_receive_packets",
    "container_network_transmit_bytes",
    "container_network_transmit_packets",
}


@pytest.mark.parametrize("name", READY)
def test_pod_becomes_ready(node: Node, name: str) -> None:
    pod = node.kubelet.wait_for(name, "is ready", is_ready)
    assert pod["status"]["phase"] == "Running"
    assert pod["status"]["podIP"]


def test_init_containers_ran_in_order(node: Node) -> None:
    """The sidecar was started when the first had ended, and the containers when the sidecar had passed its probe."""
    status = node.kubelet.pods["web"]["status"]
    prepare, sidecar = status["initContainerStatuses"]
    client = statuses(node, "web")["client"]
    ended = prepare["state"]["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (0, "Completed")
    assert sidecar["started"]
    assert ended["finishedAt"] <= sidecar["state"]["running"]["startedAt"]
    assert sidecar["state"]["running"]["startedAt"] < client["state"]["running"]["startedAt"]


def test_volumes(node: Node) -> None:
    kubelet = node.kubelet
    assert kubelet.run("web", "client", "cat", "/memory/prepared")
    assert "tmpfs" in kubelet.run("web", "client", "grep", "/memory", "/proc/mounts")
    assert kubelet.run("web", "client", "cat", "/downward/labels") == 'app="web"'
    assert kubelet.run("web", "client", "cat", "/downward/memory") == str(manifests.MEMORY_LIMIT)
    kubelet.run("web", "client", "touch", "/host/seen")
    assert (node.host_folder / "seen").exists()


def test_host_port(node: Node) -> None:
    if node.host_port is None:
        pytest.skip(NO_HOST_PORTS)
    with urllib.request.urlopen(f"http://127.0.0.1:{node.host_port}/", timeout=60) as answer:
        assert answer.read().decode() == images.PAGE


def test_limits_reach_the_kernel(node: Node) -> None:
    identity = statuses(node, "web")["client"]["containerID"].partition("://")[2]
    status = container_status(node, identity)
    assert status.resources.linux.memory_limit_in_bytes == manifests.MEMORY_LIMIT
    assert status.resources.linux.cpu_quota == 25000
    own = [cgroup for cgroup in cgroups(node.cgroup) if identity in str(cgroup)]
    files = [own_group / name for own_group in own for name in MEMORY_LIMIT_FILES]
    found = [file.read_text().strip() for file in files if file.exists()]
    assert [limit for limit in found if limit != "max"] == [str(manifests.MEMORY_LIMIT)]


def test_kubelet_uses_the_driver_of_the_agent(node: Node) -> None:
    """Nobody but the agent's RuntimeConfig has told it."""
    answer = node.agent.runtime.RuntimeConfig(pb.RuntimeConfigRequest(), timeout=60)
    assert answer.linux.cgroup_driver == (pb.SYSTEMD if slices.are_used() else pb.CGROUPFS)
    assert {group.suffix for group in pod_cgroups(node)} == {".slice" if slices.are_used() else ""}


def test_logs(node: Node) -> None:
    address = node.kubelet.pods["web"]["status"]["podIP"]
    assert node.kubelet.get("/containerLogs/default/web-node/client") == f"hello from {address}\n"
    wait_for("the access log", lambda: "GET / HTTP" in log(node, "web", "server"))
    assert log(node, "web", "server", "?tailLines=1").count("\n") == 1
    node.kubelet.wait_for("crash", "ran twice", lambda _: restarts(node, "crash") > 0)
    # The kubelet may just have removed the one that its status still names.
    wait_for("a log", lambda: log(node, "crash", "crash", "?previous=true") == "going down\n")


def test_container_that_ends_well(node: Node) -> None:
    pod = node.kubelet.wait_for("once", "ended", lambda pod: pod["status"]["phase"] == "Succeeded")
    ended = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (ended["reason"], ended["exitCode"]) == ("Completed", 0)
    assert ended["message"] == "all is well\n"


def test_container_that_crashes_is_backed_off(node: Node) -> None:
    def waits(pod: dict[str, Any]) -> bool:
        state = pod["status"]["containerStatuses"][0]["state"]
        return bool(state["waiting"]["reason"] == "CrashLoopBackOff")

    pod = node.kubelet.wait_for("crash", "is backed off", waits)
    ended = pod["status"]["containerStatuses"][0]["lastState"]["terminated"]
    assert (ended["reason"], ended["exitCode"]) == ("Error", 3)


def test_container_that_takes_too_much_memory(node: Node) -> None:
    pod = node.kubelet.wait_for("hungry", "ended", lambda pod: pod["status"]["phase"] == "Failed")
    ended = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (ended["reason"], ended["exitCode"]) == ("OOMKilled", 137)


def test_container_that_fails_its_liveness_probe(node: Node) -> None:
    node.kubelet.wait_for("unhealthy", "was restarted", lambda _: restarts(node, "unhealthy") > 0)
    ended = statuses(node, "unhealthy")["unhealthy"]["lastState"]["terminated"]
    assert ended["exitCode"] == 137


def test_summary_is_complete(node: Node) -> None:
    def complete() -> bool:
        """The rate of the CPU needs two of the kubelet's rounds."""
        pods = summary(node)
        return all("usageNanoCores" in pods[name]["cpu"] for name in READY)

    wait_for("two rounds of statistics", complete)
    pods = summary(node)
    for pod in (pods[name] for name in READY):
        assert pod["memory"]["workingSetBytes"] > 0
        assert pod["process_stats"]["process_count"] > 0
        assert pod["network"]["name"]
        assert {"rxBytes", "txBytes", "rxErrors", "txErrors"} <= pod["network"].keys()
        for container in pod["containers"]:
            assert container["cpu"]["usageCoreNanoSeconds"] > 0
            assert container["memory"]["workingSetBytes"] > 0
            assert "rssBytes" in container["memory"]
            assert container["rootfs"]["usedBytes"] >= 0
            assert container["rootfs"]["capacityBytes"] > 0
            assert "usedBytes" in container["logs"]
    assert min(pods["web"]["network"][name] for name in ("rxBytes", "txBytes")) > 0
    assert {c["name"] for c in pods["web"]["containers"]} == {"server", "client", "sidecar"}


def test_metrics_are_complete(node: Node) -> None:
    samples: dict[tuple[str, str], set[str]] = {}
    for family in text_string_to_metric_families(node.kubelet.get("/metrics/cadvisor")):
        for sample in family.samples:
            pod = sample.labels.get("pod", "").removesuffix("-node")
            names = samples.setdefault((pod, sample.labels.get("container", "")), set())
            names.add(family.name)
    for key in STEADY:
        assert samples.get(key, set()) >= CONTAINER_METRICS, key
    for pod in READY:
        of_pod = set.union(*(names for key, names in samples.items() if key[0] == pod))
        assert of_pod >= POD_METRICS, pod
    resource = node.kubelet.get("/metrics/resource")
    for pod, container in STEADY:
        labels = f'container="{container}",namespace="default",pod="{pod}-node"'
        assert f"container_memory_working_set_bytes{{{labels}}}" in resource


def test_kubelet_restarts_and_touches_nothing(node: Node) -> None:
    before = identities(node)
    with node.outage():
        node.kubelet.stop()
        node.kubelet.start()
    assert_undisturbed(node, before)


def test_agent_restarts_and_pods_do_not_notice(node: Node) -> None:
    before = identities(node)
    with node.outage():
        node.agent.restart()
    assert_undisturbed(node, before)
    assert node.kubelet.run("web", "client", "hostname") == "web-node\n"
    crashes = restarts(node, "crash")
    node.kubelet.wait_for("crash", "runs again", lambda _: restarts(node, "crash") > crashes)


def test_graceful_deletion(node: Node) -> None:
    """The hook runs first, then the container has its time to end by itself."""
    told = node.host_folder / "graceful"
    started = time.monotonic()
    node.kubelet.remove("graceful")
    wait_for("an end", lambda: told.read_text().split() == ["up", "hook", "stopped"])
    wait_for("no container", lambda: "graceful" not in running(node))
    assert time.monotonic() - started < manifests.GRACE_SECONDS / 2


def test_nothing_is_left_of_deleted_pods(node: Node) -> None:
    for name in node.kubelet.pods:
        node.kubelet.remove(name)
    wait_for("no container", lambda: not running(node))
    wait_for("no cgroup", lambda: not pod_cgroups(node))
    sandboxes = node.agent.runtime.ListPodSandbox(pb.ListPodSandboxRequest()).items
    assert {sandbox.state for sandbox in sandboxes} <= {pb.SANDBOX_NOTREADY}
    folder = node.kubelet.root / "lib/pods"
    wait_for("no volume", lambda: not os.listdir(folder))


def test_every_error_of_the_kubelet_is_explained(node: Node) -> None:
    always, in_outages = re.compile("|".join(EXPLAINED)), re.compile("|".join(OF_AN_OUTAGE))

    def is_explained(error: LoggedError) -> bool:
        hit = any(begin <= error.at <= end + RECONNECTED for begin, end in node.outages)
        return bool(always.search(error.text) or (hit and in_outages.search(error.text)))

    open_questions = [f"{e.at} {e.text}" for e in node.kubelet.errors() if not is_explained(e)]
    assert not open_questions, "\n".join(open_questions)


def is_ready(pod: dict[str, Any]) -> bool:
    conditions = {c["type"]: c["status"] for c in pod["status"]["conditions"]}
    return bool(conditions["Ready"] == "True")


def statuses(node: Node, pod: str) -> dict[str, dict[str, Any]]:
    return {s["name"]: s for s in node.kubelet.pods[pod]["status"]["containerStatuses"]}


def restarts(node: Node, pod: str) -> int:
    return int(node.kubelet.pods[pod]["status"]["containerStatuses"][0]["restartCount"])


def identities(node: Node) -> dict[tuple[str, str], tuple[str, int]]:
    """The ID and the restarts of each container that is meant to stay."""
    found = {}
    for name in READY:
        status = node.kubelet.pods[name]["status"]
        for entry in [*status.get("initContainerStatuses", []), *status["containerStatuses"]]:
            found[name, entry["name"]] = entry["containerID"], entry["restartCount"]
    return found


def assert_undisturbed(node: Node, before: dict[tuple[str, str], tuple[str, int]]) -> None:
    """The pods are ready, with the containers of before."""
    time.sleep(ROUNDS_SECONDS)
    for name in READY:
        node.kubelet.wait_for(name, "is ready", is_ready)
    assert identities(node) == before


def container_status(node: Node, identity: str) -> pb.ContainerStatus:
    request = pb.ContainerStatusRequest(container_id=identity)
    status: pb.ContainerStatus = node.agent.runtime.ContainerStatus(request, timeout=60).status
    return status


def running(node: Node) -> set[str]:
    """The names of the running containers."""
    state = pb.ContainerStateValue(state=pb.CONTAINER_RUNNING)
    request = pb.ListContainersRequest(filter=pb.ContainerFilter(state=state))
    answer = node.agent.runtime.ListContainers(request, timeout=60)
    return {container.metadata.name for container in answer.containers}


def pod_cgroups(node: Node) -> list[Path]:
    """The cgroups of the pods, by the names that the kubelet gives them with either driver."""
    return [group for group in cgroups(node.cgroup) if re.match(r"(\S+-)?pod[0-9a-f]", group.name)]


def log(node: Node, pod: str, container: str, query: str = "") -> str:
    return node.kubelet.get(f"/containerLogs/default/{pod}-node/{container}{query}")


def summary(node: Node) -> dict[str, dict[str, Any]]:
    pods = json.loads(node.kubelet.get("/stats/summary"))["pods"]
    return {pod["podRef"]["name"].removesuffix("-node"): pod for pod in pods}
