"""How containers see cgroups: their own or the node's, to read or to manage."""

import json
from pathlib import Path

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.e2e.test_user_namespaces import mapped_pod
from tests.support.cri import Container, Cri, options, pod_options, refused

PLACE = Path("/sys/fs/cgroup")
V2 = (PLACE / "cgroup.controllers").exists()
ON_NODE = pb.NamespaceOption(cgroupns_options=pb.CgroupNamespace(mode=pb.NODE))
READ_WRITE = pb.CGROUP_MOUNT_MODE_READ_WRITE

needs_v2 = pytest.mark.skipif(not V2, reason="no machine with cgroup v2 alone")


def node_options() -> str:
    """The options of the node's hierarchies, which a mount in its own namespace could change."""
    with open("/proc/self/mountinfo") as file:
        return "".join(sorted({line.split(" - ")[1] for line in file if " - cgroup" in line}))


def pid_of(container: Container) -> int:
    request = pb.ContainerStatusRequest(container_id=container.id, verbose=True)
    answer = container.pod.cri.agent.runtime.ContainerStatus(request, timeout=60)
    return int(json.loads(answer.info["info"])["pid"])


def test_the_nodes_cgroups_are_seen_and_not_changed(cri: Cri) -> None:
    before = node_options()
    container = cri.run(linux=options(namespace_options=ON_NODE))
    seen = container.shell("cat /proc/self/cgroup").splitlines()
    of_node = Path(f"/proc/{pid_of(container)}/cgroup").read_text().splitlines()
    assert all(line.split(":", 2)[2].startswith("/nodeagent") for line in of_node[-1:])
    for line, expected in zip(seen, of_node, strict=True):
        assert line.startswith(expected)  # the command of an exec may be in a group below
    assert container.shell("ls /sys/fs/cgroup").split() == sorted(p.name for p in PLACE.iterdir())
    made = container.exec("mkdir", f"/sys/fs/cgroup/{'' if V2 else 'freezer/'}mine")
    assert b"Read-only file system" in made.stderr
    container.pod.remove()
    assert node_options() == before


def test_a_pod_with_a_user_namespace_sees_them_too(cri: Cri) -> None:
    container = mapped_pod(cri).run(linux=options(namespace_options=ON_NODE))
    assert container.shell("ls /sys/fs/cgroup").split() == sorted(p.name for p in PLACE.iterdir())
    made = container.exec("mkdir", f"/sys/fs/cgroup/{'' if V2 else 'freezer/'}mine")
    assert made.exit_code != 0
    container.pod.remove()


def test_the_default_shows_its_own_group_alone(cri: Cri) -> None:
    own = pb.CgroupNamespace(mode=pb.CONTAINER)
    for asked in (None, own):
        namespaces = pb.NamespaceOption(pid=pb.CONTAINER, cgroupns_options=asked)
        container = cri.run(linux=options(namespace_options=namespaces))
        assert container.shell("cat /proc/1/cgroup | tail -n 1").endswith(":/")
        container.pod.remove()


def test_a_privileged_container_may_change_the_nodes(cri: Cri) -> None:
    before = node_options()
    pod = cri.pod(
        linux=pb.LinuxPodSandboxConfig(
            security_context=pb.LinuxSandboxSecurityContext(privileged=True)
        )
    )
    security = options(privileged=True, namespace_options=ON_NODE, cgroup_mount_mode=READ_WRITE)
    container = pod.run(linux=security)
    group = f"/sys/fs/cgroup/{'' if V2 else 'freezer/'}natest-{container.id[:12]}"
    container.shell(f"mkdir {group}")
    assert Path(group).is_dir()
    container.shell(f"rmdir {group}")
    pod.remove()
    assert node_options() == before


@pytest.mark.skipif(V2, reason="cgroup v2 has a boundary")
def test_without_a_boundary_nothing_is_writable(cri: Cri) -> None:
    pod = cri.pod()
    refused(
        grpc.StatusCode.UNIMPLEMENTED,
        "cgroup_mount_mode: read-write needs cgroup v2 mounted with the option nsdelegate",
        lambda: pod.container(linux=options(cgroup_mount_mode=READ_WRITE)),
    )
    pod.remove()


def test_the_features_are_told(cri: Cri) -> None:
    status = cri.agent.runtime.Status(pb.StatusRequest(), timeout=60)
    assert status.features.cgroup_mount_mode == V2
    assert all(handler.features.cgroup_namespaces for handler in status.runtime_handlers)


MANAGE = """
set -e
cd /sys/fs/cgroup
mkdir init jobs jobs/one
echo 1 > init/cgroup.procs
echo "+memory +pids" > cgroup.subtree_control
echo "+pids" > jobs/cgroup.subtree_control
echo 7 > jobs/one/pids.max
echo $$ > jobs/one/cgroup.procs
cat jobs/one/pids.max jobs/one/cgroup.procs
"""


def manages(container: Container) -> None:
    """It makes groups, moves what it runs into them and limits it; its own limits are not its own to change."""
    limit, *pids = container.shell(MANAGE).split()
    assert (limit, len(pids) > 0) == ("7", True)
    for name, value in (
        ("memory.max", "max"),
        ("pids.max", "max"),
        ("cgroup.max.descendants", "9"),
        ("cgroup.freeze", "1"),
        ("cgroup.type", "threaded"),
    ):
        answer = container.exec("sh", "-c", f"echo {value} > /sys/fs/cgroup/{name}")
        assert answer.exit_code != 0, name
    # a command still finds its place where the container has passed its controllers on
    assert container.shell("cat /sys/fs/cgroup/init/cgroup.procs").split()[0] == "1"


LIMITS = pb.LinuxContainerResources(memory_limit_in_bytes=64 << 20)


@needs_v2
def test_an_unprivileged_container_manages_its_own(cri: Cri) -> None:
    before = node_options()
    linux = options(cgroup_mount_mode=READ_WRITE)
    linux.resources.CopyFrom(LIMITS)
    container = cri.pod(linux=pod_options(pid=pb.CONTAINER)).run(linux=linux)
    manages(container)
    [line] = Path(f"/proc/{pid_of(container)}/cgroup").read_text().splitlines()
    group = PLACE / line.removeprefix("0::/").removesuffix("/init")
    assert (group / "memory.max").read_text() == f"{64 << 20}\n"
    container.stop()
    container.remove()
    assert not group.exists()
    container.pod.remove()
    assert node_options() == before


@needs_v2
def test_a_user_that_is_not_root_manages_its_own(cri: Cri) -> None:
    linux = options(cgroup_mount_mode=READ_WRITE, run_as_user=pb.Int64Value(value=1000))
    container = cri.pod(linux=pod_options(pid=pb.CONTAINER)).run(linux=linux)
    manages(container)
    container.pod.remove()


@needs_v2
def test_root_of_a_user_namespace_manages_its_own(cri: Cri) -> None:
    container = mapped_pod(cri).run(linux=options(cgroup_mount_mode=READ_WRITE))
    manages(container)
    container.pod.remove()


@needs_v2
def test_without_asking_nothing_is_writable(cri: Cri) -> None:
    for mode in (pb.CGROUP_MOUNT_MODE_UNSPECIFIED, pb.CGROUP_MOUNT_MODE_READ_ONLY):
        container = cri.run(linux=options(cgroup_mount_mode=mode))
        answer = container.exec("mkdir", "/sys/fs/cgroup/mine")
        assert b"Read-only file system" in answer.stderr
        container.pod.remove()
