"""Requests, and configs of images, made to reach what they must not: sent over the real socket."""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.security.agent.conftest import PullHostile, attempted
from tests.support import tars
from tests.support.cri import Cri, Pod, options, pod_options, refused
from tests.support.node import free_port, wait_for

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
UP = "../" * 12
CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")


@pytest.fixture
def pod(cri: Cri) -> Pod:
    return cri.pod()


# ---- names and paths ----

LOCALHOST = pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref="../x")
DEVICE = pb.Device(container_path=f"dev/{UP}x", host_path="/dev/null", permissions="rwm")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"mounts": [pb.Mount(container_path=f"v/{UP}x", host_path="/tmp")]}, "container_path"),
        ({"mounts": [pb.Mount(container_path="/v", host_path=f"/tmp/{UP}etc")]}, "host_path"),
        ({"mounts": [pb.Mount(container_path="/v\0x", host_path="/tmp")]}, "container_path"),
        ({"devices": [DEVICE]}, "container_path"),
        ({"log_path": "/etc/passwd"}, "log_path"),
        ({"log_path": "a\0b"}, "log_path"),
        ({"working_dir": f"tmp/{UP}etc"}, "working_dir"),
        ({"metadata": pb.ContainerMetadata(name="../x")}, "metadata.name"),
        ({"metadata": pb.ContainerMetadata(name="a\0b")}, "metadata.name"),
        ({"command": ["sh\0", "-c"]}, "command"),
        ({"linux": options(masked_paths=[f"proc/{UP}etc"])}, "masked_paths"),
        ({"linux": options(run_as_username="root\0x")}, "run_as_username"),
        ({"linux": options(seccomp=LOCALHOST)}, "localhost_ref"),
    ],
)
def test_containers_that_name_something_else(pod: Pod, fields: dict[str, Any], text: str) -> None:
    refused(INVALID, text, lambda: pod.container(**fields))
    pod.remove()


def test_paths_that_go_back_beyond_the_root_stay_inside(cri: Cri, tmp_path: Path) -> None:
    """The root is above itself, as Go cleans paths and the kernel walks them."""
    volume, device = f"/back-volume-{os.getpid()}", f"/back-device-{os.getpid()}"
    container = cri.run(
        mounts=[pb.Mount(container_path=f"/v/{UP}{volume}", host_path=str(tmp_path))],
        devices=[
            pb.Device(container_path=f"/dev/{UP}{device}", host_path="/dev/null", permissions="rwm")
        ],
        working_dir=f"/tmp/{UP}etc",
        linux=options(masked_paths=[f"/proc/{UP}etc/hostname"]),
    )
    (tmp_path / "file").write_text("seen")
    script = f"pwd; cat {volume}/file; echo; stat -c %t:%T {device}; wc -c < /etc/hostname"
    assert container.shell(script).splitlines() == ["/etc", "seen", "1:3", "0"]
    assert not Path(volume).exists()
    assert not Path(device).exists()
    container.pod.remove()


@pytest.mark.parametrize("value", ["../../x", "a\0b", "a\nb"])
def test_pods_that_name_something_else(cri: Cri, value: str) -> None:
    for field in ("name", "uid", "namespace"):
        metadata = pb.PodSandboxMetadata()
        setattr(metadata, field, value)
        refused(INVALID, f"metadata.{field}", partial(cri.pod, metadata=metadata))


@pytest.mark.parametrize("name", ["", "../..", "/", "*", "a\0b"])
def test_ids_that_are_none(cri: Cri, name: str) -> None:
    """None of them is a prefix, or a path, of anything; to stop and to remove nothing succeeds."""
    container = cri.run()
    runtime = cri.agent.runtime
    attempted(lambda: runtime.StopContainer(pb.StopContainerRequest(container_id=name)))
    attempted(lambda: runtime.RemoveContainer(pb.RemoveContainerRequest(container_id=name)))
    attempted(lambda: runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=name)))
    attempted(lambda: runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=name)))
    exec_ = pb.ExecSyncRequest(container_id=name, cmd=["true"])
    reopen = pb.ReopenContainerLogRequest(container_id=name)
    assert attempted(lambda: runtime.ExecSync(exec_))
    assert attempted(lambda: runtime.ReopenContainerLog(reopen))
    assert container.shell("echo alive") == "alive"
    container.pod.remove()


# ---- sysctls ----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kernel.shm_rmid_forced", "1+kernel.core_pattern=|/evil"),
        ("net.ipv4.ip_forward", "1\nkernel.core_pattern=|/evil"),
        ("net.ipv4.ip_forward", "1\0"),
        ("net.ipv4.ip_forward=1+kernel.core_pattern", "|/evil"),
        ("net.ipv4.ip_forward+kernel.core_pattern", "|/evil"),
        ("net.ipv4.ip_forward\nkernel.core_pattern", "|/evil"),
        ("net/../kernel/core_pattern", "|/evil"),
        ("net.ipv4.conf.../../../kernel/core_pattern", "|/evil"),
    ],
)
def test_cve_2022_0811_sysctls_within_sysctls(cri: Cri, name: str, value: str) -> None:
    before = CORE_PATTERN.read_text()
    linux = pb.LinuxPodSandboxConfig(sysctls={name: value})
    refused(INVALID, "sysctl", lambda: cri.pod(linux=linux))
    assert CORE_PATTERN.read_text() == before


# ---- logs ----


def test_a_log_directory_that_is_a_link(cri: Cri, tmp_path: Path, outside: Path) -> None:
    """A container that shares the pod's directory of logs sends its own log elsewhere."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/main").symlink_to(outside)
    pod = cri.pod(log_directory=str(tmp_path / "logs"))
    refused(PRECONDITION, "main/0.log", pod.container(log_path="main/0.log").start)
    pod.remove()


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "directory"])
def test_a_log_that_is_something_else(cri: Cri, outside: Path, kind: str) -> None:
    container = cri.run()
    log = container.log
    log.unlink()
    if kind == "fifo":
        os.mkfifo(log)
    elif kind == "directory":
        log.mkdir()
    else:
        log.symlink_to(outside / ("precious" if kind == "link" else "new"))
    request = pb.ReopenContainerLogRequest(container_id=container.id)
    refused(PRECONDITION, str(log), lambda: cri.agent.runtime.ReopenContainerLog(request))
    container.pod.remove()


# ---- configs of images ----


@pytest.mark.parametrize(
    "config",
    [
        {"User": "4294967295"},
        {"User": "1000:4294967295"},
        {"User": "9" * 5000},
        {"User": "root\0"},
        {"User": "\ud800"},
        {"Env": ["A=1\0B=2"]},
        {"Cmd": ["sh", "\0"]},
        {"WorkingDir": "/\0"},
    ],
    ids=lambda config: ascii(config)[:40],
)
def test_cve_2024_40635_configs_that_are_refused(
    cri: Cri, hostile: PullHostile, config: dict[str, Any]
) -> None:
    """Already when the image is pulled, so that lists of images and users never meet them."""
    refused(INVALID, "config", lambda: hostile(**config))
    cri.agent.images.ListImages(pb.ListImagesRequest())


@pytest.mark.parametrize("user", ["0\n", "root\ndaemon", "-1"])
def test_users_of_images_that_are_not_there(cri: Cri, hostile: PullHostile, user: str) -> None:
    pod = cri.pod()
    image = hostile(User=user)
    refused(NOT_FOUND, "not in /etc/passwd", lambda: pod.container(image=image))
    pod.remove()


def test_newlines_are_characters(cri: Cri, hostile: PullHostile) -> None:
    image = hostile(
        Env=["PATH=/bin", "A=1\nPATH=/evil"],
        Entrypoint=["/bin/sh", "-c", 'echo "$0|$A|$PATH|$(pwd)"'],
        Cmd=["one\ntwo"],
        WorkingDir="/a\nb",
    )
    pod = cri.pod()
    config = pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name="main"), image=image, log_path="main.log"
    )
    request = pb.CreateContainerRequest(
        pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config
    )
    runtime = cri.agent.runtime
    created = runtime.CreateContainer(request, timeout=60).container_id
    runtime.StartContainer(pb.StartContainerRequest(container_id=created), timeout=60)
    log = Path(pod.config.log_directory) / "main.log"
    wait_for("its last line", lambda: log.exists() and log.read_text().endswith(" b\n"))
    lines = [line.split(" ", 3)[3] for line in log.read_text().splitlines()]
    assert lines == ["one", "two|1", "PATH=/evil|/bin|/a", "b"]
    pod.remove()


def test_cve_2022_23648_volumes_of_an_image(cri: Cri, hostile: PullHostile, outside: Path) -> None:
    """Neither what they name, nor what a link of the image leads to, is the node's."""
    names = [f"{UP}{outside}", f"/data/{UP}{outside}", "/link", "/link/deep"]
    image = hostile(
        tars.symlink("link", f"{UP}{outside}/linked"), Volumes={name: {} for name in names}
    )
    container = cri.pod().run(image=image)
    places = [str(outside), "/link", "/link/deep"]
    for place in places:
        container.shell(f"test -d {place} && touch {place}/new")
    assert "precious" not in container.shell(f"ls -R {' '.join(places)}")
    container.pod.remove()


def test_cve_2024_21626_working_directory_of_an_image(cri: Cri, hostile: PullHostile) -> None:
    pod = cri.pod()
    image = hostile(WorkingDir="/proc/self/fd/7")
    refused(PRECONDITION, "working directory", lambda: pod.container(image=image))
    for number in range(24):
        call = partial(pod.container, working_dir=f"/proc/self/fd/{number}")
        refused(PRECONDITION, "working directory", call)
    pod.remove()


# ---- sizes ----


def test_requests_that_are_too_large(pod: Pod) -> None:
    many = [pb.KeyValue(key=f"K{n}", value=b"x" * 1000) for n in range(5000)]
    refused(EXHAUSTED, "longer than", lambda: pod.container(envs=many))
    refused(EXHAUSTED, "larger than", lambda: pod.container(labels={"a": "x" * (17 << 20)}))
    refused(INVALID, "labels", lambda: pod.container(labels={"a": "x" * (2 << 20)}))
    mounts = [pb.Mount(container_path="/v", host_path="/tmp")] * 100_001
    refused(INVALID, "mounts", lambda: pod.container(mounts=mounts))
    argument = pod.container("true", "x" * 200_000)
    refused(PRECONDITION, "argument list too long", argument.start)
    pod.remove()


# ---- the node's network ----


def test_a_pod_has_no_way_to_the_node_s_loopback(crictl: Path, cri: Cri) -> None:
    """Neither from inside, nor through a port-forward."""
    container = cri.run()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, local = server.getsockname()[1], free_port()
        assert container.exec("nc", "-w", "2", "127.0.0.1", str(port)).exit_code != 0
        forward = ["port-forward", container.pod.id, f"{local}:{port}"]
        with crictl_running(crictl, cri, *forward):
            wait_for("crictl", lambda: ends_at_once(local))
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    container.pod.remove()


@contextmanager
def crictl_running(crictl: Path, cri: Cri, *arguments: str) -> Iterator[None]:
    command = [str(crictl), "-r", cri.agent.endpoint, "-i", cri.agent.endpoint, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


def ends_at_once(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            return connection.recv(1) == b""
    except ConnectionRefusedError:
        return False


def test_cve_2020_15257_no_abstract_sockets(cri: Cri) -> None:
    """They are within reach of whoever shares the network of the node."""
    pod = cri.pod(linux=pod_options(network=pb.NODE))
    sockets = {
        os.readlink(descriptor)
        for pid in descendants(cri.agent.pid)
        for descriptor in Path(f"/proc/{pid}/fd").iterdir()
        if os.path.lexists(descriptor)
    }
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    names = [fields[7] for fields in lines if f"socket:[{fields[6]}]" in sockets and fields[7:]]
    assert any(name.endswith("/supervisor.sock") for name in names)
    assert not [name for name in names if name.startswith("@")]
    pod.remove()


def descendants(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from descendants(int(child))
