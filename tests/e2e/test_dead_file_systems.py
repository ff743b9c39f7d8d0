"""A file system whose server never answers holds up the requests that name it, and nothing else."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from nodeagent.linux import syscalls
from tests.security import fuse
from tests.support.cri import Cri, options
from tests.support.node import wait_for

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
