"""An agent whose code is replaced, with pods that go on."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nodeagent.cgroups import tree
from tests.e2e.conftest import own_agent, own_cri
from tests.e2e.test_recovery import processes_titled
from tests.support.apart import EARLIER, Apart, agent_apart
from tests.support.node import RunningAgent
from tests.support.registry import Registry
from tests.upgrade.releases import Earlier

__all__ = ["Replaced", "own_agent", "own_cri", "replaced_agent"]


class Replaced:
    """agent: the one of now, not started yet. code: where that of the other release is put."""

    def __init__(self, agent: RunningAgent, code: Path) -> None:
        self.agent = agent
        self._code = code
        self._aside = code.with_name("aside")

    def be(self, code: Path | None) -> None:
        """Start as this release; None is the present one."""
        self.agent.code = code
        if isinstance(self.agent, Apart):
            self.agent.earlier = code is not None
        self.agent.start()

    def be_earlier(self, release: Earlier) -> None:
        """Its code is there only while its agent runs: launchers and supervisors have to do without."""
        if self._aside.exists():
            self._aside.rename(self._code)
        else:
            release.unpack(self._code)
        self.be(self._code)

    def be_present(self) -> None:
        self._code.rename(self._aside)
        self.be(None)

    def remove_unmarked_groups(self) -> None:
        """Remove what an agent that marks its cgroups late has left when it was killed, and the empty ones above.

        A group with processes stays, and so do empty ones that an agent could have known as its own.
        """
        root = str(self.agent.root / "lib")
        name = f"nodeagent-{hashlib.sha256(root.encode()).hexdigest()[:8]}"
        hierarchies = Path("/sys/fs/cgroup")
        for top in (*hierarchies.glob(name), *hierarchies.glob(f"*/{name}")):
            for directory, _, _ in os.walk(top, topdown=False):
                if tree.kind(directory) is None:
                    _remove_upwards(Path(directory), top)

    @property
    def endpoint(self) -> str:
        """Where every release is served."""
        if isinstance(self.agent, Apart):
            return f"unix://{self.agent.run}{EARLIER}/nodeagent.sock"
        return self.agent.endpoint

    def launchers(self) -> list[int]:
        """Those of this agent; there may be others with the default places."""
        holder = self.agent.holder if isinstance(self.agent, Apart) else "self"
        where = os.readlink(f"/proc/{holder}/ns/mnt")
        title = f"nodeagent.sandbox.launcher {self._state}"
        return [
            pid for pid in processes_titled(title) if os.readlink(f"/proc/{pid}/ns/mnt") == where
        ]

    def is_kept(self, pod: str, container: str) -> bool:
        """Whether the launcher has copies of a container's pipes; a supervisor goes to a new one within a second."""
        [launcher] = self.launchers()
        state = self.pods / pod / "containers" / container / "state.json"
        pipes = {f"pipe:[{inode}]" for inode in json.loads(state.read_text())["pipes"].values()}
        return pipes <= set(_open_in(launcher))

    @property
    def _state(self) -> str:
        return EARLIER if isinstance(self.agent, Apart) else f"{self.agent.root}/run"

    @property
    def pods(self) -> Path:
        """Where the directories of pods are."""
        root = self.agent.run if isinstance(self.agent, Apart) else Path("/")
        return root / self._state[1:] / "pods"


@contextmanager
def replaced_agent(
    root: Path, registry: Registry, *, default_places: bool = False
) -> Iterator[Replaced]:
    """Whatever happens, the present release removes what is left."""
    if default_places:
        with agent_apart(root / "agent", registry) as agent:
            yield from _cleared(Replaced(agent, root / "code"))
    else:
        usual = RunningAgent(root / "agent")
        usual.trust(registry.host)
        yield from _cleared(Replaced(usual, root / "code"))


def _remove_upwards(group: Path, top: Path) -> None:
    for each in (group, *group.parents):
        if not each.is_relative_to(top):
            return
        try:
            each.rmdir()
        except OSError:  # it has processes, or groups
            return


def _cleared(replaced: Replaced) -> Iterator[Replaced]:
    try:
        yield replaced
    finally:
        replaced.agent.kill()
        if replaced.launchers():
            replaced.be(None)
            replaced.agent.remove_pods()
            assert replaced.agent.stop() == 0


def _open_in(pid: int) -> Iterator[str]:
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it is busy
            yield os.readlink(file)
