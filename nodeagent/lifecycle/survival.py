"""What StopContainer says of a container that is still there though the kernel was told to kill it."""

import re
from pathlib import Path

from nodeagent.cgroups.group import Cgroup
from nodeagent.records import Container


def explained(container: Container, group: Cgroup) -> str:
    """Name what holds it, as far as that can be seen, and the remedy. group: the container's."""
    text = f'container "{container.id}": still running after SIGKILL'
    if tracer := _tracer_of_zombie(container.pid):
        return f"{text}; its process {container.pid} is dead, but held by its tracer: end process {tracer} first"
    stuck = [f"{pid} in {where}" for pid in group.processes() if (where := _uninterruptible(pid))]
    return f"{text}; uninterruptible: {', '.join(stuck)}" if stuck else text


def _tracer_of_zombie(pid: int) -> int:
    """The process that traces a dead one and has not waited for it: until then its parent cannot (ptrace(2)). Or 0."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    tracer = re.search(r"^State:\tZ.*^TracerPid:\t(\d+)$", status, re.MULTILINE | re.DOTALL)
    return int(tracer[1]) if tracer else 0


def _uninterruptible(pid: int) -> str:
    """The kernel function a process in state D sleeps in, or ""."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
        return Path(f"/proc/{pid}/wchan").read_text() if state == "D" else ""
    except OSError:
        return ""
