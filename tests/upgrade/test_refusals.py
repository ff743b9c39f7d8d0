"""What this release does not understand is refused by name, and nothing of it is destroyed."""

import json
import os
import signal
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

from nodeagent.api import runtime_pb2 as pb
from tests.e2e.conftest import client
from tests.support.cri import EXITED, RUNNING, Container, Cri, refused
from tests.support.node import RunningAgent, wait_for
from tests.support.registry import Registry
from tests.upgrade import releases
from tests.upgrade.conftest import replaced_agent
from tests.upgrade.workload import COUNT, PRECONDITION, inspected


def test_a_database_of_a_newer_schema(own_agent: RunningAgent, own_cri: Cri) -> None:
    container = counting(own_cri)
    own_agent.kill()
    database = own_agent.root / "lib/state.db"
    set_schema(database, 99)
    command = own_agent.command("serve", "--listen", own_agent.endpoint)
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    assert tried.returncode == 1
    assert f"nodeagent: {database}: schema 99 is newer than 1" in tried.stderr
    assert "install the release" in tried.stderr
    assert "Traceback" not in tried.stderr
    assert set_schema(database, 1) == 99
    own_agent.start()
    goes_on(container)


def set_schema(database: Path, version: int) -> int:
    """Returns the one before."""
    with closing(sqlite3.connect(database)) as db:
        (before,) = db.execute("PRAGMA user_version").fetchone()
        db.execute(f"PRAGMA user_version = {version}")
    return int(before)


def test_a_pod_and_a_launcher_of_a_newer_protocol(tmp_path: Path, registry: Registry) -> None:
    with replaced_agent(tmp_path, registry) as replaced:
        versions = ("sandbox/protocol.py", "VERSION = 1\nOLDEST = 0\n", "VERSION = 9\nOLDEST = 9\n")
        later = releases.later(tmp_path / "code", versions=versions)
        replaced.be(later)
        agent = replaced.agent
        cri = client(agent, registry)
        kept, removed = counting(cri), counting(cri)
        agent.kill()
        [launcher] = replaced.launchers()

        agent.code = None
        agent.start()
        assert replaced.launchers() != [launcher]
        for container in (kept, removed):
            pod = container.pod.id
            is_refused(
                container,
                f'supervisor of pod "{pod}" speaks version 9 of the protocol, this agent 0 to 1; install',
            )
            assert f'pod sandbox "{pod}": is left as it is' in agent.log.read_text()
            assert inspected(container)["plan"]["argv"] == ["sh", "-c", COUNT]
        assert cri.run().shell("echo works") == "works"
        said = agent.root / "run/launcher.log"
        wait_for("what the launcher says", lambda: kept.pod.id in said.read_text())
        assert "speaks version 9 of the protocol, launcher 0 to 1" in said.read_text()
        can_be_removed(removed)
        agent.kill()

        agent.code = later
        agent.start()
        goes_on(kept)
        kept.stop()
        assert kept.status.exit_code == 137
        agent.remove_pods()


def test_newer_files(own_agent: RunningAgent, own_cri: Cri) -> None:
    """One supervisor dies while the agent runs, the others while none does."""
    names = ("state.json", "pod.json", "state.json", "plan.json", "pod.json")
    made = [(counting(own_cri), name) for name in names]
    own_agent.kill()
    files = [make_newer(own_agent, container, name) for container, name in made]
    own_agent.start()
    early, *late = (container.pod.supervisor for container, _ in made)
    os.kill(early, signal.SIGKILL)
    is_left = f'"{made[0][0].pod.id}": is left as it is'
    wait_for("its refusal", lambda: is_left in own_agent.log.read_text())
    own_agent.kill()
    for supervisor in late:
        os.kill(supervisor, signal.SIGKILL)
    own_agent.start()

    for (container, name), file in zip(made, files, strict=True):
        reason = f"{file}: version 99 is newer than 1"
        is_refused(container, f'pod "{container.pod.id}": has no supervisor: {reason}')
        plan = inspected(container)["plan"]
        assert plan["error"].startswith(reason) if name == "plan.json" else plan["argv"]
        assert json.loads(file.read_text())["version"] == 99
    can_be_removed(made.pop()[0])
    assert own_cri.run().shell("echo works") == "works"

    own_agent.kill()
    for file in files[: len(made)]:
        file.write_text(json.dumps({**json.loads(file.read_text()), "version": 1}))
    own_agent.start()
    for container, _ in made:
        goes_on(container)


def make_newer(agent: RunningAgent, container: Container, name: str) -> Path:
    directory = agent.root / "run/pods" / container.pod.id
    if name != "pod.json":
        directory = directory / "containers" / container.id
    file = directory / name
    known = json.loads(file.read_text())
    assert known["version"] == 1
    file.write_text(json.dumps({**known, "version": 99}))
    return file


def counting(cri: Cri) -> Container:
    container = cri.run("sh", "-c", COUNT)
    container.said("10")
    return container


def is_refused(container: Container, text: str) -> None:
    """By all that would need its supervisor; it is told what to do."""
    pod = container.pod
    assert (container.status.state, pod.status.state) == (RUNNING, pb.SANDBOX_READY)
    for call in (
        lambda: container.exec("true"),
        lambda: pod.container(name="another"),
        container.stop,
        container.remove,
    ):
        refused(PRECONDITION, text, call)
        refused(PRECONDITION, "or stop and remove the pod", call)
    assert processes_of(container)


def can_be_removed(container: Container) -> None:
    processes = processes_of(container)
    container.pod.stop()
    assert container.status.state == EXITED
    assert container.pod.status.state == pb.SANDBOX_NOTREADY
    wait_for("the end", lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes))
    container.pod.remove()


def processes_of(container: Container) -> list[int]:
    """Of its cgroup, of which the kernel tells."""
    groups = (Path(path) for path, _, _ in os.walk("/sys/fs/cgroup") if container.id in path)
    return [int(pid) for group in groups for pid in (group / "cgroup.procs").read_text().split()]


def goes_on(container: Container) -> None:
    """Nothing of its log is lost; it can be used."""
    assert (container.status.state, container.shell("echo works")) == (RUNNING, "works")
    before = len(container.output)
    wait_for("more lines", lambda: len(container.output) > before)
    numbers = [int(line) for line in container.output.splitlines()]
    assert numbers == list(range(len(numbers)))
