"""What requests and images ask to be mounted, as kubelets and charts send it."""

import os
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.e2e.conftest import client, running_agent
from tests.e2e.test_user_namespaces import MAP, user_namespace
from tests.support import fake_registry, images, tars
from tests.support.cri import Container, Cri, options, pod_options, refused
from tests.support.node import wait_for
from tests.support.registry import Registry

PRIVILEGED = pb.LinuxPodSandboxConfig(
    security_context=pb.LinuxSandboxSecurityContext(privileged=True)
)
FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


def at(path: Path | str, target: str, **fields: Any) -> pb.Mount:
    return pb.Mount(host_path=str(path), container_path=target, **fields)


# ---- devices of the node ----


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize(
    "path", ["/dev", "/dev/kmsg", "/dev/fuse", "/dev/null", "/dev/net", "/dev/pts", "/dev/shm"]
)
def test_a_host_path_in_dev_of_a_privileged_container(cri: Cri, path: str, readonly: bool) -> None:
    """Such as node-problem-detector's /dev/kmsg: what is mounted there is what is found there."""
    if not os.path.exists(path):
        pytest.skip(f"no {path} on this node")
    pod = cri.pod(linux=PRIVILEGED)
    mount = at(path, path, readonly=readonly)
    container = pod.run(mounts=[mount], linux=options(privileged=True))
    found = os.stat(path)
    kinds = f"{stat.S_IFMT(found.st_mode):x}", f"{found.st_ino}"
    mode, inode = container.shell(f"stat -c '%f %i' {path}").split()
    assert (f"{stat.S_IFMT(int(mode, 16)):x}", inode) == kinds
    assert container.shell("test -c /dev/null -a -c /dev/zero && echo there") == "there"
    pod.remove()


# ---- host paths that are absent ----


def test_an_absent_host_path_is_made(cri: Cri, tmp_path: Path) -> None:
    absent = tmp_path / "new" / "data"
    container = cri.run(mounts=[at(absent, "/data")])
    container.shell("echo x > /data/file")
    assert (absent / "file").read_text() == "x\n"
    for path in (absent, absent.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o755
        assert path.stat().st_uid == 0
    container.pod.remove()
    assert absent.exists()


@pytest.fixture
def rejecting(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, registry: Registry
) -> Iterator[Cri]:
    """Whose agent does not make one of the paths."""
    config = f'absent_mount_sources_to_reject = ["{tmp_path}/listed/"]'
    with running_agent(tmp_path_factory, registry, config) as agent:
        yield client(agent, registry)


def test_absent_host_paths_that_are_not_made(rejecting: Cri, tmp_path: Path) -> None:
    pod = rejecting.pod()
    call = partial(pod.container, mounts=[at(tmp_path / "listed", "/data")])
    text = f'host path "{tmp_path}/listed" for /data: No such file'
    refused(grpc.StatusCode.NOT_FOUND, text, call)
    assert not (tmp_path / "listed").exists()
    pod.run(name="other", mounts=[at(tmp_path / "other", "/data")])
    (tmp_path / "listed").mkdir()
    pod.run(name="there", mounts=[at(tmp_path / "listed", "/data")])
    pod.remove()


# ---- paths as people write them ----


@pytest.mark.parametrize("target", ["/data/", "//data/./", "/tmp/../data", "data", "./x/../data"])
def test_where_a_mount_is_may_be_written_in_several_ways(
    cri: Cri, tmp_path: Path, target: str
) -> None:
    (tmp_path / "file").write_text("mounted")
    container = cri.run(mounts=[at(tmp_path, target)], working_dir="/tmp/../data/")
    assert container.shell("pwd; cat file; cat /data/file") == "/data\nmountedmounted"
    # The kubelet looks for a termination message by the path that it has asked for.
    assert [mount.container_path for mount in container.status.mounts] == [target]
    container.pod.remove()


def test_a_device_without_a_place_of_its_own_is_where_the_node_has_it(cri: Cri) -> None:
    container = cri.run(devices=[pb.Device(host_path="/dev/kmsg", permissions="r")])
    assert container.shell("stat -c %t:%T /dev/kmsg") == "1:b"
    container.pod.remove()


# ---- what cannot be mounted ----


def test_one_path_twice(cri: Cri, tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    mounts = [at(tmp_path / name, "/data") for name in ("one", "other")]
    container = cri.run(mounts=mounts)
    assert container.shell("cat /data/file") == "other"
    assert [mount.host_path for mount in container.status.mounts] == [m.host_path for m in mounts]
    container.pod.remove()


@pytest.mark.parametrize(
    ("source", "target"),
    [("d", "/etc/passwd"), ("f", "/etc"), ("d", "/etc/passwd/x"), ("f", "/etc/passwd/x")],
)
def test_a_directory_on_a_file_and_the_reverse(
    cri: Cri, tmp_path: Path, source: str, target: str
) -> None:
    """A subPath, for example, that turns out to be a directory: the request's fault, without a traceback."""
    (tmp_path / "d").mkdir()
    (tmp_path / "f").touch()
    pod = cri.pod()
    call = partial(pod.container, mounts=[at(tmp_path / source, target)])
    logged = cri.agent.log.stat().st_size
    refused(FAILED_PRECONDITION, f"mount {tmp_path}/{source} on {target}: ", call)
    assert "Traceback" not in cri.agent.log.read_text()[logged:]
    pod.remove()


@pytest.mark.parametrize("target", ["/sys/none", "/sys/fs/none/deep", "/dev/pts/99"])
def test_a_mount_point_that_cannot_be_made(cri: Cri, target: str) -> None:
    """The mount point is /sys/fs/bpf, for example, of a kernel without it."""
    pod = cri.pod()
    call = partial(pod.container, mounts=[at("/dev/null", target)])
    refused(FAILED_PRECONDITION, f"mount /dev/null on {target}: the path does not exist", call)
    pod.remove()


def test_a_host_path_that_no_mount_has(cri: Cri) -> None:
    read, write = os.pipe()
    path = f"/proc/{os.getpid()}/fd/{read}"
    pod = cri.pod()
    call = partial(pod.container, mounts=[at(path, "/pipe")])
    refused(FAILED_PRECONDITION, f'host path "{path}" for /pipe: cannot be mounted', call)
    os.close(read)
    os.close(write)
    pod.remove()


def test_a_host_path_of_a_device_below_a_file(cri: Cri) -> None:
    device = pb.Device(container_path="/dev/x", host_path="/dev/null/x", permissions="r")
    pod = cri.pod()
    call = partial(pod.container, devices=[device])
    refused(grpc.StatusCode.NOT_FOUND, 'device "/dev/null/x": not on this node', call)
    pod.remove()


def test_a_device_below_a_file(cri: Cri) -> None:
    device = pb.Device(container_path="/etc/passwd/null", host_path="/dev/null", permissions="r")
    pod = cri.pod()
    call = partial(pod.container, devices=[device])
    refused(FAILED_PRECONDITION, "device /etc/passwd/null: Not a directory", call)
    pod.remove()


# ---- images ----


def pulled(cri: Cri, registry: Registry, *members: tars.Member, **config: Any) -> pb.ImageSpec:
    layers = (*images.busybox().layers, fake_registry.layer(*members))
    registry.push(images.Image("test/volumes", ("1",), layers, {**images.SHELL, **config}))
    spec = pb.ImageSpec(image=f"{registry.host}/test/volumes:1")
    answer = cri.agent.images.PullImage(pb.PullImageRequest(image=spec), timeout=60)
    return pb.ImageSpec(image=answer.image_ref)


@pytest.fixture
def database(cri: Cri, registry: Registry) -> pb.ImageSpec:
    """An image with a volume as databases have it, and one that is in none of its layers."""
    return pulled(
        cri,
        registry,
        tars.directory("data", uid=1000, gid=1000, mode=0o700),
        tars.file("data/seed", b"of the image", uid=1000, gid=1000, mode=0o640),
        Volumes={"/data": {}, "/var/lib/new": {}},
    )


def directory_of(container: Container) -> Path:
    return container.pod.cri.agent.root / "lib/containers" / container.id


def usage(container: Container) -> int:
    request = pb.ContainerStatsRequest(container_id=container.id)
    answer = container.pod.cri.agent.runtime.ContainerStats(request)
    return int(answer.stats.writable_layer.used_bytes.value)


def test_volumes_of_an_image(cri: Cri, database: pb.ImageSpec) -> None:
    fields: dict[str, Any] = {
        "image": database,
        "linux": options(readonly_rootfs=True, run_as_user=pb.Int64Value(value=1000)),
    }
    pod = cri.pod()
    container = pod.run(**fields)
    assert container.shell("stat -c '%u:%g %a' /data /data/seed") == "1000:1000 700\n1000:1000 640"
    assert container.exec("touch", "/x").exit_code != 0
    script = "cat /data/seed; dd if=/dev/zero of=/data/seed bs=1M count=4 2>/dev/null"
    assert container.shell(script) == "of the image"
    assert container.shell("stat -c '%u %a' /var/lib/new") == "0 755"
    other = pod.run(name="other", **fields)
    assert other.shell("cat /data/seed") == "of the image"
    wait_for("the volume in the usage", lambda: usage(container) >= 4 << 20)
    assert directory_of(container).exists()
    container.remove()
    wait_for("the end of the volume", lambda: not directory_of(container).exists())
    pod.remove()


@pytest.mark.parametrize("target", ["/data", "/var"])
def test_a_mount_of_the_request_covers_a_volume_of_the_image(
    cri: Cri, database: pb.ImageSpec, tmp_path: Path, target: str
) -> None:
    (tmp_path / "lib").mkdir()
    container = cri.run(image=database, mounts=[at(tmp_path, target)])
    assert container.shell(f"touch {target}/lib/mine; ls {target}") == "lib"
    assert os.listdir(tmp_path) == ["lib"]
    assert os.listdir(tmp_path / "lib") == ["mine"]
    container.pod.remove()


def test_volumes_of_an_image_in_a_user_namespace(cri: Cri, database: pb.ImageSpec) -> None:
    linux = pod_options(userns_options=user_namespace(), pid=pb.CONTAINER)
    as_app = options(run_as_user=pb.Int64Value(value=1000))
    container = cri.pod(linux=linux).run(image=database, linux=as_app)
    script = "touch /data/mine; stat -c %u:%g /data /data/seed /data/mine /var/lib/new"
    assert container.shell(script).split() == ["1000:1000", "1000:1000", "1000:0", "0:0"]
    volumes = sorted((directory_of(container) / "volumes").iterdir())
    assert {path.stat().st_uid for path in volumes} == {
        MAP[0].host_id,
        MAP[0].host_id + 1000,
    }
    container.pod.remove()


def test_an_image_volume_is_reported_by_the_id_of_its_image(
    cri: Cri, registry: Registry, database: pb.ImageSpec
) -> None:
    """Whichever name it was asked for by."""
    name = pb.ImageSpec(image=f"{registry.host}/test/volumes:1")
    mounts = [
        pb.Mount(container_path=f"/v{number}", image=spec, readonly=True)
        for number, spec in enumerate((name, database))
    ]
    container = cri.run(mounts=mounts)
    assert [mount.image.image_ref for mount in container.status.mounts] == [database.image] * 2
    assert container.shell("cat /v0/data/seed") == "of the image"
    container.pod.remove()
