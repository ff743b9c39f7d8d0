"""The kernel's counter of OOM kills, as a cgroup's memory.events (v2) and memory.oom_control (v1) have it."""


def kills(data: bytes) -> int:
    """The number of the group's processes that the OOM killer killed; 0 where it is not counted (v1 before 4.13)."""
    lines = data.splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(b"oom_kill ")), 0)
