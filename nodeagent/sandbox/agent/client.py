"""The launcher and the supervisors, as the agent uses them."""

import asyncio
import errno
import itertools
import logging
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from nodeagent.errors import (
    AlreadyExists,
    IncompatibleVersion,
    NodeAgentError,
    Unavailable,
    Unsupported,
)
from nodeagent.sandbox import paths, protocol
from nodeagent.sandbox.agent.channel import Absence, Channel, Reply
from nodeagent.sandbox.agent.connector import SOCKETS, Connector, ignore_end, ignore_event
from nodeagent.sandbox.agent.handles import (
    AttachIO,
    CgroupFds,
    ContainerState,
    Created,
    ExecExit,
    ExecHandle,
    ExecIO,
    Namespaces,
)
from nodeagent.sandbox.paths import LAUNCHER_SOCKET, SUPERVISOR_SOCKET
from nodeagent.sandbox.protocol import Body
from nodeagent.sandbox.spec import ContainerPlan, ExecPlan, Exit, PodPlan, PodSettings
from nodeagent.tasks import Tasks

log = logging.getLogger(__name__)

__all__ = [
    "AttachIO",
    "CgroupFds",
    "ContainerState",
    "Created",
    "ExecExit",
    "ExecHandle",
    "ExecIO",
    "Launcher",
    "Namespaces",
    "Supervisor",
]

Size = tuple[int, int]

# A process that dies closes its connections some time before its pidfd becomes readable.
_DEATH_SECONDS = 5.0
# The same where it only decides what is said of it.
_MOMENT_SECONDS = 0.5

# Errors of connect(2), and of the first message, where no process listens at the socket; others are of this process, or
# pass.
NOBODY_LISTENS = frozenset(
    (
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.ENOTCONN,
        errno.EPIPE,
    )
)

# The time within which a process that others have started begins to serve, if it does.
_POLLS, _POLL_SECONDS = 20, 0.1


class Supervisor:
    """A pod's supervisor. `lost` is set when it has died. on_exit: told the end of every container, from now on.

    on_init_exit: told the end of the process that holds a shared PID namespace, and so of all that was in it.
    """

    def __init__(self, pod_id: str, directory: Path, connector: Connector) -> None:
        self.pod_id = pod_id
        self._connector = connector
        self.on_exit: Callable[[str, Exit], None] = lambda _container, _exit: None
        self.on_init_exit: Callable[[], None] = lambda: None
        self._directory = directory
        self._is_shut_down = False
        self._channel: Channel
        self._numbers = itertools.count(1)
        self._execs: dict[int, asyncio.Future[ExecExit | None]] = {}
        self._attached: dict[int, AttachIO] = {}

    @classmethod
    async def connect(
        cls, directory: Path, pod_id: str, connector: Connector = SOCKETS
    ) -> "Supervisor":
        """Connect to a pod's supervisor. Raises OSError where there is none."""
        self = cls(pod_id, directory, connector)
        self._channel = await self._connect()
        return self

    async def _connect(self) -> Channel:
        path = str(self._directory / SUPERVISOR_SOCKET)
        name = f'supervisor of pod "{self.pod_id}"'
        return await self._connector.connect(path, name, self._event, self._end)

    @classmethod
    def refused(
        cls,
        directory: Path,
        pod_id: str,
        error: IncompatibleVersion,
        connector: Connector = SOCKETS,
    ) -> "Supervisor":
        """Stand for one that cannot be had, as it would not understand the pod: all but `shutdown` raises `error`."""
        self = cls(pod_id, directory, connector)
        self._channel = Absence(IncompatibleVersion(f'pod "{pod_id}": has no supervisor: {error}'))
        return self

    @classmethod
    def unreached(
        cls, directory: Path, pod_id: str, why: str, connector: Connector = SOCKETS
    ) -> "Supervisor":
        """Stand for one that is not reached yet: all but `shutdown` raises Unavailable."""
        self = cls(pod_id, directory, connector)
        self._channel = Absence(
            Unavailable(f'pod "{pod_id}": its supervisor is not reached yet: {why}')
        )
        return self

    def require(self) -> None:
        """Raise the error that each request would raise, where this stands for a supervisor that cannot be had."""
        if isinstance(self._channel, Absence):
            raise self._channel.error

    async def agree(self) -> None:
        """Return when it is known that the supervisor understands us. Raises IncompatibleVersion where it does not."""
        await self._channel.agree()

    @property
    def pid(self) -> int:
        return self._channel.pid

    @property
    def lost(self) -> asyncio.Event:
        return self._channel.lost

    @property
    def is_lost(self) -> bool:
        return self._channel.lost.is_set()

    @property
    def ended(self) -> asyncio.Event:
        """Set when the connection has ended; the supervisor may live."""
        return self._channel.ended

    @property
    def silent(self) -> str:
        """Why the supervisor does not answer; "" while it does."""
        return self._channel.silent

    async def has_died(self) -> bool:
        """Whether a supervisor whose connection has ended is dead; news of a death may come a moment later."""
        return await self._dies_within(_MOMENT_SECONDS)

    async def _dies_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self.lost.wait()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Disconnect. The supervisor goes on; none of its events arrives any more."""
        self._channel.forget()

    # --- the pod ---

    async def namespaces(self) -> Namespaces:
        reply = await self._channel.request("namespaces")
        return Namespaces(net=reply.fds["net"], route=socket.socket(fileno=reply.fds["route"]))

    async def configure(self, settings: PodSettings, init: CgroupFds | None = None) -> None:
        """Make a warm slot the pod of these settings.

        Raises InvalidArgument, or Unsupported, for a sysctl that cannot be set.
        init: the cgroup of the process that holds a shared PID namespace.
        """
        await self._channel.request("configure", init.named() if init else (), settings=settings)

    async def dial(self, port: int) -> socket.socket:
        """A connection to 127.0.0.1, or else ::1, inside the pod; not blocking. Raises Unavailable."""
        reply = await self._channel.request("dial", port=port)
        connection = socket.socket(fileno=reply.fds["connection"])
        connection.setblocking(False)
        return connection

    async def state(self) -> list[ContainerState]:
        """The state of every container that was created and is not removed."""
        reply = await self._channel.request("state")
        if reply.result.get("init_ended"):
            self.on_init_exit()
        return [ContainerState.read(body) for body in reply.result["containers"]]

    async def shutdown(self) -> None:
        """Kill all that runs in the pod, wait for its end, remove the pins, and end the supervisor. Idempotent.

        For a supervisor that has died without a successor, one is started to do this. One that cannot be asked is
        killed: whoever ends its pod kills what runs in it. Raises TimeoutError where something does not end.
        """
        if self._is_shut_down:
            return
        try:
            await self._ask_to_shut_down()
        except Unavailable:
            if self._channel.pid and await self._dies_within(_DEATH_SECONDS):
                await self._shut_down_by_successor()
            else:
                await self._shut_down_anew()
        self._is_shut_down = True
        self.close()

    async def _ask_to_shut_down(self) -> None:
        """Raises Unavailable where nobody has heard it."""
        try:
            await self._channel.request("shutdown")
            if not await self._dies_within(_DEATH_SECONDS):
                await self._channel.kill()
        except IncompatibleVersion:
            await self._end_unasked()
        except TimeoutError as error:
            if not self.silent:
                raise  # it waits for what SIGKILL has not ended yet
            log.error("%s; it is killed, as its pod ends", error)
            await self._end_unasked()

    async def _shut_down_anew(self) -> None:
        """Shut down by another connection, once; where nobody listens, by a successor."""
        try:
            channel = await self._connect()
        except OSError as error:
            if error.errno not in NOBODY_LISTENS:
                raise
            await self._shut_down_by_successor()
            return
        self._channel.forget()
        self._channel = channel
        try:
            await self._ask_to_shut_down()
        except Unavailable as error:
            log.error("%s; it is killed, as its pod ends", error)
            await self._end_unasked()

    async def _shut_down_by_successor(self) -> None:
        if not self._directory.exists():
            return
        try:
            successor = await self._successor()
        except Unavailable:
            raise  # a launcher may be there at the next attempt
        except (NodeAgentError, OSError) as error:
            log.error(
                'pod "%s": ends without a supervisor, there is no successor of its own: %s',
                self.pod_id,
                error,
            )
            await self._end_unasked()
        else:
            await successor.shutdown()

    async def _end_unasked(self) -> None:
        launcher = await self._launcher()
        try:
            await launcher.abandon(self.pod_id)
        finally:
            launcher.close()
        await self._channel.kill()
        paths.unpin(str(self._directory))

    async def _launcher(self) -> "Launcher":
        try:
            return await Launcher.connect(self._directory.parents[1], self._connector)
        except OSError as error:
            raise Unavailable(f'pod "{self.pod_id}": there is no launcher: {error}') from None

    async def _successor(self) -> "Supervisor":
        launcher = await self._launcher()
        try:
            return await launcher.successor(self.pod_id, self._directory)
        except AlreadyExists:
            return await self._connect_to_other()
        finally:
            launcher.close()

    async def _connect_to_other(self) -> "Supervisor":
        """Connect to a successor that somebody else has asked for, and that may not listen yet."""
        for _ in range(_POLLS):
            try:
                return await Supervisor.connect(self._directory, self.pod_id, self._connector)
            except OSError as error:
                if error.errno not in NOBODY_LISTENS:
                    raise
            await asyncio.sleep(_POLL_SECONDS)
        return await Supervisor.connect(self._directory, self.pod_id, self._connector)

    # --- containers ---

    async def create(self, plan: ContainerPlan, cgroup: CgroupFds) -> Created:
        """Prepare a container up to its program. Nothing is left of one whose creation fails.

        A creation whose caller is cancelled goes on: `remove` undoes it, whatever it has come to.
        """
        reply = await self._channel.request("create", cgroup.named(), plan=plan)
        state = ContainerState.read(reply.result)
        return Created(pid=state.pid, identity=state.identity, warnings=state.warnings)

    async def start(self, container: str) -> int:
        """Execute the program; returns when it was let go, in ns since the epoch.

        Raises StartError, with the container EXITED and code 128, when it cannot be executed.
        """
        reply = await self._channel.request("start", container=container)
        at: int = reply.result["at"]
        return at

    async def stop(self, container: str, signal: int, timeout_ms: int) -> None:
        """Signal the container, the first time; kill it at the earliest deadline that was ever asked for.

        Returns at once. The deadline is kept by the supervisor, whatever happens to us. timeout_ms 0 kills now.
        """
        await self._channel.request(
            "stop", container=container, signal=signal, timeout_ms=timeout_ms
        )

    async def remove(self, container: str) -> None:
        """Kill the container if it is not EXITED, and forget it. Idempotent."""
        await self._channel.request("remove", container=container)

    async def resize(self, container: str, width: int, height: int) -> None:
        await self._channel.request("resize", container=container, width=width, height=height)

    async def reopen_log(self, container: str) -> None:
        """Have the log written to a new file; afterwards no byte goes to the old one."""
        await self._channel.request("reopen_log", container=container)

    # --- streams ---

    async def exec(
        self, plan: ExecPlan, streams: ExecIO, cgroup: CgroupFds, size: Size | None = None
    ) -> ExecHandle:
        """Start a command; returns when the program is executed, raises StartError when it cannot be.

        size: of the terminal, width and height, before the program sees it. One whose caller is cancelled is killed.
        """
        number = next(self._numbers)
        end: asyncio.Future[ExecExit | None] = asyncio.get_running_loop().create_future()
        self._execs[number] = end
        fds = [
            *cgroup.named(),
            ("stdin", streams.stdin),
            ("stdout", streams.stdout),
            ("stderr", streams.stderr),
        ]
        try:
            reply = await self._channel.request(
                "exec", fds, exec=number, container=plan["container"], plan=plan, size=size
            )
        except asyncio.CancelledError:
            self._execs.pop(number, None)
            self._channel.post("exec_kill", exec=number)
            raise
        except BaseException:
            self._execs.pop(number, None)
            raise
        if reply.fds:
            # A supervisor of an earlier version sends the terminal itself, which the agent must not have open.
            protocol.close_all(reply.fds.values())
            self._execs.pop(number, None)
            self._channel.post("exec_kill", exec=number)
            raise Unsupported(
                f'container "{plan["container"]}": a command with a terminal needs a supervisor of this version, and '
                "its pod has an earlier one; recreate the pod, or run the command without a terminal"
            )
        return ExecHandle(self._channel, number, reply, end)

    async def attach(self, container: str) -> AttachIO:
        """Attach to the output from now on, and to the input. A client that is too slow, by a MiB, is detached."""
        number = next(self._numbers)
        try:
            reply = await self._channel.request("attach", container=container, attach=number)
        except asyncio.CancelledError:
            self._channel.post("detach", attach=number)
            raise

        def end_input() -> None:
            if number in self._attached:
                self._channel.post("end_input", attach=number)

        def detach() -> None:
            if self._attached.pop(number, None) is not None:
                self._channel.post("detach", attach=number)

        fds = reply.fds
        stdin, stdout, stderr = (fds.get(name) for name in ("stdin", "stdout", "stderr"))
        attached = AttachIO(stdin, stdout, stderr, end_input, detach)
        self._attached[number] = attached
        return attached

    # --- what comes unasked ---

    def _event(self, event: Body) -> None:
        if event["event"] == "exit":
            self.on_exit(event["container"], event["exit"])
        elif event["event"] == "init_exit":
            self.on_init_exit()
        elif event["event"] == "exec_exit":
            end = self._execs.pop(event["exec"], None)
            if end is not None and not end.done():
                end.set_result(ExecExit(code=event["code"], timed_out=event["timed_out"]))
        elif event["event"] == "detached":
            attached = self._attached.pop(event["attach"], None)
            if attached is not None:
                attached.cut_off.set()

    def _end(self) -> None:
        for end in self._execs.values():
            if not end.done():
                end.set_result(None)
        self._execs.clear()
        self._attached.clear()


class Launcher:
    """Forks supervisors. `lost` is set when it has died; supervisors live on, and go to the next one."""

    def __init__(self, channel: Channel, connector: Connector) -> None:
        self._channel = channel
        self._connector = connector
        self._unsettled: set[str] = set()  # pods of which something may be left

    @classmethod
    async def connect(cls, state: Path, connector: Connector = SOCKETS) -> "Launcher":
        """Connect to the launcher that runs. Raises OSError where there is none."""
        path = str(state / LAUNCHER_SOCKET)
        return cls(await connector.connect(path, "launcher", ignore_event, ignore_end), connector)

    @classmethod
    async def connect_or_start(
        cls,
        state: Path,
        python: str = sys.executable,
        join_fds: Sequence[int] = (),
        connector: Connector = SOCKETS,
    ) -> "Launcher":
        """Connect, or start a launcher. One that does not answer, or speaks no version of ours, is replaced.

        Raises Unavailable where it ends the connection, and lives.
        join_fds: files of the cgroup that a new launcher moves to, opened for writing.
        """
        if launcher := await cls._connect_to_usable(state, connector):
            return launcher
        try:
            await connector.start_launcher(str(state), python, join_fds)
        except AlreadyExists:
            return await cls._connect_to_another(state, connector)
        return await cls.connect(state, connector)

    @classmethod
    async def _connect_to_usable(cls, state: Path, connector: Connector) -> "Launcher | None":
        """Connect to the one that runs; None where there is none that can be used."""
        try:
            launcher = await cls.connect(state, connector)
        except OSError:
            return None
        return None if await launcher.end_if_unusable() else launcher

    @classmethod
    async def _connect_to_another(cls, state: Path, connector: Connector) -> "Launcher":
        """Connect to a launcher that another agent has just started, and that may not listen yet."""
        for _ in range(_POLLS):
            if launcher := await cls._connect_to_usable(state, connector):
                return launcher
            await asyncio.sleep(_POLL_SECONDS)
        return await cls.connect(state, connector)

    @property
    def pid(self) -> int:
        return self._channel.pid

    @property
    def lost(self) -> asyncio.Event:
        return self._channel.lost

    @property
    def ended(self) -> asyncio.Event:
        """Set when the connection has ended; the launcher may live."""
        return self._channel.ended

    async def has_died(self) -> bool:
        """Whether a launcher whose connection has ended is dead; news of a death may come a moment later."""
        try:
            async with asyncio.timeout(_MOMENT_SECONDS):
                await self.lost.wait()
        except TimeoutError:
            return False
        return True

    async def _request(self, operation: str, **members: object) -> Reply:
        """Make a request. One that does not answer is disconnected: who connects again replaces it."""
        try:
            return await self._channel.request(operation, (), **members)
        except TimeoutError:
            if self._channel.silent:
                self._channel.close()
            raise

    async def end_if_unusable(self) -> bool:
        """Kill it, and return True, if it speaks no version of the protocol that we do, or does not answer.

        The socket of one that is dying may take a connection, which then ends: True as well, once it is dead. Raises
        TimeoutError where one that was killed does not die, and Unavailable where one lives that ends the connection.
        """
        try:
            await self._channel.agree()
        except (IncompatibleVersion, TimeoutError) as error:
            log.warning("%s; it is replaced, which pods do not notice", error)
            await self._channel.kill()
            self.close()
            return True
        if not self.ended.is_set():
            return False
        is_dead = await self.has_died()
        self.close()
        if not is_dead:
            raise self._channel.unavailable()
        return True

    def close(self) -> None:
        """Disconnect; the launcher goes on."""
        self._channel.forget()

    async def fork(self, plan: PodPlan) -> Supervisor:
        """A new supervisor, with the namespaces of the plan.

        Nothing is left of one that fails, or whose caller is cancelled, unless that fails as well: see `undo_fork`.
        """
        self._unsettled.add(plan["id"])
        async with Tasks() as tasks:
            forking = tasks.start("fork", self._fork(plan))
            try:
                forked = await asyncio.shield(forking)
            except asyncio.CancelledError:
                with suppress(NodeAgentError, OSError):
                    forked = await forking
                    await forked.shutdown()
                    self._unsettled.discard(plan["id"])
                raise
        self._unsettled.discard(plan["id"])
        return forked

    async def _fork(self, plan: PodPlan) -> Supervisor:
        pod_id, directory = plan["id"], Path(plan["directory"])
        try:
            await self._request("fork", plan=plan)
            return await Supervisor.connect(directory, pod_id, self._connector)
        except AlreadyExists:
            self._unsettled.discard(pod_id)
            raise
        except (NodeAgentError, OSError):
            with suppress(NodeAgentError, OSError):
                await self.undo_fork(pod_id, directory)
            raise

    async def undo_fork(self, pod_id: str, directory: Path) -> None:
        """Leave nothing of a supervisor that died while it made its pod, or that could not be reached. Idempotent."""
        if pod_id not in self._unsettled:
            return
        if self._channel.is_open:
            await self.abandon(pod_id)
        else:
            await self._end_orphan(pod_id, directory)
        paths.unpin(str(directory))
        self._unsettled.discard(pod_id)

    async def _end_orphan(self, pod_id: str, directory: Path) -> None:
        """Shut down a supervisor that a launcher may have forked before it died."""
        trouble: OSError | None = None
        for _ in range(_POLLS):
            try:
                supervisor = await Supervisor.connect(directory, pod_id, self._connector)
            except OSError as error:
                trouble = error
                await asyncio.sleep(_POLL_SECONDS)
            else:
                await supervisor.shutdown()
                return
        if trouble is not None and trouble.errno not in NOBODY_LISTENS:
            raise trouble  # it may live

    async def successor(self, pod_id: str, directory: Path) -> Supervisor:
        """Another supervisor for a pod whose own has died; raises AlreadyExists where it has not."""
        await self._request("successor", pod=pod_id, directory=str(directory))
        return await Supervisor.connect(directory, pod_id, self._connector)

    async def pods(self) -> list[str]:
        """The pods that have a supervisor, or had one that left containers behind."""
        reply = await self._request("list")
        pods: list[str] = reply.result["pods"]
        return pods

    async def abandon(self, pod_id: str) -> None:
        """Kill the pod's supervisor, if it has one, and keep nothing for a successor. Idempotent."""
        await self._request("abandon", pod=pod_id)

    async def stop(self) -> None:
        """End the launcher. Raises FailedPrecondition while pods are left."""
        await self._request("stop")
        if not await self.has_died():
            await self._channel.kill()
        self.close()
