"""Containers with a label, on a node whose kernel enforces the policy of `tests/guest/selinux.cil`.

Such a node is a guest: `tests/kernel/test_guest.py` has these tests run there.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.e2e.test_mounts import pulled
from tests.e2e.test_user_namespaces import mapped_mount, user_namespace
from tests.support import tars
from tests.support.cri import Container, Cri, options, pod_options, refused
from tests.support.registry import Registry

POLICY = Path("/etc/selinux/config")
LEVEL, OTHER_LEVEL = "s0:c1,c2", "s0:c1,c3"
MINE = f"system_u:object_r:container_file_t:{LEVEL}"
OF_THE_NODE = "system_u:object_r:node_t:s0"

pytestmark = pytest.mark.skipif(
    not Path("/sys/fs/selinux/enforce").exists()
    or not POLICY.exists()
    or POLICY.read_text() != "SELINUXTYPE=tests\n",
    reason="needs a kernel that enforces the tests' policy of SELinux",
)


def confined(level: str = LEVEL, **fields: Any) -> pb.LinuxContainerConfig:
    """The options that the kubelet makes of a pod's seLinuxOptions: the level alone."""
    return options(selinux_options=pb.SELinuxOption(level=level), **fields)


def relabelled(source: Path, target: str, **fields: Any) -> pb.Mount:
    return pb.Mount(host_path=str(source), container_path=target, selinux_relabel=True, **fields)


def label(path: Path) -> str:
    return os.getxattr(path, "security.selinux", follow_symlinks=False).rstrip(b"\0").decode()


def running_as(container: Container) -> str:
    return container.shell("cat /proc/self/attr/current").rstrip("\0")


def denied(container: Container, script: str) -> None:
    answer = container.exec("sh", "-c", script)
    assert answer.exit_code != 0
    assert b"Permission denied" in answer.stderr


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A directory of the node, with its label."""
    path = tmp_path / "volume"
    (path / "deep").mkdir(parents=True)
    (path / "deep/file").write_text("content\n")
    (path / "link").symlink_to("/etc/passwd")
    assert label(path / "deep/file") == OF_THE_NODE
    return path


def test_what_is_made_for_a_container_is_its_own(cri: Cri) -> None:
    container = cri.run(linux=confined(masked_paths=["/proc/kcore", "/sys/firmware"]))
    assert running_as(container) == f"system_u:system_r:container_t:{LEVEL}"
    container.shell("""
        set -e
        cat /etc/passwd /etc/hosts /etc/hostname /etc/resolv.conf /proc/self/status
        echo x > /root/mine; cat /root/mine; chmod 700 /root/mine; mkdir -p /a/b; rm -r /a
        echo x > /dev/null; head -c 1 /dev/zero; ls -l /dev /dev/pts /sys /sys/fs/cgroup
        ls /dev/mqueue /sys/firmware
        cat /proc/kcore
        echo x > /dev/shm/mine; rm /dev/shm/mine; echo x > /etc/hosts
    """)
    assert "_ses" in container.shell("cat /proc/keys")  # which shows those that it may see
    container.pod.remove()


def test_without_options_there_is_no_label(cri: Cri, volume: Path) -> None:
    """Other runtimes do so where nobody enables their labels: the program has the agent's."""
    container = cri.run(mounts=[relabelled(volume, "/data")])
    assert running_as(container) == Path("/proc/self/attr/current").read_text().rstrip("\0")
    assert container.shell("cat /data/deep/file") == "content"
    assert label(volume) == OF_THE_NODE
    container.pod.remove()


def test_a_volume_is_relabelled_where_it_is_asked_for(
    cri: Cri, volume: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_text("secret")
    mounts = [
        relabelled(volume, "/data"),
        pb.Mount(host_path=str(other), container_path="/other"),
        relabelled(tmp_path / "absent", "/made"),
    ]
    container = cri.run(linux=confined(), mounts=mounts)
    assert (
        container.shell("cat /data/deep/file; echo x > /data/new; echo x > /made/file") == "content"
    )
    denied(container, "cat /other/file")
    denied(container, "echo x > /other/new")
    for path in (volume, volume / "deep", volume / "deep/file", volume / "link", volume / "new"):
        assert label(path) == MINE
    assert label(Path("/etc/passwd")) == OF_THE_NODE
    assert label(other / "file") == OF_THE_NODE
    container.pod.remove()


def test_containers_of_one_level_share_what_others_do_not_see(cri: Cri, volume: Path) -> None:
    pod = cri.pod()
    mounts = [relabelled(volume, "/data")]
    first = pod.run(name="first", linux=confined(), mounts=mounts)
    second = pod.run(name="second", linux=confined(), mounts=mounts)
    first.shell("echo first > /data/file; echo first > /dev/shm/file")
    assert second.shell("cat /data/file /dev/shm/file") == "first\nfirst"
    bare = [pb.Mount(host_path=str(volume), container_path="/data")]
    stranger = cri.run(linux=confined(OTHER_LEVEL), mounts=bare)
    denied(stranger, "cat /data/file")
    pod.remove()
    stranger.pod.remove()


def test_a_privileged_type_starts_with_its_volumes(cri: Cri, volume: Path, tmp_path: Path) -> None:
    """Cilium's chart: spc_t is not confined, and its volumes get the label of containers' files all the same."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    mounts = [
        relabelled(volume, "/data"),
        pb.Mount(host_path=str(secret), container_path="/secret"),
    ]
    linux = options(selinux_options=pb.SELinuxOption(type="spc_t", level="s0"))
    container = cri.run(linux=linux, mounts=mounts)
    assert running_as(container) == "system_u:system_r:spc_t:s0"
    assert container.shell("cat /secret /data/deep/file") == "secretcontent"
    assert label(volume / "deep/file") == "system_u:object_r:container_file_t:s0"
    container.pod.remove()


def test_images_as_volumes_and_volumes_of_images(cri: Cri, registry: Registry) -> None:
    files = tars.directory("data"), tars.file("data/seed", b"seed\n")
    image = pulled(cri, registry, *files, Volumes={"/data": {}, "/new": {}})
    # Of one layer alone, and of two.
    mounts = [
        pb.Mount(container_path="/one", image=pb.ImageSpec(image=cri.image), readonly=True),
        pb.Mount(container_path="/two", image=image, readonly=True),
    ]
    container = cri.run(image=image, mounts=mounts, linux=confined(readonly_rootfs=True))
    script = "cat /data/seed /two/data/seed; cat /one/etc/passwd > /new/file; echo x > /data/file"
    assert container.shell(script) == "seed\nseed"
    container.pod.remove()


def test_in_a_user_namespace(cri: Cri, volume: Path) -> None:
    pod = cri.pod(linux=pod_options(userns_options=user_namespace(), pid=pb.CONTAINER))
    mounts = [mapped_mount(volume, "/data", selinux_relabel=True)]
    container = pod.run(linux=confined(), mounts=mounts)
    assert (
        container.shell("cat /data/deep/file; echo x > /dev/shm/mine; ls -l /dev/mqueue >&2")
        == "content"
    )
    assert label(volume / "deep/file") == MINE
    pod.remove()


def test_a_terminal(cri: Cri) -> None:
    container = cri.run("sh", "-c", "tty && echo typed > /dev/tty", tty=True, linux=confined())
    assert container.ended().exit_code == 0
    assert "/dev/pts/0" in container.log.read_text()
    container.pod.remove()


def test_what_the_node_needs_keeps_its_label(cri: Cri, volume: Path, tmp_path: Path) -> None:
    pod = cri.pod()
    for path in (Path("/etc"), tmp_path / "alias"):
        if path.name == "alias":
            path.symlink_to("/bin")
        call = partial(pod.container, mounts=[relabelled(path, "/x")], linux=confined())
        refused(grpc.StatusCode.INVALID_ARGUMENT, f'selinux_relabel of "{path}"', call)
    assert label(Path("/etc")) == label(Path("/usr/bin")) == OF_THE_NODE
    call = partial(pod.container, linux=confined('s0",lowerdir="/'))
    refused(grpc.StatusCode.INVALID_ARGUMENT, "is not an SELinux label", call)
    call = partial(pod.container, linux=options(selinux_options=pb.SELinuxOption(type="absent_t")))
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert "absent_t" in (caught.value.details() or "")
    pod.remove()
