"""systemd as the first process of an unprivileged container: it manages the container's cgroups itself."""

import re
import subprocess
from pathlib import Path

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.support import fake_registry, images, tars
from tests.support.cri import Container, Cri, options, pod_options
from tests.support.node import wait_for
from tests.support.registry import Registry

SYSTEMD = Path("/lib/systemd/systemd")
MIB = 1 << 20

pytestmark = [
    pytest.mark.skipif(
        not Path("/sys/fs/cgroup/cgroup.controllers").exists(),
        reason="no machine with cgroup v2 alone",
    ),
    pytest.mark.skipif(not SYSTEMD.exists(), reason="systemd is not installed here"),
]

TARGET = "[Unit]\nDefaultDependencies=no\nWants=job.service\n"
JOB = """[Unit]
DefaultDependencies=no

[Service]
ExecStart=/bin/sh -c 'cat /proc/self/cgroup; exec sleep 1000'
StandardOutput=file:/run/job
MemoryMax=16M
TasksMax=9
"""


def of_this_machine(*programs: str) -> list[tars.Member]:
    """Programs and the libraries that they need, at the same places."""
    paths = {*programs}
    for program in programs:
        listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True)
        paths.update(re.findall(r"(/\S+) \(0x", listed.stdout))
    return [tars.file(path[1:], Path(path).read_bytes(), mode=0o755) for path in sorted(paths)]


@pytest.fixture(scope="module")
def image(cri: Cri, registry: Registry) -> pb.ImageSpec:
    """busybox with this machine's systemd, and two units."""
    layer = fake_registry.layer(
        *of_this_machine(str(SYSTEMD), "/bin/systemctl"),
        tars.file("etc/systemd/system/test.target", TARGET.encode()),
        tars.file("etc/systemd/system/job.service", JOB.encode()),
    )
    made = images.Image("test/systemd", ("1",), (*images.busybox().layers, layer))
    registry.push(made)
    spec = pb.ImageSpec(image=f"{registry.host}/test/systemd:1")
    cri.agent.images.PullImage(pb.PullImageRequest(image=spec), timeout=120)
    return spec


@pytest.fixture
def container(cri: Cri, image: pb.ImageSpec, tmp_path: Path) -> Container:
    """A container with systemd as it is usually run: what it would mount are volumes, and `container` is set."""
    mounts = []
    for path in ("run", "run/lock", "tmp"):
        directory = tmp_path / path.replace("/", "-")
        directory.mkdir()
        mounts.append(pb.Mount(container_path=f"/{path}", host_path=str(directory)))
    linux = options(
        cgroup_mount_mode=pb.CGROUP_MOUNT_MODE_READ_WRITE,
        seccomp=pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault),
        no_new_privs=True,
    )
    linux.resources.memory_limit_in_bytes = 256 * MIB
    return cri.pod(linux=pod_options(pid=pb.CONTAINER)).run(
        str(SYSTEMD),
        "--unit=test.target",
        "--log-target=console",
        image=image,
        tty=True,
        mounts=mounts,
        envs=[pb.KeyValue(key="container", value=b"oci")],
        linux=linux,
    )


def test_systemd_runs_services_in_groups_of_its_own(container: Container) -> None:
    def is_active() -> bool:
        answer = container.exec("systemctl", "is-active", "job.service")
        return answer.stdout.strip() == b"active"

    try:
        wait_for("job.service", is_active)
    except (AssertionError, grpc.RpcError) as error:
        pytest.fail(f"{error}\n{container.log.read_text()}")
    assert container.shell("cat /run/job") == "0::/system.slice/job.service"
    assert container.shell("cat /proc/1/cgroup") == "0::/init.scope"
    group = "/sys/fs/cgroup/system.slice/job.service"
    assert container.shell(f"cat {group}/memory.max {group}/pids.max").split() == [
        str(16 * MIB),
        "9",
    ]
    assert container.shell("cat /sys/fs/cgroup/memory.max") == str(256 * MIB)
    container.stop()
    container.remove()
    container.pod.remove()
