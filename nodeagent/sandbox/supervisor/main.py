"""The supervisor of a pod: parent of everything in it, one thread, one loop that never waits for a child.

It lives in the pod's namespaces and in the node's mount namespace, and outlives the agent. Agents connect to
``<directory>/supervisor.sock``; the last one that did is told what happens. What a successor needs is in the pod's
directory and with the launcher.
"""

import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from nodeagent import files
from nodeagent.errors import FailedPrecondition, NodeAgentError, NotFound, Unavailable
from nodeagent.linux import processes, syscalls
from nodeagent.linux.sysctls import check as check_sysctls
from nodeagent.sandbox import exits, idmaps, paths, protocol
from nodeagent.sandbox.init import podinit
from nodeagent.sandbox.paths import SUPERVISOR_SOCKET
from nodeagent.sandbox.protocol import Message
from nodeagent.sandbox.runtime import peers, process
from nodeagent.sandbox.runtime.launcher_link import Deposit, LauncherLink
from nodeagent.sandbox.runtime.loop import Loop, guarded
from nodeagent.sandbox.runtime.peers import Listener, Peer, Request
from nodeagent.sandbox.spec import DEFAULT_SHM_BYTES, PodPlan, PodSettings
from nodeagent.sandbox.supervisor import creation, namespaces, podfile, succession, sysctls
from nodeagent.sandbox.supervisor.attaching import Attachments
from nodeagent.sandbox.supervisor.containers import Container
from nodeagent.sandbox.supervisor.dialing import Dialing
from nodeagent.sandbox.supervisor.execs import Execs
from nodeagent.sandbox.supervisor.groups import split_join_fds
from nodeagent.sandbox.supervisor.pod import Pod
from nodeagent.sandbox.supervisor.podfile import PodFacts

_LAUNCHER_SECONDS = 1.0  # for a launcher that is asked to close what it keeps

Kept = dict[str, dict[str, int]]


def main(plan: PodPlan, launcher: int) -> NoReturn:
    """Make the pod's namespaces and serve it, or leave nothing behind."""
    directory = plan["directory"]
    undo = partial(paths.unpin, directory)
    _run(plan["id"], directory, launcher, lambda: prepare(plan), {}, undo)


def prepare(plan: PodPlan) -> PodFacts:
    """Make the pod's own namespaces and files, and enter them. After a failure `paths.unpin` undoes it.

    Raises NotFound without the pod's directory, which the agent has made.
    """
    known: PodFacts = {"plan": plan, "init_pid": 0, "init_ticks": 0}
    if not os.path.isdir(plan["directory"]):
        # A launcher that stood still forks when it goes on, though the agent has given the pod up.
        raise NotFound(
            f'pod "{plan["id"]}": {plan["directory"]} is gone, so that nobody waits for it'
        )
    exits.make_directory(plan["directory"])
    # Before anything is made: without the file a successor takes it that nothing was.
    podfile.save(known)
    namespaces.make(plan)
    if "net" in plan["namespaces"]:
        sysctls.write(sysctls.DEFAULTS, groups=idmaps.groups_of(plan))
    return known


def succeed(pod_id: str, directory: str, launcher: int, kept: Kept) -> NoReturn:
    """Take a pod over from a supervisor that has died. kept: descriptors by container and name."""

    def find() -> PodFacts:
        known = podfile.load(pod_id, directory)
        namespaces.enter(directory, known["plan"]["namespaces"])
        return known

    _run(pod_id, directory, launcher, find, kept, lambda: None)


def _run(
    pod_id: str,
    directory: str,
    launcher: int,
    known: Callable[[], PodFacts],
    kept: Kept,
    undo: Callable[[], object],
) -> NoReturn:
    os.setsid()  # or a signal to the launcher's process group would reach the supervisors of all pods
    process.set_title(f"na-pod-{pod_id[:8]}", f"{process.SUPERVISOR}{pod_id}")
    loop = Loop()
    connection = LauncherLink(loop, pod_id, directory, socket.socket(fileno=launcher))
    try:
        Supervisor(known(), loop, connection, kept)
    except Exception as error:  # noqa: BLE001 whatever it is, the launcher tells who asked for the pod
        undo()
        connection.fail(error)
        os._exit(1)
    loop.run()
    os._exit(0)


class Supervisor:
    """Serves the pod's socket: one method for each operation."""

    def __init__(self, known: PodFacts, loop: Loop, launcher: LauncherLink, kept: Kept) -> None:
        self._known = known
        self.pod = Pod(known["plan"], loop, launcher)
        self.containers: dict[str, Container] = {}
        self.execs = Execs(self.pod, self.containers)
        self.attachments = Attachments()
        self._closing: list[Request] = []
        self._patience_ends = 0.0
        self._operations = {
            "namespaces": self._namespaces,
            "configure": self._configure,
            "create": self._create,
            "start": lambda request: self._container(request).start(request),
            "stop": self._stop,
            "remove": self._remove,
            "resize": self._resize,
            "reopen_log": self._reopen_log,
            "exec": lambda request: self.execs.begin(self._container(request), request),
            "exec_kill": self._exec_kill,
            "exec_resize": self._exec_resize,
            "attach": lambda request: self.attachments.attach(self._container(request), request),
            "end_input": self.attachments.end_input,
            "detach": self.attachments.detach,
            "dial": lambda request: Dialing(loop, request.body["port"], request).begin(),
            "state": self._state,
            "shutdown": self._shutdown,
        }
        succession.restore(self.pod, self.containers, kept)
        self._find_init()
        self._listener = Listener(loop, f"{self.pod.directory}/{SUPERVISOR_SOCKET}", self._accept)
        launcher.serve(self._deposits)

    # --- agents ---

    def _accept(self, connection: socket.socket) -> None:
        previous = self.pod.agent
        self.pod.agent = Peer(self.pod.loop, connection, self._received, self._agent_gone)
        if previous is not None:
            previous.close()

    def _received(self, peer: Peer, message: Message) -> None:
        peers.perform(f'supervisor of pod "{self.pod.id}"', self._operations, peer, message)

    def _agent_gone(self, peer: Peer) -> None:
        if self.pod.agent is peer:
            self.pod.agent = None
        self.execs.left_by(peer)
        self.attachments.left_by(peer)

    # --- the pod ---

    def _namespaces(self, request: Request) -> None:
        # The socket stays in the network namespace in which it was made, whoever uses it (network_namespaces(7)).
        netns = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as route:
            request.reply({"fds": ["net", "route"]}, [netns, route.fileno()])
        os.close(netns)

    def _configure(self, request: Request) -> None:
        settings = protocol.checked(PodSettings, request.body["settings"])
        owned = self.pod.namespaces
        check_sysctls(settings["sysctls"], owned)
        if settings["hostname"] is not None:
            if "uts" not in owned:
                raise FailedPrecondition(f'pod "{self.pod.id}": its host name is the node\'s')
            syscalls.sethostname(settings["hostname"])
        if settings["shm_bytes"] not in (None, DEFAULT_SHM_BYTES) and "ipc" in owned:
            namespaces.resize_shm(self.pod.directory, int(settings["shm_bytes"] or 0))
        sysctls.write(settings["sysctls"], owner=self.pod.root, groups=self.pod.groups)
        if settings["pid"] == "pod" and self.pod.init_pidfd is None:
            self._start_init(request)
        else:
            request.reply()

    def _start_init(self, request: Request) -> None:
        """Start the process that owns the PID namespace which the containers share. Reply when they may use it."""
        directory = f"{self.pod.directory}/ns"
        files.ensure_directory(directory, 0o700)
        join = request.take_all("join")
        cgroup, tasks = split_join_fds(join)
        try:
            child, ours = self.pod.children.spawn_connected(
                lambda status: podinit.main(status, tasks, directory),
                self._init_ended,
                keep=tasks,
                flags=syscalls.CLONE_NEWPID,
                cgroup=cgroup,
            )
        finally:
            protocol.close_all(join)
        self._known["init_pid"] = child.pid
        self._known["init_ticks"] = processes.start_ticks(child.pid)
        self.pod.init_pidfd = child.pidfd
        podfile.save(self._known)
        self.pod.loop.watch(ours.fileno(), lambda _events: self._init_reports(ours, request))

    def _init_reports(self, status: socket.socket, request: Request) -> None:
        """Pin the procfs that it reports, which containers get that are prepared outside of the namespace."""
        self.pod.loop.forget(status.fileno())
        with status:
            message = protocol.receive(status)
        try:
            if message is None or len(message.fds) != 1:
                raise Unavailable(f'pod "{self.pod.id}": its init has ended')
            namespaces.pin_procfs(self.pod.directory, message.fds[0])
            self._await_confined_init(request)
        except (NodeAgentError, OSError) as error:
            request.fail(error)
        finally:
            protocol.close_all(message.fds if message else ())

    def _await_confined_init(self, request: Request) -> None:
        """Reply once its filter is in force, which it installs last, after its report."""
        if self.pod.init_pidfd is None:
            request.fail(Unavailable(f'pod "{self.pod.id}": its init has ended'))
        elif processes.is_filtered(self._known["init_pid"]):
            request.reply()
        else:
            self.pod.loop.call_after(1, lambda: self._await_confined_init(request))

    def _find_init(self) -> None:
        """Find the init that an earlier supervisor has started."""
        if self._known["init_pid"]:
            pid, ticks = self._known["init_pid"], self._known["init_ticks"]
            self.pod.init_pidfd = processes.open_pidfd(pid, ticks)
        if self.pod.init_pidfd is not None:
            self.pod.loop.watch(self.pod.init_pidfd, self._init_ended)

    def _init_ended(self, _code_or_events: int) -> None:
        """Report the end of the init; the kernel has killed all that shared its namespace (pid_namespaces(7))."""
        if self.pod.init_pidfd is not None:
            self.pod.loop.forget(self.pod.init_pidfd)
            os.close(self.pod.init_pidfd)
            self.pod.init_pidfd = None
            if not self._closing:
                self.pod.tell({"event": "init_exit"})

    def _deposits(self) -> dict[str, Deposit]:
        return {
            name: container.deposit()
            for name, container in self.containers.items()
            if container.facts["created_at"] and container.exit is None
        }

    # --- containers ---

    def _container(self, request: Request) -> Container:
        name = request.body["container"]
        container = self.containers.get(name)
        if container is None:
            raise NotFound(f'container "{name}": not in pod "{self.pod.id}"')
        return container

    def _create(self, request: Request) -> None:
        if self._closing:
            raise FailedPrecondition(f'pod "{self.pod.id}": is being shut down')
        creation.create(self.pod, self.containers, request)

    def _stop(self, request: Request) -> None:
        self._container(request).stop(request.body["signal"], request.body["timeout_ms"])
        request.reply()

    def _remove(self, request: Request) -> None:
        container = self.containers.get(request.body["container"])
        if container is None:
            request.reply()
        else:
            container.remove(request)

    def _resize(self, request: Request) -> None:
        self._container(request).resize(request.body["width"], request.body["height"])
        request.reply()

    def _reopen_log(self, request: Request) -> None:
        self._container(request).reopen_log()
        request.reply()

    def _exec_kill(self, request: Request) -> None:
        self.execs.get(request).kill()
        request.reply()

    def _exec_resize(self, request: Request) -> None:
        self.execs.get(request).resize(request.body["width"], request.body["height"])
        request.reply()

    def _state(self, request: Request) -> None:
        request.reply(
            {
                "pid": os.getpid(),
                "init_ended": bool(self._known["init_pid"]) and self.pod.init_pidfd is None,
                "containers": [
                    c.describe() for c in self.containers.values() if c.facts["created_at"]
                ],
                "execs": [
                    {"container": e.container.id, "pid": e.pid, "argv": e.plan["argv"]}
                    for e in self.execs.running()
                ],
            }
        )

    # --- the end ---

    def _shutdown(self, request: Request) -> None:
        """Reply when everything that ran in the pod has been reaped."""
        self._closing.append(request)
        self._patience_ends = time.monotonic() + _LAUNCHER_SECONDS
        self._kill_all()
        self._end_if_empty(1)

    def _kill_all(self) -> None:
        """Kill everything; what cannot be killed now, which is reported, protects nothing else."""
        for exec_ in self.execs.running():
            guarded(exec_.kill)
        for container in self.containers.values():
            guarded(container.kill)
        if self.pod.init_pidfd is not None:
            try:
                signal.pidfd_send_signal(self.pod.init_pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def _end_if_empty(self, patience_ms: int) -> None:
        alive = [c for c in self.containers.values() if c.exit is None or c.hooks.are_running]
        busy = self.execs.running() or self.pod.init_pidfd is not None
        closing = self.pod.launcher.is_closing and time.monotonic() < self._patience_ends
        # Unpinned before the launcher is told: until then a successor would finish what is left.
        if alive or busy or closing or not paths.unpin(self.pod.directory):
            patience_ms = min(2 * patience_ms, 100)
            self.pod.loop.call_after(patience_ms, lambda: self._end_if_empty(patience_ms))
            return
        for container in self.containers.values():
            if container.pump is not None:
                guarded(container.pump.write_left)
        self.pod.launcher.done()
        for request in self._closing:
            request.reply()
        self.pod.loop.stop()
