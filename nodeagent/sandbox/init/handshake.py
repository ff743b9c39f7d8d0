"""What a process and its supervisor say to each other between clone3(2) and execve(2), in single bytes.

The rest of it are messages of JSON: see `nodeagent.sandbox.init.main` and `nodeagent.sandbox.supervisor.birth`.
"""

GO = b"g"  # execute the program
PROCEED = b"p"  # the hooks that the supervisor runs have been run
BORN = b"b"  # of a hidden process: its successor is there

# The number under which a hidden process has the pidfd of its successor. It has no descriptor any more then of the pipe
# that tells what goes wrong, so that the end of that is the successor's.
SUCCESSOR_PIDFD = 7

MAX_TEXT_BYTES = 4096  # of an error
