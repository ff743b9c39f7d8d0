"""Further processes in running containers.

An exec belongs to the supervisor: the end of the agent does not end it. It is known by a number that the agent gave it.
A terminal is hung up when neither client nor agent has it open any more: its controlling process gets SIGHUP, as at the
end of an ssh session. A client that only writes to it has left when its input ends. Without a terminal, a program whose
client has left reads the end of its input, and gets EPIPE for what it writes; one that does neither goes on.
Its cgroup is its own, so that when its time is over the whole tree is killed, what it left in the background included.
Its pipes are its own as well: what it reads and writes is relayed from and to those that the agent gave.
"""

import os
import signal
import socket
from typing import Any

from nodeagent.errors import AlreadyExists, FailedPrecondition, NotFound
from nodeagent.sandbox import protocol
from nodeagent.sandbox.init import main as init
from nodeagent.sandbox.runtime.children import Child
from nodeagent.sandbox.runtime.loop import Timer
from nodeagent.sandbox.runtime.peers import Peer, Request
from nodeagent.sandbox.spec import ExecPlan, Identity, ProcessPlan
from nodeagent.sandbox.supervisor import visibility
from nodeagent.sandbox.supervisor.birth import Birth
from nodeagent.sandbox.supervisor.containers import Container, set_size
from nodeagent.sandbox.supervisor.groups import Group, split_join_fds
from nodeagent.sandbox.supervisor.pod import Pod
from nodeagent.sandbox.supervisor.relay import Streams


class Exec:
    """An exec. size: of the terminal, width and height, before the program sees it."""

    def __init__(
        self, execs: "Execs", request: Request, container: Container, group: Group
    ) -> None:
        self.plan = protocol.checked(ExecPlan, request.body["plan"])
        self.number: int = request.body["exec"]
        self.container = container
        self.agent: Peer = request.peer
        self.pid = 0
        self._execs = execs
        self._request: Request | None = request
        self._size: Any = request.body.get("size")
        self._group = group
        self._streams: Streams
        self._pidfd = -1
        self._master: int | None = None
        self._birth: Birth | None = None
        self._failure: Exception | None = None
        self._timer: Timer | None = None
        self._timed_out = False
        self._killed = False
        self._is_hidden = False
        self._loop = execs.pod.loop

    @property
    def settings(self) -> ProcessPlan:
        settings = self.container.plan["process"]
        score = self.plan.get("oom_score_adj", settings["oom_score_adj"])
        return {**settings, "oom_score_adj": score}

    def begin(self, child: Child, status: socket.socket, streams: Streams, *, hidden: bool) -> None:
        self.pid, self._pidfd = child
        self._streams = streams
        self._is_hidden = hidden
        self._birth = Birth(self._loop, status.detach(), self, child.pid if hidden else None)
        if self.plan["timeout_ms"] > 0:
            self._timer = self._loop.call_after(self.plan["timeout_ms"], self._time_out)
        if not self.plan["tty"]:
            self._birth.go()

    def succeeded(self, pid: int) -> None:
        child = self._execs.pod.children.adopt_sibling(pid, self.ended)
        os.close(self._pidfd)
        self.pid, self._pidfd = child
        self._is_hidden = False
        if self._killed:
            self.kill()

    def ready(self, identity: Identity, warnings: list[str], master: int | None) -> None:
        if master is None or self._birth is None:
            return
        os.set_blocking(master, False)
        self._master = master
        try:
            if self._size:
                set_size(master, *self._size)
            self._streams.connect(master, self.hang_up)
        except OSError as error:
            self._birth.abandon(error)
        else:
            self._birth.go()

    def executed(self) -> None:
        self._birth = None
        if self._request is not None:
            self._request.reply({"pid": self.pid})
            self._request = None

    def failed(self, error: Exception) -> None:
        """Fail the request; an exec whose time was over before its program ran counts as begun and ended."""
        if self._timed_out:
            self.executed()
            return
        self._birth = None
        self._failure = error
        self.kill()

    def _time_out(self) -> None:
        self._timed_out = True
        self.kill()

    def kill(self) -> None:
        """Kill the process, and the whole tree if it has a cgroup of its own."""
        self._killed = True
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._group.kill()

    def resize(self, width: int, height: int) -> None:
        if self._master is None:
            raise FailedPrecondition(f"exec {self.number}: has no terminal")
        set_size(self._master, width, height)

    def hang_up(self) -> None:
        """Hang up a terminal that nobody uses any more: closing the last copy of its master sends SIGHUP (tty(4))."""
        if self._master is None:
            return
        self._streams.disconnect()
        os.close(self._master)
        self._master = None

    def first_ended(self, code: int) -> None:
        """A hidden process ends when its successor has been found."""
        if self._is_hidden and self._birth is not None:
            self._birth.listen()
        if self._is_hidden:
            self.ended(code)

    def ended(self, code: int) -> None:
        if self._birth is not None:
            self._birth.conclude()
        self._execs.forget(self)
        if self._timer is not None:
            self._timer.cancel()
        self._group.close()
        os.close(self._pidfd)
        if self._master is not None:
            os.close(self._master)
            self._master = None
        self._streams.close_waiting()
        self._loop.call_after(0, lambda: self._streams.settle(lambda: self._tell_end(code)))

    def _tell_end(self, code: int) -> None:
        """Report the end: when the process has been reaped, and the agent can read all that it wrote."""
        if self._request is not None and self._failure is not None:
            self._request.fail(self._failure)
        else:
            end = {"exec": self.number, "code": code, "timed_out": self._timed_out}
            self.agent.send({"event": "exec_exit", **end})


class Execs:
    """The execs of a pod. Numbers are an agent's own: the next agent's begin anew. members: the pod's containers."""

    def __init__(self, pod: Pod, members: dict[str, Container]) -> None:
        self.pod = pod
        self._members = members
        self._execs: dict[tuple[Peer, int], Exec] = {}

    def begin(self, container: Container, request: Request) -> None:
        """Reply when the program is executed; the end comes as an event."""
        if container.state != "running":
            raise FailedPrecondition(
                f'container "{container.id}": is {container.state}, not running'
            )
        hidden = visibility.must_hide_exec(self._members, container) or (
            visibility.namespace_of(container) in self.pod.about_to_share
        )
        if (request.peer, request.body["exec"]) in self._execs:
            raise AlreadyExists(f"exec {request.body['exec']}: exists already")
        join = request.take_all("join")
        group = Group(self.pod.loop, procs=request.take("procs"), kill=request.take("kill"))
        try:
            exec_ = Exec(self, request, container, group)
            if hidden:
                what = f'exec in container "{container.id}"'
                visibility.require_successor(what, exec_.settings, tty=exec_.plan["tty"])
            stdio = request.take("stdin"), request.take("stdout"), request.take("stderr")
            streams = Streams(self.pod.loop, *stdio, tty=exec_.plan["tty"])
            self._spawn(exec_, join, streams, hidden=hidden)
        except BaseException:
            group.close()
            raise
        finally:
            protocol.close_all(join)

    def _spawn(self, exec_: Exec, join: list[int], streams: Streams, *, hidden: bool) -> None:
        target, userns = exec_.container.fds["pidfd"], self.pod.userns
        stdio = streams.stdin, streams.stdout, streams.stderr
        try:
            cgroup, tasks = split_join_fds(join)
            kept = (target, *stdio, userns, *tasks)
            with self.pod.children_join(None if hidden else target):
                child, ours = self.pod.children.spawn_connected(
                    lambda status: init.run_exec(
                        exec_.plan,
                        exec_.settings,
                        init.ExecFds(status, target, *stdio, tasks, userns, hidden),
                    ),
                    exec_.first_ended if hidden else exec_.ended,
                    keep=[fd for fd in kept if fd >= 0],
                    cgroup=cgroup,
                )
        except BaseException:
            streams.close_waiting()
            raise
        finally:
            streams.close_given()
        self._execs[exec_.agent, exec_.number] = exec_
        exec_.begin(child, ours, streams, hidden=hidden)

    def get(self, request: Request) -> Exec:
        number = request.body["exec"]
        exec_ = self._execs.get((request.peer, number))
        if exec_ is None:
            raise NotFound(f"exec {number}: not found")
        return exec_

    def forget(self, exec_: Exec) -> None:
        self._execs.pop((exec_.agent, exec_.number), None)

    def running(self) -> list[Exec]:
        return list(self._execs.values())

    def left_by(self, agent: Peer) -> None:
        """Hang up the terminals of an agent that has disconnected, and with it their clients."""
        for exec_ in self.running():
            if exec_.agent is agent:
                exec_.hang_up()
