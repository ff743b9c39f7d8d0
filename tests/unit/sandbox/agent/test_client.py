"""The agent's side of a supervisor that answers as an earlier version did."""

import asyncio
import os
import socket
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from nodeagent.errors import Unsupported
from nodeagent.sandbox import protocol
from nodeagent.sandbox.agent.client import ExecIO, Supervisor
from nodeagent.sandbox.agent.handles import CgroupFds
from nodeagent.sandbox.paths import SUPERVISOR_SOCKET
from nodeagent.sandbox.spec import ExecPlan

NO_CGROUP = CgroupFds(join=[], oom=None, procs=None, kill=None)


class Earlier:
    """Answers one exec with the master of its terminal, and keeps what is said next."""

    def __init__(self, directory: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(directory / SUPERVISOR_SOCKET))
        self._listener.listen()
        self.next: dict[str, Any] = {}
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        master, self.other_end = os.pipe()
        with self._listener, connection, open(master, "rb"):
            asked = protocol.receive(connection)
            assert asked is not None
            result = {"pid": 1, "fds": ["master"]}
            packet = protocol.encode({"id": asked.body["id"], "result": result})
            protocol.send(connection, packet, [master])
            said = protocol.receive(connection)
            assert said is not None
            self.next = dict(said.body)


async def test_a_terminal_that_the_agent_would_hold_is_refused(tmp_path: Path) -> None:
    earlier = Earlier(tmp_path)
    client = await Supervisor.connect(tmp_path, "pod")
    with pytest.raises(Unsupported, match=r'container "c": .* recreate the pod'):
        await client.exec(cast(ExecPlan, {"container": "c"}), ExecIO(), NO_CGROUP)
    await asyncio.to_thread(earlier.thread.join)
    assert earlier.next["op"] == "exec_kill"
    with pytest.raises(BrokenPipeError):  # nobody has the terminal open
        os.write(earlier.other_end, b"x")
    os.close(earlier.other_end)
    client.close()
