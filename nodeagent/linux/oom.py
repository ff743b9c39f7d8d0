"""The kernel's counter of OOM kills, as a cgroup's memory.events (v2) and memory.oom_control (v1) have it."""


def kills(data: bytes) -> int:
    """How many processes of the group the OOM killer has ended; 0 where the kernel does not count (v1 before 4.13)."""
    lines = data.splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(b"oom_kill ")), 0)
