"""The launcher: parent of the supervisors, and of the processes that a killed supervisor leaves behind.

It is started with exec, is small because it imports the standard library only, and forks a supervisor in a fraction of
a millisecond. It survives the agent and serves the next one. Of every container it keeps the descriptors that a
successor of its supervisor needs; while there is no supervisor, it writes the exit records.
"""

import fcntl
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import NoReturn

from nodeagent import files
from nodeagent.errors import AlreadyExists, FailedPrecondition, IncompatibleVersion, Unavailable
from nodeagent.linux import immortal, processes
from nodeagent.sandbox import exits, facts, protocol
from nodeagent.sandbox.launcher import rehearsal
from nodeagent.sandbox.paths import LAUNCHER_READY, LAUNCHER_SOCKET, SUPERVISOR_SOCKET
from nodeagent.sandbox.protocol import Message
from nodeagent.sandbox.runtime import peers, process
from nodeagent.sandbox.runtime.children import Children, close_others
from nodeagent.sandbox.runtime.launcher_link import Deposit
from nodeagent.sandbox.runtime.loop import Loop, guarded, report
from nodeagent.sandbox.runtime.peers import Listener, Peer, Request
from nodeagent.sandbox.spec import PodPlan
from nodeagent.sandbox.supervisor import main as supervisor

LOCK = "launcher.lock"

_STOP_PAUSE_MS = 2
_PAUSE_MS = 1000  # after a failure that may pass


class KeptPod:
    """A pod as the launcher knows it. peer: its supervisor, of that pid. request: waits until the pod is served."""

    def __init__(self, pod_id: str, directory: str) -> None:
        self.id = pod_id
        self.directory = directory
        self.peer: Peer | None = None
        self.pid = 0
        self.request: Request | None = None
        self.failure: Exception | None = None
        self.deposits: dict[str, Deposit] = {}

    @property
    def has_supervisor(self) -> bool:
        """Whether it lives, even blocked; one that is exiting, and about to close its descriptors, does not count."""
        try:
            return self.peer is not None and not processes.is_exiting(self.pid)
        except OSError:
            return False

    def take(self, container: str, names: Collection[str] | None = None) -> list[int]:
        """Take out descriptors of a container, by name or all; they are to be closed with `Launcher._close`."""
        deposit = self.deposits.get(container)
        if deposit is None:
            return []
        taken = deposit.fds.keys() if names is None else deposit.fds.keys() & set(names)
        descriptors = [deposit.fds.pop(name) for name in tuple(taken)]
        if names is None:
            del self.deposits[container]
        return descriptors


class Launcher:
    """Serves ``<state>/launcher.sock`` until it is stopped."""

    def __init__(self, state: str, loop: Loop) -> None:
        self._path = f"{state}/{LAUNCHER_SOCKET}"
        self._loop = loop
        self._children = Children(loop, self._hear_supervisors)
        self._pods: dict[str, KeptPod] = {}
        self._refused: set[str] = set()  # pods of which it has been said
        self._failing = False  # to close descriptors, which has been said
        self._operations = {
            "fork": self._fork,
            "successor": self._succeed,
            "abandon": self._abandon,
            "list": self._list,
            "stop": self._stop,
        }
        self._messages = {
            "ready": self._is_ready,
            "failed": self._has_failed,
            "keep": self._keep,
            "drop": self._drop,
            "done": self._is_done,
        }
        self._listener = Listener(loop, self._path, self._accept)

    def _accept(self, connection: socket.socket) -> None:
        Peer(self._loop, connection, self._received, lambda _peer: None)

    def _received(self, peer: Peer, message: Message) -> None:
        if message.body.get("op") == "attend":
            guarded(self._attend, peer, message)
        else:
            peers.perform("launcher", self._operations, peer, message)

    # --- what agents ask for ---

    def _fork(self, request: Request) -> None:
        """Reply when the supervisor serves its pod."""
        plan = protocol.checked(PodPlan, request.body["plan"])
        if protocol.checked_id(plan["id"]) in self._pods:
            raise AlreadyExists(f'pod "{plan["id"]}": has a supervisor, or had one')
        pod = KeptPod(plan["id"], plan["directory"])
        self._launch(pod, request, lambda launcher: supervisor.main(plan, launcher))

    def _succeed(self, request: Request) -> None:
        """Reply when another supervisor serves the pod of one that has died."""
        self._hear_supervisors()
        self._children.reap()
        pod = self._pods.get(request.body["pod"])
        if pod is None:
            pod = KeptPod(request.body["pod"], request.body["directory"])
        if pod.peer is not None or _is_served(pod.directory):
            raise AlreadyExists(f'pod "{pod.id}": has a supervisor')
        kept = {name: deposit.fds for name, deposit in pod.deposits.items()}
        self._launch(
            pod, request, lambda launcher: supervisor.succeed(pod.id, pod.directory, launcher, kept)
        )

    def _launch(self, pod: KeptPod, request: Request, main: Callable[[int], NoReturn]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        says, gone = partial(self._supervisor_says, pod), partial(self._supervisor_gone, pod)
        peer = Peer(self._loop, ours, says, gone)
        kept = [fd for deposit in pod.deposits.values() for fd in deposit.fds.values()]
        with theirs:
            try:
                child = self._children.spawn(
                    lambda: main(theirs.fileno()),
                    partial(self._supervisor_ended, pod, peer),
                    keep=[theirs.fileno(), *kept],
                )
            except OSError:
                peer.close()
                raise
        os.close(child.pidfd)  # SIGCHLD and the connection tell of its end
        pod.peer, pod.pid, pod.request = peer, child.pid, request
        self._pods[pod.id] = pod

    def _abandon(self, request: Request) -> None:
        """Kill the supervisor of an unusable pod, and keep nothing of it; the agent kills its containers."""
        pod = self._pods.get(request.body["pod"])
        if pod is not None:
            self._is_done(pod, request)
            if pod.peer is not None:
                os.kill(pod.pid, signal.SIGKILL)
        request.reply()

    def _list(self, request: Request) -> None:
        self._hear_supervisors()
        request.reply({"pods": list(self._pods)})

    def _stop(self, request: Request) -> None:
        """Stop the launcher, if no pod is left."""
        self._hear_supervisors()
        if self._pods:
            raise FailedPrecondition(f"launcher: {len(self._pods)} pods are left")
        self._stop_when_alone(request)

    def _stop_when_alone(self, request: Request) -> None:
        """Reap supervisors that have ended their pods, kill what abandoned pods have left, and stop.

        Otherwise another process would inherit them.
        """
        if self._children.any():
            self._children.kill()
            self._loop.call_after(_STOP_PAUSE_MS, lambda: self._stop_when_alone(request))
            return
        os.unlink(self._path)
        request.reply()
        self._loop.stop()

    # --- what supervisors say ---

    def _attend(self, peer: Peer, message: Message) -> None:
        """Take on a supervisor of an earlier launcher."""
        protocol.close_all(message.fds)
        pod_id, directory = message.body["pod"], message.body["directory"]
        try:
            they = f'supervisor of pod "{pod_id}"'
            protocol.require_common_version(they, protocol.spoken_by(message.body), "launcher")
        except IncompatibleVersion as error:
            if pod_id not in self._refused:  # it tries again every second
                self._refused.add(pod_id)
                report(f"{error}; until then it has no launcher")
            peer.close()
            return
        pod = self._pods.get(pod_id) or KeptPod(pod_id, directory)
        if pod.peer is not None:
            pod.peer.close()
        self._pods[pod_id] = pod
        pod.peer, pod.pid = peer, peer.pid
        peer.received = partial(self._supervisor_says, pod)
        peer.closed = partial(self._supervisor_gone, pod)

    def _supervisor_says(self, pod: KeptPod, _peer: Peer, message: Message) -> None:
        try:
            self._messages[message.body["op"]](pod, message)
        except (KeyError, TypeError, ValueError) as error:
            report(f"pod {pod.id}: its supervisor says {message.body}: {error!r}")
            self._close(pod, message.fds)

    def _is_ready(self, pod: KeptPod, _message: Message) -> None:
        if pod.request is not None:
            pod.request.reply()
            pod.request = None

    def _has_failed(self, pod: KeptPod, message: Message) -> None:
        """Note why a pod could not be made; the request fails with it when the supervisor has ended."""
        pod.failure = protocol.read_error(message.body)

    def _keep(self, pod: KeptPod, message: Message) -> None:
        body = message.body
        fds = dict(zip(body["fds"], message.fds, strict=True))
        self._close(pod, pod.take(body["container"]))
        pod.deposits[body["container"]] = Deposit(body["pid"], body["oom_kills"], fds)

    def _drop(self, pod: KeptPod, message: Message) -> None:
        self._close(pod, pod.take(message.body["container"], message.body["names"]))
        if pod.peer is not None:
            pod.peer.send({"dropped": message.body.get("number", 0)})

    def _is_done(self, pod: KeptPod, _message: object) -> None:
        for container in tuple(pod.deposits):
            self._close(pod, pod.take(container))
        self._pods.pop(pod.id, None)

    def _close(self, pod: KeptPod, descriptors: Sequence[int]) -> None:
        """Close descriptors of which other processes have copies.

        The last close of a pipe waits, uninterruptibly, for its lock, which a container may hold.
        A supervisor has copies until we have answered (`LauncherLink.drop`). Where it is dead a child of ours has
        them, which may wait.
        """
        if pod.has_supervisor or not descriptors:
            protocol.close_all(descriptors)
            return
        pipe: tuple[int, ...] = ()
        try:
            pipe = reader, _ = os.pipe2(os.O_CLOEXEC)
            child = self._children.spawn(
                lambda: _end_after(reader), lambda _code: None, keep=[*descriptors, reader]
            )
        except OSError as error:  # nothing is leaked by a shortage that passes
            if not self._failing:
                self._failing = True
                report(f"pod {pod.id}: cannot close {len(descriptors)} descriptors yet: {error}")
            self._loop.call_after(_PAUSE_MS, lambda: self._close(pod, descriptors))
        else:
            self._failing = False
            protocol.close_all([*descriptors, child.pidfd])
        finally:
            protocol.close_all(pipe)

    def _supervisor_gone(self, pod: KeptPod, peer: Peer) -> None:
        """Adopt the processes of containers: they are our children now, if the supervisor was one."""
        if pod.peer is not peer:
            return
        pod.peer = None
        for container, deposit in pod.deposits.items():
            self._children.adopt(deposit.pid, partial(self._container_ended, pod, container))
        if not pod.deposits:
            self._pods.pop(pod.id, None)
        if pod.request is not None:
            # One that lives, and whose connection has ended for a shortage, would serve a pod that the agent undoes.
            with suppress(ProcessLookupError):
                os.kill(pod.pid, signal.SIGKILL)
            pod.request.fail(pod.failure or Unavailable(f'pod "{pod.id}": its supervisor died'))
            pod.request = pod.failure = None

    # --- children ---

    def _hear_supervisors(self) -> None:
        """Receive what supervisors have sent, and the news of their death, before anything is decided."""
        for pod in tuple(self._pods.values()):
            if pod.peer is not None:
                pod.peer.drain()

    def _supervisor_ended(self, pod: KeptPod, peer: Peer, code: int) -> None:
        """Close the connection: a child that the supervisor was just making may hold its end for another moment.

        A supervisor ends by itself only when its pod has ended, which it may not have been able to say.
        """
        peer.drain()
        peer.close()
        if code == 0:
            self._is_done(pod, None)

    def _container_ended(self, pod: KeptPod, container: str, code: int) -> None:
        deposit = pod.deposits.get(container)
        if deposit is None or not _has_ended(deposit.fds["pidfd"]):
            return
        end = exits.judge(
            code,
            killed=facts.was_killed(pod.directory, container),
            oom_before=deposit.oom_kills,
            counter=deposit.fds.get("oom"),
        )
        exits.record(pod.directory, container, end)


def _end_after(reader: int) -> NoReturn:
    """Keep descriptors open until the parent has closed its copies and the pipe; then close them by exiting."""
    process.set_title("na-closer", "nodeagent.sandbox.closer")
    os.read(reader, 1)
    os._exit(0)


def _has_ended(pidfd: int) -> bool:
    """Whether the process of this pidfd is a zombie child of ours, and not another process with its pid."""
    try:
        end = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return end is not None


def _is_served(directory: str) -> bool:
    """Whether a supervisor serves the pod, even a blocked one, whose queue of connections is full (EAGAIN)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as connection:
        try:
            with protocol.address(f"{directory}/{SUPERVISOR_SOCKET}") as address:
                connection.connect(address)
            os.kill(protocol.peer_of(connection).pid, 0)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return True


# ---- the process ----


def main(state: str, ready: int, *join: int) -> None:
    """Run until stopped.

    ready: a pipe that gets LAUNCHER_READY, or why there is no launcher. join: files of a cgroup, to write 0 to.
    """
    close_others([ready, *join])
    try:
        loop = _prepare(state, ready, join)
    except Exception as error:  # noqa: BLE001 whatever it is, the agent must know
        os.write(ready, f"launcher: {error}".encode())
        sys.exit(1)
    with suppress(BrokenPipeError):  # the agent did not live to read it
        os.write(ready, LAUNCHER_READY)
    os.close(ready)
    loop.run()


def _prepare(state: str, ready: int, join: Sequence[int]) -> Loop:
    process.hide()
    process.ignore_terminal()
    process.set_title("na-launcher", f"nodeagent.sandbox.launcher {state}")
    os.umask(files.UMASK)
    os.chdir("/")  # or the file system that it was started in could not be unmounted (EBUSY)
    for file in join:
        os.write(file, b"0")
        os.close(file)
    refusal = process.protect_from_oom()
    if refusal:
        report(f"launcher: {refusal}")
    # It keeps several descriptors of every container on the node.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    lock = _lock(state)
    _rehearse(state, keep=[ready, lock])
    loop = Loop()
    Launcher(state, loop)
    # Last, when all objects are there: forked children share the pages that are never written to again.
    gc.collect()
    if not immortal.immortalize():
        report("launcher: this Python has no immortal objects (3.12 has): a pod takes 1 MiB more")
    gc.freeze()
    gc.disable()
    return loop


def _rehearse(state: str, keep: Collection[int]) -> None:
    """Run the rehearsal; if it fails, supervisors only need more memory."""
    try:
        rehearsal.rehearse(f"{state}/pods/rehearsal")
    except Exception as error:  # noqa: BLE001 whatever it is, a pod will tell
        report(f"launcher: no rehearsal: {error}")
    # Objects go first, while their descriptors are still theirs to close.
    gc.collect()
    close_others(keep)


def _lock(state: str) -> int:
    """Lock the state directory, which can have one launcher; the lock ends with the process."""
    file = os.open(f"{state}/{LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AlreadyExists(f"{state}: has a launcher") from None
    return file
