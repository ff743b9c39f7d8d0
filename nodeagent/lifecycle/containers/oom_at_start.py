"""The error of a creation or start whose first process was OOM-killed before the program ran.

The process prepares itself in the container's cgroup already, so that a very low limit ends it there. The counters of
the cgroup decide whether that was so; nothing is concluded from the signal alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from nodeagent.cgroups.group import Cgroup
from nodeagent.cgroups.stats import MemoryStats
from nodeagent.errors import NodeAgentError, NotFound, StartError, Unavailable
from nodeagent.records import Container

# Measured: 1 MiB is enough for a small container on cgroup v1, 1.5 MiB on v2. Mounts, a user namespace or a shared PID
# namespace take some more, and the program comes on top.
ENOUGH_MIB = 4


@contextmanager
def named(container: Container, group: Cgroup) -> Iterator[None]:
    """Raise StartError, with the limit and the remedy, in place of an error that comes with an OOM kill.

    group: the container's, in which no program has been executed yet, so that a kill can only be of its first process.
    """
    try:
        yield
    except Unavailable:
        # The supervisor is unavailable: the program may have been executed, and a child of it killed.
        raise
    except (NodeAgentError, OSError) as error:
        memory = _memory(group)
        if memory is None or not memory.oom_kills:
            raise
        raise StartError(
            f'container "{container.config.name}": its first process was OOM-killed before it executed '
            f"the program: {_why(container, memory)}"
        ) from error


def _why(container: Container, memory: MemoryStats) -> str:
    """The reason and the remedy: the kernel counts failures in the group whose limit was hit, here or above."""
    if memory.failures:
        return (
            f"the memory limit of {container.resources.memory_limit_bytes} bytes is too low; raise it, to "
            f"{ENOUGH_MIB} MiB at least and to what the program needs"
        )
    return "its pod has reached its own memory limit, or the node is out of memory; raise the one, or free the other"


def _memory(group: Cgroup) -> MemoryStats | None:
    try:
        return group.stats().memory
    except NotFound:  # it has been removed, and the error at hand says more
        return None
