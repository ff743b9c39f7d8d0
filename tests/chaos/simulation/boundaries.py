"""What is patched for the whole process: the boundaries of the agent's code are the machine's."""

import errno
import os
import secrets
import signal
import sys
import time
import warnings
from asyncio import InvalidStateError
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from nodeagent import files
from nodeagent.lifecycle import composition, recovery
from nodeagent.lifecycle.containers import unkillable
from nodeagent.lifecycle.plan import etc_files
from nodeagent.lifecycle.pods import sandboxes
from nodeagent.linux import mountinfo, waiting
from nodeagent.net import bridge, listeners, network, setup, sysctls
from nodeagent.sandbox import exits, paths
from tests.chaos.simulation import world
from tests.chaos.simulation.loop import Killed
from tests.chaos.simulation.network import Links, SimulatedTable, set_up, tear_down


def _stepped(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def step(path: Any, *args: Any, **options: Any) -> Any:
        world.machine.step(what, str(path))
        result = function(path, *args, **options)
        world.machine.step("filed")
        return result

    return step


def _listed(path: Path) -> Iterator[Path]:
    return iter(sorted(Path(path / name) for name in os.listdir(path)))


def _tree_removal(remove_tree: Callable[[str], None]) -> Callable[[str], None]:
    def remove(path: str) -> None:
        world.machine.remove_pod_files(path)
        remove_tree(path)

    return remove


def _record_of(pod: str, container: str) -> Any:
    world.machine.step("files.exit")
    return world.machine.exits.get((pod, container))


def _waitid(kind: int, fd: int, flags: int) -> Any:
    raise ChildProcessError(errno.ECHILD, "No child processes")


@contextmanager
def patched() -> Iterator[None]:
    """The boundaries of the agent's code are the machine's."""
    links = SimpleNamespace(
        connect=Links.connect, plug_in=Links.plug_in, delete=Links.delete, exists=Links.exists, names=Links.names
    )  # fmt: skip
    with ExitStack() as stack:
        enter = stack.enter_context
        # What a dead agent has begun is let go as it is.
        enter(warnings.catch_warnings())
        warnings.simplefilter("ignore", RuntimeWarning)
        enter(patch.object(sys, "unraisablehook", _unraisable))
        enter(patch.object(time, "time_ns", _time_ns))
        enter(patch.object(secrets, "token_hex", lambda count=32: world.machine.token(count)))
        enter(patch.object(secrets, "randbelow", _randbelow))
        enter(patch.object(os, "pidfd_open", lambda pid, flags=0: world.machine.pidfd_open(pid)))
        enter(patch.object(os, "waitid", _waitid))
        enter(
            patch.object(composition, "version", lambda _name: "0")
        )  # from the disk at each start
        enter(patch.object(signal, "pidfd_send_signal", _pidfd_send_signal))
        enter(patch.object(Path, "mkdir", _stepped("files.mkdir", Path.mkdir)))
        enter(patch.object(Path, "rename", _stepped("files.rename", Path.rename)))
        enter(patch.object(Path, "iterdir", _listed))
        enter(patch.object(etc_files, "write", _stepped("files.write", etc_files.write)))
        for name in ("remove_tree", "ensure_directory"):
            enter(patch.object(files, name, _stepped(f"files.{name}", getattr(files, name))))
        enter(patch.object(files, "remove_tree", _tree_removal(files.remove_tree)))
        enter(patch.object(exits, "read", _record_of))
        enter(patch.object(waiting, "explained", lambda _pid: "it is stopped"))
        enter(patch.object(waiting, "held_up", lambda _pid: "it is stopped"))
        enter(patch.object(unkillable, "explained", lambda container, _: f"{container.id} runs"))
        enter(patch.object(paths, "unpin", _unpin))
        enter(patch.object(mountinfo, "table", lambda: ""))
        for module in (sandboxes, recovery):
            enter(patch.object(module, "boot_id", lambda: world.machine.boot))
        enter(patch.object(network, "links", links))
        enter(patch.object(network, "DeclaredTable", SimulatedTable))
        enter(patch.object(setup, "set_up", set_up))
        enter(patch.object(setup, "tear_down", tear_down))
        enter(
            patch.object(sysctls, "apply", lambda _settings: world.machine.step("network.sysctl"))
        )
        enter(patch.object(bridge, "is_up", lambda _name: world.machine.bridge))
        enter(patch.object(listeners, "warnings", lambda *_: ()))
        yield


def _time_ns() -> int:
    return world.machine.time_ns()


def _randbelow(bound: int) -> int:
    return world.machine.random.randrange(bound)


def _pidfd_send_signal(fd: int, number: int, *_: Any) -> None:
    world.machine.pidfd_send_signal(fd, number)


def _unraisable(unraisable: Any) -> None:
    """Coroutines of a dead agent are destroyed in the middle of what they do."""
    if not isinstance(unraisable.exc_value, Killed | RuntimeError | InvalidStateError):
        sys.__unraisablehook__(unraisable)


def _unpin(pod: str) -> None:
    world.machine.step("unpin", pod)
    pod_id = os.path.basename(pod)
    if pod_id in world.machine.pods:
        world.machine.pods.pop(pod_id).has_pins = False
