"""Pods and containers through all their states, over the socket."""

from pathlib import Path
from typing import Any

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.support.cri import CREATED, EXITED, RUNNING, SLEEP, Cri, options, pod_options, refused


def test_a_pod_lives_and_leaves(cri: Cri) -> None:
    pod = cri.pod(labels={"app": "x"}, annotations={"note": "ä\n=1"})
    assert pod.status.state == pb.SANDBOX_READY
    assert pod.ip
    assert dict(pod.status.labels) == {"app": "x"}
    assert dict(pod.status.annotations) == {"note": "ä\n=1"}
    container = pod.container()
    assert container.status.state == CREATED
    container.start()
    status = container.status
    assert status.state == RUNNING
    assert status.created_at <= status.started_at
    assert status.finished_at == 0
    pod.stop()
    assert pod.status.state == pb.SANDBOX_NOTREADY
    assert container.status.state == EXITED
    assert container.status.exit_code == 137
    pod.remove()
    refused(grpc.StatusCode.NOT_FOUND, pod.id, lambda: pod.status)


def test_stop_and_remove_may_be_repeated(cri: Cri) -> None:
    container = cri.run()
    for _ in range(2):
        container.stop()
        container.pod.stop()
    for _ in range(2):
        container.remove()
        container.pod.remove()
    container.stop()
    container.pod.stop()


def test_removal_kills(cri: Cri) -> None:
    container = cri.run()
    container.remove()
    refused(grpc.StatusCode.NOT_FOUND, container.id, lambda: container.status)
    container.pod.remove()


@pytest.mark.parametrize(
    ("script", "code", "reason"),
    [
        ("exit 0", 0, "Completed"),
        ("exit 3", 3, "Error"),
        ("kill -TERM $$; sleep 1", 143, "Error"),
    ],
)
def test_exit_codes(cri: Cri, script: str, code: int, reason: str) -> None:
    pod = cri.pod(linux=pod_options(pid=pb.POD))
    status = pod.run(
        "sh", "-c", script, linux=options(namespace_options=pb.NamespaceOption(pid=pb.POD))
    ).ended()
    assert (status.exit_code, status.reason) == (code, reason)
    assert status.started_at <= status.finished_at
    pod.remove()


def test_out_of_memory(cri: Cri) -> None:
    linux = pb.LinuxContainerConfig(
        resources=pb.LinuxContainerResources(memory_limit_in_bytes=15 << 20)
    )
    container = cri.run("sh", "-c", "dd if=/dev/zero of=/dev/null bs=20M", linux=linux)
    status = container.ended()
    assert (status.exit_code, status.reason) == (137, "OOMKilled")
    container.pod.remove()


def test_a_program_that_is_missing(cri: Cri) -> None:
    container = cri.pod().container("/no/such/program")
    refused(grpc.StatusCode.FAILED_PRECONDITION, "/no/such/program", container.start)
    status = container.status
    assert (status.state, status.exit_code, status.reason) == (EXITED, 128, "StartError")
    assert "/no/such/program" in status.message
    assert status.finished_at > 0
    container.pod.remove()


def test_stop_signal_and_grace(cri: Cri) -> None:
    polite = cri.run("sh", "-c", "trap 'exit 7' TERM; echo set; while :; do sleep 0.05; done")
    polite.said("set")
    polite.stop(timeout=10)
    assert polite.status.exit_code == 7
    polite.pod.remove()
    deaf = cri.run("sh", "-c", "trap '' TERM; echo set; while :; do sleep 0.05; done")
    deaf.said("set")
    deaf.stop(timeout=1)
    assert deaf.status.exit_code == 137
    deaf.pod.remove()


def test_filters(cri: Cri) -> None:
    pod = cri.pod(labels={"which": "filters"})
    container = pod.run(labels={"tier": "one"})
    other = cri.run()
    runtime = cri.agent.runtime

    def containers(**fields: Any) -> set[str]:
        request = pb.ListContainersRequest(filter=pb.ContainerFilter(**fields))
        return {item.id for item in runtime.ListContainers(request).containers}

    running = pb.ContainerStateValue(state=RUNNING)
    assert containers(label_selector={"tier": "one"}) == {container.id}
    assert containers(pod_sandbox_id=pod.id) == {container.id}
    assert containers(id=container.id[:13]) == {container.id}
    assert {container.id, other.id} <= containers(state=running)
    assert containers(id=container.id, label_selector={"tier": "two"}) == set()
    request = pb.ListPodSandboxRequest(
        filter=pb.PodSandboxFilter(label_selector={"which": "filters"})
    )
    assert [item.id for item in runtime.ListPodSandbox(request).items] == [pod.id]
    pod.remove()
    other.pod.remove()


def test_the_same_attempt_twice_is_refused(cri: Cri) -> None:
    pod = cri.pod()
    container = pod.container()
    refused(grpc.StatusCode.ALREADY_EXISTS, container.id, pod.container)
    pod.remove()


def test_image_config_is_merged(cri: Cri) -> None:
    container = cri.pod().container(
        "sh",
        "-c",
        'echo "$A|$HOME|$(pwd)|$HOSTNAME|$(id -u):$(id -g)"',
        envs=[pb.KeyValue(key="A", value="ü=1".encode())],
        working_dir="/new/dir",
        linux=options(run_as_user=pb.Int64Value(value=33)),
    )
    container.start()
    container.ended()
    assert container.output == f"ü=1|/var/www|/new/dir|{container.pod.config.hostname}|33:33"
    user = container.status.user.linux
    assert (user.uid, user.gid) == (33, 33)
    container.pod.remove()


def test_selinux_options_where_there_is_no_selinux(cri: Cri) -> None:
    """Charts carry them to every node: Cilium's a type, the kubelet's EmptyDir conformance pods a level."""
    if Path("/sys/fs/selinux/enforce").exists():
        pytest.skip("this kernel has SELinux")
    linux = options(selinux_options=pb.SELinuxOption(type="spc_t", level="s0"))
    container = cri.run("true", linux=linux)
    container.ended()
    assert container.status.exit_code == 0
    container.pod.remove()


def test_environment_of_bytes(cri: Cri) -> None:
    container = cri.run(
        "sh", "-c", 'printf %s "$A"', envs=[pb.KeyValue(key="A", value=b"\xff\xfe")]
    )
    container.ended()
    assert container.log.read_bytes().endswith(b" stdout P \xff\xfe\n")
    container.pod.remove()


def test_two_containers_share_the_pod(cri: Cri) -> None:
    pod = cri.pod()
    server = pod.run(
        "sh", "-c", "echo hello > /index.html; exec httpd -f -p 8080 -h /", name="server"
    )
    client = pod.run(*SLEEP, name="client")
    assert client.shell("until wget -q -O - http://127.0.0.1:8080/; do sleep 0.05; done") == "hello"
    assert client.shell("hostname") == server.shell("hostname") == pod.config.hostname
    client.shell("echo shared > /dev/shm/x")
    assert server.shell("cat /dev/shm/x") == "shared"
    pod.remove()


def test_stopped_pod_takes_no_container(cri: Cri) -> None:
    pod = cri.pod()
    pod.stop()
    refused(grpc.StatusCode.FAILED_PRECONDITION, "stopped", pod.container)
    pod.remove()
