"""The way to the launcher and to supervisors, which is the one boundary between the agent and these processes."""

from collections.abc import Callable, Sequence
from typing import Protocol

from nodeagent.sandbox.agent.channel import Channel
from nodeagent.sandbox.agent.starting import start_launcher
from nodeagent.sandbox.protocol import Body


class Connector(Protocol):
    """Connects to the processes below the agent, and starts the one that forks the others."""

    async def connect(
        self, path: str, name: str, on_event: Callable[[Body], None], on_end: Callable[[], None]
    ) -> Channel:
        """Connect to the process that listens at the socket `path`. Raises OSError where nobody does.

        The other parameters are those of `Channel`.
        """

    async def start_launcher(self, state: str, python: str, join_fds: Sequence[int]) -> None:
        """Start a launcher; returns when it listens. Raises AlreadyExists where there is one, else Unavailable."""


class Sockets:
    """The connector of this machine: Unix sockets below the state directory, and real processes."""

    async def connect(
        self, path: str, name: str, on_event: Callable[[Body], None], on_end: Callable[[], None]
    ) -> Channel:
        return await Channel.connect(path, name, on_event, on_end)

    async def start_launcher(self, state: str, python: str, join_fds: Sequence[int]) -> None:
        await start_launcher(state, python, join_fds)


SOCKETS: Connector = Sockets()


def ignore_event(_event: Body) -> None:
    """Expect no events, as of a launcher."""


def ignore_end() -> None:
    """Have nothing to do when a connection ends."""
