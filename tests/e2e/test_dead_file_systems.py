"""A file system whose server never answers holds up the requests that name it, and nothing else."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from nodeagent.linux import syscalls
from tests.security import fuse
from tests.support.cri import EXITED, Cri, options, refused
from tests.support.node import PATIENCE_SECONDS, RunningAgent, wait_for

MNT_DETACH = 2

# ContainerConfig fields that name a file below a directory of the node.
NAMING: dict[str, Any] = {
    "a volume": lambda path: {"mounts": [pb.Mount(host_path=path, container_path="/data")]},
    "a device": lambda path: {
        "linux": pb.LinuxContainerConfig(),
        "devices": [pb.Device(host_path=path, container_path="/dev/it", permissions="r")],
    },
    "a seccomp profile": lambda path: {
        "linux": options(
            seccomp=pb.SecurityProfile(
                profile_type=pb.SecurityProfile.Localhost, localhost_ref=path
            )
        )
    },
}


@pytest.fixture
def dead(tmp_path: Path) -> Iterator[str]:
    """A file on a FUSE whose server reads no request."""
    directory = tmp_path / "dead"
    directory.mkdir()
    server = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    data = f"fd={server},rootmode=40000,user_id=0,group_id=0"
    syscalls.mount("nodeagent-test", str(directory), "fuse", 0, data)
    try:
        yield f"{directory}/file"
    finally:
        os.close(server)  # whoever waits gets ENOTCONN
        syscalls.umount2(str(directory), MNT_DETACH)


@pytest.mark.parametrize("naming", NAMING)
def test_others_go_on_and_the_pod_can_be_removed(cri: Cri, dead: str, naming: str) -> None:
    pod = cri.pod()
    with waiting(cri, lambda: pod.container(**NAMING[naming](dead))):
        pod.remove()


# Says hello, takes every request, and answers none: who waits cannot even be killed then.
MUTE = f"""
import os, sys
server = int(sys.argv[1])
hello = os.read(server, {fuse.MAX_REQUEST_BYTES})
answer = bytes.fromhex({fuse.HELLO.hex()!r})
os.write(server, answer[:8] + hello[8:16] + answer[16:])
while True:
    os.read(server, {fuse.MAX_REQUEST_BYTES})
"""


class Mute(NamedTuple):
    """A file system with such a server; with the end of that, all who wait get ENOTCONN."""

    path: str
    server: subprocess.Popen[bytes]


@pytest.fixture
def mute(tmp_path: Path) -> Iterator[Mute]:
    directory = tmp_path / "mute"
    directory.mkdir()
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    data = f"fd={device},rootmode=40000,user_id=0,group_id=0"
    syscalls.mount("nodeagent-test", str(directory), "fuse", 0, data)
    with subprocess.Popen([sys.executable, "-c", MUTE, str(device)], pass_fds=[device]) as server:
        os.close(device)
        try:
            yield Mute(str(directory), server)
        finally:
            server.kill()
            syscalls.umount2(str(directory), MNT_DETACH)


@pytest.mark.parametrize("target", ["/data", "/etc"])
def test_a_volume_whose_server_never_answers(cri: Cri, mute: Mute, target: str) -> None:
    """A mount is made in it, or the image's users are looked for in it; the pod goes when the server has gone."""
    pod = cri.pod()
    volume = pb.Mount(host_path=mute.path, container_path=target)
    inner = pb.Mount(host_path="/dev/shm", container_path=f"{target}/inner")
    mounts = [volume] if target == "/etc" else [volume, inner]
    with waiting(cri, lambda: pod.container(mounts=mounts), grpc.StatusCode.INTERNAL):
        mute.server.kill()
    pod.remove()


def test_a_pod_is_stopped_beside_a_creation_that_hangs(
    own_agent: RunningAgent, own_cri: Cri, mute: Mute
) -> None:
    """What can be ended is, at once; what hangs is named. When its volume has gone, nothing is left of the pod."""
    other, pod = own_cri.run(), own_cri.pod()
    healthy = pod.run("sh", "-c", "trap '' TERM; echo set; while :; do sleep 0.05; done")
    healthy.said("set")
    before = set(os.listdir(own_agent.root / "lib/containers"))
    request = pb.CreateContainerRequest(
        pod_sandbox_id=pod.id,
        sandbox_config=pod.config,
        config=pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name="hangs"),
            image=pb.ImageSpec(image=own_cri.image),
            mounts=[
                pb.Mount(host_path=mute.path, container_path="/data"),
                pb.Mount(host_path="/dev/shm", container_path="/data/inner"),
            ],
        ),
    )
    creating = own_agent.runtime.CreateContainer.future(request)
    wait_for("a creation", lambda: set(os.listdir(own_agent.root / "lib/containers")) > before)
    [late] = set(os.listdir(own_agent.root / "lib/containers")) - before
    wait_for("a process that hangs", lambda: "request_wait_answer" in waits_of(late))
    stopping = own_agent.runtime.StopPodSandbox.future(
        pb.StopPodSandboxRequest(pod_sandbox_id=pod.id)
    )
    wait_for("the end of what can be ended", lambda: healthy.status.state == EXITED)
    assert healthy.status.exit_code == 137
    assert creating.exception(PATIENCE_SECONDS).code() == grpc.StatusCode.UNAVAILABLE
    names_what_hangs(lambda: stopping.result(PATIENCE_SECONDS), late)
    names_what_hangs(pod.remove, late)
    assert other.shell("echo works") == "works"
    mute.server.kill()
    wait_for("the removal", lambda: succeeds(pod.remove))
    assert late not in os.listdir(own_agent.root / "lib/containers")
    assert pod.id not in os.listdir(own_agent.root / "run/pods")
    assert groups_of(late) == groups_of(healthy.id) == []
    refused(grpc.StatusCode.NOT_FOUND, pod.id, lambda: pod.status)


def names_what_hangs(call: Callable[[], object], container: str) -> None:
    """It fails, so that it is called again, and says which process of the container waits for what."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    text = caught.value.details() or ""
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED, text
    assert "request_wait_answer" in text
    assert container in text


def succeeds(call: Callable[[], object]) -> bool:
    """Whether it does; False where the agent says that another attempt may."""
    try:
        call()
    except grpc.RpcError as error:
        if error.code() not in (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            grpc.StatusCode.UNAVAILABLE,
        ):
            raise
        return False
    return True


def groups_of(container: str) -> list[Path]:
    return [Path(path) for path, _, _ in os.walk("/sys/fs/cgroup") if container in path]


def waits_of(container: str) -> set[str]:
    """The kernel functions that the container's processes wait in (proc_pid_wchan(5))."""
    found = set()
    for group in groups_of(container):
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(OSError):
                found.add(Path(f"/proc/{pid}/wchan").read_text())
    return found


def test_however_many_wait_others_go_on(cri: Cri, dead: str) -> None:
    """More than may wait for one file system; those that name a device elsewhere are none of them."""
    pod = cri.pod()
    requests = [
        pb.CreateContainerRequest(
            pod_sandbox_id=pod.id,
            sandbox_config=pod.config,
            config=pb.ContainerConfig(
                metadata=pb.ContainerMetadata(name=f"waiting-{number}"),
                image=pb.ImageSpec(image=cri.image),
                **NAMING["a device"](dead),
            ),
        )
        for number in range(70)
    ]
    calls = [cri.agent.runtime.CreateContainer.future(request) for request in requests]
    wait_for("those that are too many", lambda: sum(call.done() for call in calls) == 6)
    refusals = [call.exception() for call in calls if call.done()]
    assert {error.code() for error in refusals} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert all(os.path.dirname(dead) in error.details() for error in refusals)
    other = cri.run(
        devices=[pb.Device(host_path="/dev/null", container_path="/dev/it", permissions="r")]
    )
    assert other.shell("test -c /dev/it && echo there") == "there"
    other.pod.remove()
    pod.remove()
    assert {code_of(call.result) for call in calls} == {
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAVAILABLE,
    }


@contextmanager
def waiting(
    cri: Cri, call: Callable[[], object], code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
) -> Iterator[None]:
    """The call waits while other pods come and go, and fails, leaving nothing, by what is done inside."""
    codes: list[grpc.StatusCode] = []
    thread = threading.Thread(target=lambda: codes.append(code_of(call)))
    thread.start()
    other = cri.run("sh", "-c", "echo here; sleep 1000")
    other.said("here")
    assert other.shell("echo there") == "there"
    other.pod.remove()
    assert thread.is_alive(), codes
    yield
    thread.join(30)
    assert codes == [code]


def code_of(call: Callable[[], object]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    code: grpc.StatusCode = caught.value.code()
    return code
