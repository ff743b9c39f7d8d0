"""The agent is replaced by another release under load, with pods that go on: forward, back, and forward again."""

import os
import signal
from pathlib import Path

import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.e2e.conftest import client
from tests.e2e.test_recovery import processes_below, succeeds
from tests.support.cri import Container, Cri
from tests.support.node import wait_for
from tests.support.registry import Registry
from tests.upgrade import releases
from tests.upgrade.conftest import Replaced, replaced_agent
from tests.upgrade.releases import Earlier
from tests.upgrade.workload import Workload, churning


@pytest.mark.parametrize("earlier", releases.earlier(), ids=lambda release: release.name)
def test_an_upgrade_and_back(tmp_path: Path, registry: Registry, earlier: Earlier) -> None:
    with replaced_agent(tmp_path, registry, default_places=earlier.default_places) as replaced:
        agent = replaced.agent
        replaced.be_earlier(earlier)
        cri = client(agent, registry)
        old = Workload(cri, tmp_path / "gate-old")

        with churning(cri, replaced.endpoint):
            agent.kill()
            old.leave()
            replaced.be_present()
            old.check()
        replace_launcher(replaced)
        replace_supervisor(replaced, old.counting)
        replace_supervisor(replaced, old.sharing[0])
        old.check()
        if earlier.back:
            go_back(replaced, earlier, cri, old)
        old.finish(earlier.refused)
        nothing_is_left(replaced)
        if earlier.marks_late:
            replaced.remove_unmarked_groups()


def go_back(replaced: Replaced, earlier: Earlier, cri: Cri, old: Workload) -> None:
    """To the earlier release, which takes over pods of this one, and to this one again."""
    new = Workload(cri, old.gate.with_name("gate-new"))
    with churning(cri, replaced.endpoint):
        # In order: one that is killed leaves changes in a journal, of which earlier releases do not know.
        assert replaced.agent.stop() == 0
        new.leave()
        replaced.be_earlier(earlier)
        old.check()
        new.check(shows_plans=False)
    replace_launcher(replaced)
    replace_supervisor(replaced, new.counting)
    replace_supervisor(replaced, new.sharing[0])
    new.check(shows_plans=False)
    replaced.agent.kill()
    replaced.be_present()
    old.check()
    new.check()
    new.finish()


def replace_launcher(replaced: Replaced) -> None:
    """By one of the release that runs, to which supervisors of others go."""
    [launcher] = replaced.launchers()
    os.kill(launcher, signal.SIGKILL)
    wait_for("another launcher", lambda: replaced.launchers() not in ([], [launcher]))


def replace_supervisor(replaced: Replaced, container: Container) -> None:
    """By one of the launcher's release, which reads what the one before has written."""
    wait_for("copies of its pipes", lambda: replaced.is_kept(container.pod.id, container.id))
    supervisor = container.pod.supervisor
    os.kill(supervisor, signal.SIGKILL)
    wait_for("a successor", lambda: succeeds(lambda: container.shell("echo works")))
    assert container.pod.supervisor not in (0, supervisor)


def nothing_is_left(replaced: Replaced) -> None:
    """On the machine, see `machine_as_before`."""
    agent, pods = replaced.agent, replaced.pods
    runtime = agent.runtime
    assert not runtime.ListPodSandbox(pb.ListPodSandboxRequest()).items
    assert not runtime.ListContainers(pb.ListContainersRequest()).containers
    assert agent.stop() == 0
    wait_for("the end of the launcher", lambda: not replaced.launchers())
    assert not list(pods.iterdir())
    assert not list((agent.root / "lib/containers").iterdir())
    assert not processes_below(str(agent.root))
