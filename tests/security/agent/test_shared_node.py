"""Pods that mount what is shared with the node: nothing of the runtime's own appears there, now or later.

The agent has a mount namespace of its own, in which everything is shared, as systemd makes it on a node. Whatever a
pod does to /sys or /dev is done to that namespace, and not to the machine.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.e2e.conftest import client, serving
from tests.security.agent.test_mounts import host_pid
from tests.support.cri import SLEEP, Container, Cri, options
from tests.support.node import RunningAgent
from tests.support.registry import Registry

PRIVILEGED = pb.LinuxPodSandboxConfig(
    security_context=pb.LinuxSandboxSecurityContext(privileged=True)
)
PROPAGATIONS = {
    "private": pb.PROPAGATION_PRIVATE,
    "rslave": pb.PROPAGATION_HOST_TO_CONTAINER,
    "rshared": pb.PROPAGATION_BIDIRECTIONAL,
}
SHARED = ["sh", "-c", 'mount --make-rshared / && exec "$@"', "sh"]


class SharedNode(RunningAgent):
    """An agent on a node of which every mount is shared."""

    def command(self, verb: str, *arguments: str) -> list[str]:
        line = super().command(verb, *arguments)
        if verb != "serve":
            return line
        return ["unshare", "--mount", "--propagation", "private", *SHARED, *line]

    def mounts(self) -> list[str]:
        """The node's table, but for what the agent has in its own directories."""
        table = Path(f"/proc/{self.pid}/mountinfo").read_text().splitlines()
        return [line for line in table if not line.split()[4].startswith(f"{self.root}/")]


def below(path: str, pid: int) -> set[tuple[str, str]]:
    """What a process has mounted below a path: device and root of each mount."""
    table = (line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines())
    top = path.rstrip("/")
    return {(line[2], line[3]) for line in table if line[4].startswith(f"{top}/")}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, registry: Registry) -> Iterator[SharedNode]:
    running = SharedNode(tmp_path_factory.mktemp("shared-node"))
    with serving(running, registry):
        yield running


@pytest.fixture(scope="module")
def cri(node: SharedNode, registry: Registry) -> Cri:
    return client(node, registry)


@pytest.fixture(scope="module")
def bystander(cri: Cri) -> Container:
    """Another container of the node."""
    return cri.run(*SLEEP)


@pytest.mark.parametrize("privileged", [True, False], ids=["privileged", "confined"])
@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("path", ["/", "/sys", "/sys/fs", "/dev", "/proc", "/run", "/var"])
def test_the_node_s_mounts_stay_as_they_are(
    cri: Cri, node: SharedNode, bystander: Container, path: str, propagation: str, privileged: bool
) -> None:
    before = node.mounts()
    assert " shared:" in next(line for line in before if line.split()[4] == "/sys")
    pod = cri.pod(linux=PRIVILEGED)
    target = "/host" if path == "/" else path
    mount = pb.Mount(host_path=path, container_path=target, propagation=PROPAGATIONS[propagation])
    container = pod.run(mounts=[mount], linux=options(privileged=privileged), tty=True)
    assert node.mounts() == before
    if privileged:  # others have masks
        assert below(target, host_pid(container)) <= below(path, node.pid)
    assert container.shell(f"ls {target} > /tmp/list; echo here") == "here"
    container.stop()
    assert node.mounts() == before
    pod.remove()
    assert node.mounts() == before
    assert bystander.shell("echo alive") == "alive"


def test_an_init_container_mounts_a_file_system_on_the_node(
    cri: Cri, node: SharedNode, bystander: Container
) -> None:
    """Calico's mount-bpffs has the node's /sys/fs, Bidirectional, and mounts the BPF file system in it.

    What it mounts is all that the node gets, during its life and after; the node's cgroups stay what they are.
    """
    names = ("bpf", "pstore", "ext4", "fuse")
    place = next(f"/sys/fs/{name}" for name in names if os.path.isdir(f"/sys/fs/{name}"))
    kind = "bpf" if place.endswith("bpf") else "tmpfs"
    before = node.mounts()
    pod = cri.pod(linux=PRIVILEGED)
    mount = pb.Mount(
        host_path="/sys/fs",
        container_path="/sys/fs",
        propagation=pb.PROPAGATION_BIDIRECTIONAL,
    )
    container = pod.run(
        *("sh", "-c", f"mount -t {kind} {kind} {place} && exec sleep 1000"),
        mounts=[mount],
        linux=options(privileged=True),
    )
    while not (new := [line for line in node.mounts() if line not in before]):
        assert container.status.state == pb.CONTAINER_RUNNING
    assert [line.split()[4] for line in new] == [place]
    assert set(before) <= set(node.mounts())
    pod.remove()
    assert [line.split()[4] for line in node.mounts() if line not in before] == [place]
    assert bystander.shell("cat /proc/self/cgroup > /dev/null; echo alive") == "alive"
    assert cri.run("true").ended().exit_code == 0
