"""What the launcher and the supervisors have in common: they answer requests."""

from collections.abc import Mapping
from typing import Any

from nodeagent.errors import NodeAgentError
from nodeagent.sandbox import protocol
from tests.chaos.simulation.connection import Connection, Process, close_file

LATE_SECONDS = (1.0, 6.0, 12.0, 40.0)  # some of them longer than the deadlines of most requests


class Request:
    """A request of an agent, which is answered once."""

    def __init__(
        self, connection: Connection, body: Mapping[str, Any], files: list[tuple[str, Any]]
    ) -> None:
        self.connection = connection
        self.body = body
        self.files = files

    def take(self, name: str) -> list[Any]:
        taken = [file for key, file in self.files if key == name]
        self.files = [pair for pair in self.files if pair[0] != name]
        return taken

    def discard(self) -> None:
        for _, file in self.files:
            close_file(file)
        self.files = []

    def reply(self, result: Mapping[str, Any] | None = None, fds: list[int] | None = None) -> None:
        self._answer({"result": result or {}}, fds)

    def fail(self, error: BaseException) -> None:
        self._answer(protocol.describe_error(error))

    def _answer(self, answer: Mapping[str, Any], fds: list[int] | None = None) -> None:
        packet = protocol.encode({"id": self.body["id"], **answer})
        machine = self.connection.machine
        if self.body["op"] == "hello" or not machine.is_struck("late"):
            self.connection.send(packet, fds)
            return
        seconds = machine.random.choice(LATE_SECONDS)
        machine.loop.after(seconds, lambda: self.connection.send(packet, fds))


class Server(Process):
    """A process that answers requests."""

    fault = ""

    def received(self, connection: Connection, message: dict[str, Any], files: list[Any]) -> None:
        names = message.get("fds", [])
        request = Request(connection, message, list(zip(names, files, strict=True)))
        operation = message["op"]
        if operation == "hello":
            request.reply(protocol.spoken())
            return
        self.machine.trace(
            f"{self.name} {self.pid}: {operation} {str(message.get('container', ''))[-4:]}"
        )
        try:
            if self.machine.is_struck(self.fault) and operation not in {"exec_kill", "detach"}:
                raise OSError(12, "Cannot allocate memory")
            getattr(self, f"do_{operation}")(request)
        except (NodeAgentError, OSError) as error:
            request.fail(error)
        finally:
            request.discard()
