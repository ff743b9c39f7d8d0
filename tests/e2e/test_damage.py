"""What others do to an agent's files, groups and tables: one pod may be lost by it, the node never."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from nodeagent.linux import syscalls
from nodeagent.store import Store
from tests.e2e.conftest import client
from tests.support.cri import EXITED, RUNNING, Container, Cri
from tests.support.node import RunningAgent, wait_for
from tests.support.registry import Registry


def crash(agent: RunningAgent, container: Container) -> Path:
    """Kill the agent and a pod's supervisor; returns the pod's directory."""
    supervisor = container.pod.supervisor
    agent.kill()
    os.kill(supervisor, signal.SIGKILL)
    return agent.root / "run/pods" / container.pod.id


def test_a_pod_that_nobody_can_take_over_ends(own_agent: RunningAgent, own_cri: Cri) -> None:
    container, other = own_cri.run(), own_cri.run()
    (crash(own_agent, container) / "pod.json").write_text("{")
    own_agent.start()
    assert container.pod.status.state == pb.SANDBOX_NOTREADY
    assert (container.status.state, container.status.reason) == (EXITED, "Unknown")
    assert other.shell("echo works") == "works"
    container.pod.remove()


def test_a_supervisor_that_nobody_can_reach_ends(own_agent: RunningAgent, own_cri: Cri) -> None:
    container, other = own_cri.run(), own_cri.run()
    own_agent.kill()
    shutil.rmtree(own_agent.root / "run/pods" / container.pod.id, ignore_errors=True)  # but mounts
    own_agent.start()
    assert container.pod.status.state == pb.SANDBOX_NOTREADY
    assert other.shell("echo works") == "works"
    container.pod.remove()


@pytest.mark.parametrize("name", ["state.json", "plan.json"])
@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_one_container_that_nothing_is_known_of(
    own_agent: RunningAgent, own_cri: Cri, name: str, text: str | None
) -> None:
    """What is EXITED does not run, or its successor would run beside it."""
    container = own_cri.run()
    other = container.pod.run(name="other")
    directory = crash(own_agent, container) / "containers" / container.id
    damage(directory / name, text)
    own_agent.start()
    assert container.ended().reason == "Unknown"
    wait_for("no process", lambda: not processes_of(container))
    assert other.shell("echo works") == "works"
    container.remove()


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_plan_that_cannot_be_read_is_named_to_who_asks(own_cri: Cri, text: str) -> None:
    container = own_cri.run()
    pod = own_cri.agent.root / "run/pods" / container.pod.id
    file = pod / "containers" / container.id / "plan.json"
    damage(file, text)
    request = pb.ContainerStatusRequest(container_id=container.id, verbose=True)
    plan = json.loads(own_cri.agent.runtime.ContainerStatus(request).info["info"])["plan"]
    assert plan["error"].startswith(f"{file}: ")


@pytest.mark.parametrize("text", [None, "{", "{}", '{"version": 1, "plan": {}}'])
def test_a_pod_without_a_successor_ends_with_its_stop(
    own_agent: RunningAgent, own_cri: Cri, text: str | None
) -> None:
    container, other = own_cri.run(), own_cri.run()
    damage(own_agent.root / "run/pods" / container.pod.id / "pod.json", text)
    os.kill(container.pod.supervisor, signal.SIGKILL)
    container.pod.stop()
    assert container.status.state == EXITED
    assert not processes_of(container)
    container.pod.remove()
    assert not (own_agent.root / "run/pods" / container.pod.id).exists()
    assert other.shell("echo works") == "works"


def damage(file: Path, text: str | None) -> None:
    """text: what the file has from now on, None for no file."""
    if text is None:
        file.unlink()
    else:
        file.write_text(text)


def processes_of(container: Container) -> str:
    """The pids in its cgroup, which there may be in several hierarchies."""
    groups = [Path(path) for path, _, _ in os.walk("/sys/fs/cgroup") if container.id in path]
    return "".join((group / "cgroup.procs").read_text() for group in groups)


KINDS = ["container", "sandbox", "lease", "imagehold", "layer"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_that_cannot_be_read(own_agent: RunningAgent, own_cri: Cri, kind: str) -> None:
    """What it names runs on, with its files and its network, until `nodeagent check --repair` has forgotten it."""
    container, other = own_cri.run(), own_cri.run()
    container.shell("echo kept > /file")
    process, address = pid_of(container), container.pod.ip
    own_agent.kill()
    keys = cut_records(own_agent, kind, container)
    named = data_check(own_agent, "--data")
    assert all(key in named for key in keys)
    own_agent.start()
    assert processes_of(container).split()
    assert Path(f"/proc/{process}/root/file").read_text() == "kept\n"
    assert other.shell("echo works") == "works"
    if kind != "lease":  # nobody knows which link is the pod's
        ping = f"ping -c 1 -w 9 {address} >/dev/null && echo there"
        assert other.shell(ping) == "there"
    assert own_cri.pod().ip != address
    listed = own_agent.runtime.ListContainers(pb.ListContainersRequest()).containers
    known = {item.id for item in listed}
    assert known == ({other.id} if kind == "container" else {container.id, other.id})
    if kind == "container":
        with pytest.raises(grpc.RpcError, match=r"DATA_LOSS.*check --repair"):
            container.remove()
    if kind == "sandbox":
        with pytest.raises(grpc.RpcError, match=r"DATA_LOSS.*check --repair"):
            container.pod.remove()
    own_agent.kill()
    assert "1 damaged, 0 left" in data_check(own_agent, "--repair")
    assert "0 damaged" in data_check(own_agent, "--data")
    own_agent.start()
    if kind in ("container", "sandbox"):
        wait_for("no process", partial(has_ended, container))
        assert not (own_agent.root / "lib/containers" / container.id).exists()
    else:
        assert container.shell("cat /file") == "kept"
    assert other.shell("echo works") == "works"
    if kind == "layer":
        request = pb.PullImageRequest(image=pb.ImageSpec(image=own_cri.image))
        own_agent.images.PullImage(request, timeout=60)
        assert own_cri.run().shell("echo works") == "works"


def pid_of(container: Container) -> int:
    [pid, *_] = processes_of(container).split()
    return int(pid)


def cut_records(agent: RunningAgent, kind: str, container: Container) -> list[str]:
    """Cut the record of that kind that the container has, and return its key. The agent has been killed."""
    # What is in the journal still would bring the record back whole.
    Store.open(agent.root / "lib/state.db", agent.root / "run").close()
    with closing(sqlite3.connect(agent.root / "lib/state.db", isolation_level=None)) as db:
        keys = [key for (key,) in db.execute(f"SELECT key FROM record_{kind}")]
        own = [key for key in keys if container.id in key or container.pod.id in key] or keys[:1]
        for key in own:
            cut = f"UPDATE record_{kind} SET body = substr(body, 1, 20) WHERE key = ?"
            db.execute(cut, (key,))
    return own


def data_check(agent: RunningAgent, option: str) -> str:
    done = subprocess.run(
        agent.command("check", option), check=False, capture_output=True, text=True, timeout=60
    )
    return done.stdout


@pytest.mark.parametrize("kind", ["truncated", "overwritten"])
def test_a_database_that_is_damaged(own_agent: RunningAgent, own_cri: Cri, kind: str) -> None:
    """The agent says so in one line and ends; after the repair it takes over what it still knows."""
    containers = [own_cri.run() for _ in "123"]
    own_agent.kill()
    database = own_agent.root / "lib/state.db"
    with closing(sqlite3.connect(database)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    if kind == "truncated":
        os.truncate(database, database.stat().st_size // 2)
    else:
        with closing(sqlite3.connect(database)) as db:
            [(page,)] = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'record_lease'")
        with database.open("r+b") as file:
            file.seek((page - 1) * 4096)
            file.write(b"\xa5" * 4096)
    command = own_agent.command("serve", "--listen", own_agent.endpoint)
    refused = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    said = refused.stderr
    assert refused.returncode == 1
    assert "Traceback" not in said
    assert re.search(r"nodeagent: .*/state\.db: .*nodeagent check --repair", said)
    assert data_check(own_agent, "--data").startswith("state.db: ")
    assert "0 left" in data_check(own_agent, "--repair")
    own_agent.start()
    left = {c.id for c in own_agent.runtime.ListContainers(pb.ListContainersRequest()).containers}
    for container in containers:
        if container.id in left:
            assert container.status.state == RUNNING
        else:
            wait_for("no process", partial(has_ended, container))
    assert own_cri.pod().status.state == pb.SANDBOX_READY


def has_ended(container: Container) -> bool:
    return not processes_of(container).split()


def test_a_group_that_others_removed(own_agent: RunningAgent, own_cri: Cri) -> None:
    """The kubelet does so with all below a pod's group, once it wants the pod to be gone."""
    container = own_cri.run()
    walk = os.walk("/sys/fs/cgroup", topdown=False)
    groups = [Path(path) for path, _, _ in walk if container.id in path]
    os.kill(int((groups[0] / "cgroup.procs").read_text()), signal.SIGKILL)
    assert container.ended().exit_code == 137
    wait_for("empty groups", lambda: all(map(is_removed, groups)))
    container.pod.stop()
    own_agent.restart()
    container.remove()
    container.pod.remove()


def is_removed(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:
        return not group.exists()
    return True


def test_another_agent_cannot_have_the_state_directory(
    own_agent: RunningAgent, own_cri: Cri, tmp_path: Path
) -> None:
    container = own_cri.run()
    second = RunningAgent(tmp_path / "second")
    command = second.command("serve", "--listen", second.endpoint)
    command[command.index("--state") + 1] = str(own_agent.root / "run")
    refused = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert "another agent has this directory; stop that one, or give this one" in refused.stderr
    assert container.shell("echo works") == "works"


class Apart(RunningAgent):
    """In a mount namespace of its own, in which everything can be covered."""

    def command(self, verb: str, *arguments: str) -> list[str]:
        apart = ["unshare", "--mount", "--propagation", "private"]
        return [*apart, *super().command(verb, *arguments)]

    def inside(self, *command: str) -> None:
        subprocess.run(["nsenter", f"--mount=/proc/{self.pid}/ns/mnt", *command], check=True)

    def runtime_ready(self) -> tuple[bool, str]:
        status = self.runtime.Status(pb.StatusRequest(), timeout=60).status
        [found] = [c for c in status.conditions if c.type == "RuntimeReady"]
        return found.status, found.reason


def test_a_node_whose_mounts_are_covered_is_not_ready(tmp_path: Path) -> None:
    """By a pod with a volume of the node, until the mount is taken away."""
    agent = Apart(tmp_path / "agent")
    agent.start()
    try:
        for place, reason in (
            (Path("/sys/fs/cgroup"), "CgroupRootCovered"),
            (Path("/sys"), "CgroupRootCovered"),
            (agent.root / "lib", "DirectoryReplaced"),
        ):
            assert agent.runtime_ready() == (True, "")
            agent.inside("mount", "-t", "tmpfs", "cover", str(place))
            assert agent.runtime_ready() == (False, reason)
            agent.inside("umount", str(place))
        assert agent.runtime_ready() == (True, "")
    finally:
        agent.stop()


@pytest.mark.parametrize("place", ["lib", "run"])
def test_a_full_disk(tmp_path: Path, registry: Registry, place: str) -> None:
    """Containers end, pods go, and an agent starts: or nothing would ever be freed."""
    agent = RunningAgent(tmp_path / "agent")
    agent.trust(registry.host)
    disk = agent.root / place
    disk.mkdir()
    syscalls.mount("disk", str(disk), "tmpfs", 0, "size=16m")
    try:
        agent.start()
        cri = client(agent, registry)
        script = "trap 'exit 5' TERM; echo set; while :; do sleep 0.05; done"
        containers = [cri.run("sh", "-c", script) for _ in "123"]
        containers[0].said("set")
        fill_up(disk / "ballast")
        containers[0].stop(timeout=30)
        assert containers[0].status.exit_code == 5
        containers[0].remove()
        containers[1].pod.stop()
        agent.kill()
        agent.start()
        assert containers[1].status.state == EXITED
        assert containers[2].shell("echo works") == "works"
        agent.remove_pods()
        assert agent.stop() == 0
        (disk / "ballast").unlink()
    finally:
        agent.stop()
        syscalls.umount2(str(disk), syscalls.MNT_DETACH)


def fill_up(path: Path) -> None:
    """To the last page."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
