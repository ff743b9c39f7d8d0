"""The error of a stop or an undo beside a container that has not ended after SIGKILL, with what blocks it."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nodeagent.cgroups.group import Cgroup
from nodeagent.errors import NodeAgentError
from nodeagent.lifecycle.containers.groups import Groups
from nodeagent.linux import waiting
from nodeagent.records import Container


@contextmanager
def named(containers: Iterable[Container], groups: Groups) -> Iterator[None]:
    """Add to a TimeoutError which of these containers, that were killed, still have processes, and why."""
    try:
        yield
    except TimeoutError as error:
        texts = [str(error), *(text for each in containers if (text := _left(each, groups)))]
        raise TimeoutError("; ".join(texts)) from None


def _left(container: Container, groups: Groups) -> str:
    try:
        group = groups.of(container)
        return explained(container, group) if group.processes() else ""
    except (NodeAgentError, OSError):  # it has ended, and its group was removed
        return ""


def explained(container: Container, group: Cgroup) -> str:
    """The error's text, with what blocks the container as far as /proc shows it. group: the container's."""
    if tracer := _tracer_of_zombie(container.pid):
        return (
            f'container "{container.id}": process {container.pid} is dead, but its tracer has not waited for it, '
            f"so that its parent cannot reap it; end process {tracer} first"
        )
    text = f'container "{container.id}": still running after SIGKILL'
    stuck = [
        f"{pid} in {where}"
        for pid in group.processes()
        if (where := waiting.uninterruptible_in(pid))
    ]
    return f"{text}; uninterruptible: {', '.join(stuck)}" if stuck else text


def _tracer_of_zombie(pid: int) -> int:
    """The tracer of a dead process, else 0. Until it has waited for that, the parent cannot reap it (ptrace(2))."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    tracer = re.search(r"^State:\tZ.*^TracerPid:\t(\d+)$", status, re.MULTILINE | re.DOTALL)
    return int(tracer[1]) if tracer else 0
