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
    kept: dict[str, int] = {}
    stdin = -1
    if plan["stdin"]:
        stdin, kept["stdin"] = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(kept["stdin"], False)
    kept["stdout"], stdout = _output()
    kept["stderr"], stderr = _output()
    return Stdio(stdin, stdout, stderr, kept)


def _output() -> tuple[int, int]:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(reader, False)
    return reader, writer
