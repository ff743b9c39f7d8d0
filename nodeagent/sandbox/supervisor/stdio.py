"""Standard streams of a container's process: the ends that it gets, and those that its supervisor keeps."""

import os
from typing import NamedTuple

from nodeagent.sandbox import protocol
from nodeagent.sandbox.spec import ContainerPlan


class Stdio(NamedTuple):
    """The ends of the streams; -1 is the container's /dev/null. A terminal has no pipes: its master comes later.

    kept: by the name of the stream.
    """

    stdin: int
    stdout: int
    stderr: int
    kept: dict[str, int]

    def close_given(self) -> None:
        """Close the process's ends, of which it has its own copies."""
        protocol.close_all(end for end in self[:3] if end >= 0)

    def close_kept(self) -> None:
        protocol.close_all(self.kept.values())


def open_stdio(plan: ContainerPlan) -> Stdio:
    if plan["tty"]:
        return Stdio(-1, -1, -1, {})
    names = (*(("stdin",) if plan["stdin"] else ()), "stdout", "stderr")
    pipes: dict[str, tuple[int, int]] = {}
    try:
        for name in names:
            pipes[name] = os.pipe2(os.O_CLOEXEC)
    except OSError:
        for pipe in pipes.values():
            protocol.close_all(pipe)
        raise
    stdin, writer = pipes.pop("stdin", (-1, -1))
    kept = {name: reader for name, (reader, _) in pipes.items()}
    if writer >= 0:
        kept["stdin"] = writer
    for ours in kept.values():
        os.set_blocking(ours, False)
    return Stdio(stdin, pipes["stdout"][1], pipes["stderr"][1], kept)
