"""How long the agent waits for the answer to each request to a launcher or a supervisor.

None waits without an end: the process may be stopped, hang in the kernel, or have lost its answer (ENOBUFS). What a
container can hold up has longer than what the process answers by itself; a process that says nothing at all meanwhile
is noticed after SILENCE_SECONDS in either case.
"""

from collections.abc import Mapping

# Answered by a process that runs within milliseconds; a busy node may take a thousand times as long.
QUICK_SECONDS = 10.0

# A process that has said nothing for half of this time is asked whether it is there; for all of it, it is silent.
SILENCE_SECONDS = 10.0

# The kubelet waits 2 minutes for a creation, comes back within 5, which is the longest of its pauses, and then joins
# what goes on: relabelling a large volume may take as long. A hook of a CDI device may take as long before a start.
LONG_SECONDS = 600.0

SECONDS: Mapping[str, float] = {
    # of a launcher
    "fork": 20.0,  # it takes milliseconds to make namespaces
    "successor": 20.0,  # which has to read what waits in the pipes of containers
    "abandon": QUICK_SECONDS,
    "list": QUICK_SECONDS,
    # of both: a launcher has to reap, a container is only told to end
    "stop": QUICK_SECONDS,
    # of a supervisor
    "namespaces": QUICK_SECONDS,
    "state": QUICK_SECONDS,
    "resize": QUICK_SECONDS,
    "exec_resize": QUICK_SECONDS,
    "attach": QUICK_SECONDS,
    "reopen_log": 30.0,  # opens a file of the volume with logs
    "configure": 30.0,  # makes a process where containers share a PID namespace
    "dial": 30.0,  # waits for a server in the pod
    "create": LONG_SECONDS,
    "start": LONG_SECONDS,
    "exec": 120.0,  # the program may be on a volume
    # Both kill what runs first, which ends within milliseconds or waits for a filesystem, perhaps for ever. The caller
    # is to learn that long before its own deadline, and an agent that ends undoes creations within `STOP_SECONDS`.
    "remove": QUICK_SECONDS,
    "shutdown": 20.0,
}
