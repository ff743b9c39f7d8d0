"""Attachments to a container: clients that see its output from now on, and may write its input."""

import os

from nodeagent.errors import AlreadyExists, FailedPrecondition
from nodeagent.sandbox import protocol
from nodeagent.sandbox.runtime.peers import Peer, Request
from nodeagent.sandbox.supervisor.containers import Container
from nodeagent.sandbox.supervisor.pump import AttachedOutput
from nodeagent.sandbox.supervisor.relay import Relay

Key = tuple[Peer, int]


class Attachments:
    """The attachments of a pod. Each is known by a number that the agent gave it.

    The agent gets ends of pipes whose other ends only the supervisor has.
    """

    def __init__(self) -> None:
        self._containers: dict[Key, Container] = {}

    def attach(self, container: Container, request: Request) -> None:
        key = request.peer, int(request.body["attach"])
        if key in self._containers:
            raise AlreadyExists(f"attachment {key[1]}: exists already")
        if container.pump is None or container.exit is not None:
            raise FailedPrecondition(
                f'container "{container.id}": is {container.state}, not running'
            )
        output = AttachedOutput(lambda: self._cut_off(key))
        given: list[tuple[str, int]] = []
        try:
            given.extend((name, output.add(name)) for name in container.pump.streams)
            end = container.fds.get("stdin", container.fds.get("master"))
            if end is not None:
                given.append(("stdin", input_to(container, end)))
            names, fds = protocol.named(given)
            container.pump.attached[key] = output
            self._containers[key] = container
            request.reply({"fds": names}, fds)
        except BaseException:
            output.close()
            raise
        finally:
            protocol.close_all(end for _, end in given)

    def end_input(self, request: Request) -> None:
        """End the input of this attachment; with stdin_once, the container's."""
        container = self._containers.get((request.peer, request.body["attach"]))
        if container is not None and container.plan["stdin_once"]:
            container.close_stdin()
        request.reply()

    def detach(self, request: Request) -> None:
        self._end((request.peer, request.body["attach"]))
        request.reply()

    def left_by(self, agent: Peer) -> None:
        """End the attachments of an agent that has disconnected."""
        for key in list(self._containers):
            if key[0] is agent:
                self._end(key)

    def _cut_off(self, key: Key) -> None:
        """Detach a client that reads too slowly, or not at all any more."""
        self._end(key)
        key[0].send({"event": "detached", "attach": key[1]})

    def _end(self, key: Key) -> None:
        container = self._containers.pop(key, None)
        if container is None:
            return
        if container.pump is not None:
            output = container.pump.attached.pop(key, None)
            if output is not None:
                output.close()
        if container.plan["stdin_once"]:
            container.close_stdin()


def input_to(container: Container, end: int) -> int:
    """The writing end of a pipe that is relayed to the container's input until it ends, even if the client has left.

    end: of the container's pipe, or of its terminal.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        copy = os.dup(end)
    except OSError:
        protocol.close_all((reader, writer))
        raise
    try:
        Relay(container.pod.loop, reader, copy)
    except OSError:
        os.close(writer)
        raise
    return writer
