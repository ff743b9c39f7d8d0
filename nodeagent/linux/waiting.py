"""What a process that does not answer is doing, as proc(5) shows it, and what an operator can do about it."""

from nodeagent.linux.processes import stat_fields


def uninterruptible_in(pid: int) -> str:
    """The kernel function in which a process sleeps uninterruptibly (state D); "" for any other process."""
    try:
        return _kernel_function(pid) if stat_fields(pid)[0] == b"D" else ""
    except OSError:
        return ""


def held_up(pid: int) -> str:
    """What keeps a process from going on, and the remedy; "" where nothing is known to."""
    try:
        state, where = stat_fields(pid)[0].decode(), _kernel_function(pid)
    except OSError:
        return ""
    # The freezers of cgroup v1 (__refrigerator, state D) and v2 (do_freezer_trap, state S).
    if "refrigerator" in where or "freezer" in where:
        return f"its cgroup is frozen; thaw what /proc/{pid}/cgroup names"
    if state in "Tt":
        return f'it is stopped (state {state}); resume it with "kill -CONT {pid}"'
    if state == "D":
        return f"it waits in {where or 'the kernel'} (state D); a filesystem or disk of this node is hung"
    return ""


def explained(pid: int) -> str:
    """What a process does, and the remedy, for an error's text."""
    if text := held_up(pid):
        return text
    try:
        state = stat_fields(pid)[0].decode()
    except OSError:
        return "it has ended"
    if state in "ZX":
        return f"it has ended (state {state})"
    return (
        f'it is in state {state}; if that lasts, "kill -KILL {pid}" has another one take its place'
    )


def _kernel_function(pid: int) -> str:
    """The kernel function that a process sleeps in; "" for one that runs, and without the right to know."""
    try:
        with open(f"/proc/{pid}/wchan") as file:
            name = file.read()
    except PermissionError:
        return ""
    return "" if name == "0" else name
