"""Single bytes that a process and its supervisor send each other between clone3(2) and execve(2).

The other messages are JSON: see `nodeagent.sandbox.init.main` and `nodeagent.sandbox.supervisor.birth`.
"""

GO = b"g"  # execute the program
PROCEED = b"p"  # the hooks that the supervisor runs have been run
BORN = b"b"  # sent by a hidden process: its successor has been made

# The number under which a hidden process has the pidfd of its successor. By then it has closed its descriptor of the
# pipe for errors, so that this pipe ends with the successor.
SUCCESSOR_PIDFD = 7

MAX_TEXT_BYTES = 4096  # of an error
