"""What runs between clone3(2) and execve(2), in the child that becomes a container's process.

`run` makes a container's first process: born in new mount and PID namespaces, it builds the root file system, enters
it, and becomes who it shall be. `run_exec` makes a further process of a running container. Both report over the
status socket: ``{"ready": {"identity": …, "warnings": […]}}``, with the master end of a terminal attached, then wait
for one byte, "go", and execute the program; the socket closes itself when that succeeds.
``{"error": class, "text": …}`` reports the failure of any step.
After the node's file system is left, nothing is imported any more.
"""

import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

from nodeagent.errors import FailedPrecondition
from nodeagent.linux import confined, mounts, syscalls
from nodeagent.sandbox import assembly, console, credentials, idmaps, program, protocol, users
from nodeagent.sandbox.idmaps import IdMaps
from nodeagent.sandbox.spec import ContainerPlan, ExecPlan, Identity, ProcessPlan

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_FIRST_OTHER = 3  # the descriptor after standard error
_MAX_TEXT = 4096

# Those that a process may have been started with as ignored, or that Python or a supervisor handles.
_SIGNALS = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGPIPE,
    signal.SIGALRM,
    signal.SIGTERM,
    signal.SIGCHLD,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGXFSZ,
    signal.SIGWINCH,
)
_KEPT: list[object] = []


class InitFds(NamedTuple):
    """What a container's first process takes over.

    status: a SOCK_SEQPACKET socket. stdin, stdout, stderr: -1 for the container's /dev/null; not looked at with a tty.
    cgroups: of cgroup v1, each hierarchy's `tasks` file, open for writing; on v2 the process is born in its cgroup.
    userns: the user namespace of the pod, where it has one.
    """

    status: int
    stdin: int = -1
    stdout: int = -1
    stderr: int = -1
    cgroups: Sequence[int] = ()
    userns: int = -1


class ExecFds(NamedTuple):
    """As `InitFds`; target: a pidfd of a process of the container, whose mount and cgroup namespaces are joined.

    hidden: the process is born in the supervisor's PID namespace. Only when all is ready and it is told to go, a
    successor appears in the container's, a sibling of it: so nobody there, with CAP_SYS_PTRACE even, ever sees a
    process that has more rights than the program. The successor is announced as ``{"successor": pid}`` with its pidfd
    and a status socket of its own, where it waits for another "go".
    """

    status: int
    target: int
    stdin: int = -1
    stdout: int = -1
    stderr: int = -1
    cgroups: Sequence[int] = ()
    userns: int = -1
    hidden: bool = False


class _Start(NamedTuple):
    """All that the last steps need, inside the container's root.

    owned: kinds of namespaces that are still to be left for ones that belong to the pod's user namespace.
    by_successor: the program is executed by a process that is born into the container's PID namespace.
    """

    argv: list[str]
    settings: ProcessPlan
    identity: Identity
    cwd: int
    stdio: console.Stdio
    maps: IdMaps
    owned: int
    warnings: list[str]
    by_successor: bool = False


def run(plan: ContainerPlan, fds: InitFds) -> NoReturn:
    """Become the first process of a container. Never returns and never raises."""
    _start(fds.status, lambda: _prepare_container(plan, fds))


def run_exec(plan: ExecPlan, settings: ProcessPlan, fds: ExecFds) -> NoReturn:
    """Become a further process of a container. Never returns and never raises."""
    _start(fds.status, lambda: _prepare_exec(plan, settings, fds))


def _start(status: int, prepare: Callable[[], _Start]) -> NoReturn:
    try:
        _leave_supervisor()
        _finish(status, prepare())
    except BaseException as error:  # noqa: BLE001 - the supervisor shall know whatever it is
        _report_failure(status, error)
    finally:
        os._exit(1)


def _leave_supervisor() -> None:
    """Shed what was inherited: signal handlers, ways to import, and being readable to others."""
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _forbid_imports()
    gc.disable()
    os.umask(0)


def _forbid_imports() -> None:
    """What is replaced is kept: to free it would touch, and so copy, hundreds of pages."""
    _KEPT.extend((sys.path, sys.meta_path, sys.path_hooks, sys.path_importer_cache))
    sys.path, sys.meta_path, sys.path_hooks, sys.path_importer_cache = [], [], [], {}


def _prepare_container(plan: ContainerPlan, fds: InitFds) -> _Start:
    settings = plan["process"]
    maps = idmaps.of_process(settings, fds.userns)
    _join_cgroups(fds.cgroups)
    own = confined.own_descriptors()
    credentials.write_labels(settings)
    warnings = credentials.set_oom_score(settings)
    if plan["cgroup_namespace"]:
        syscalls.unshare(syscalls.CLONE_NEWCGROUP)
    built = assembly.assemble(plan, maps)
    identity = users.resolve(built.root, own, settings["user"])
    with _working_directory(settings["cwd"]):
        cwd = confined.make_path(built.root, settings["cwd"], directory=True)
    stdio = _container_stdio(plan, fds, built, own)
    assembly.seal(built, plan["masked_paths"], plan["readonly_paths"])
    mounts.enter_root(built.root)
    owned = syscalls.CLONE_NEWNS | (syscalls.CLONE_NEWCGROUP if plan["cgroup_namespace"] else 0)
    return _Start(plan["argv"], settings, identity, cwd, stdio, maps, owned, warnings)


def _container_stdio(
    plan: ContainerPlan, fds: InitFds, built: assembly.Assembly, own: int
) -> console.Stdio:
    if not plan["tty"]:
        return console.with_null(built.root, own, fds.stdin, fds.stdout, fds.stderr)
    terminal = console.open_terminal(built.root, own)
    if built.dev != -1:
        console.bind_console(built.dev, terminal)
    return terminal


def _prepare_exec(plan: ExecPlan, settings: ProcessPlan, fds: ExecFds) -> _Start:
    maps = idmaps.of_process(settings, fds.userns)
    _join_cgroups(fds.cgroups)
    own = confined.own_descriptors()
    credentials.write_labels(settings)
    warnings = credentials.set_oom_score(settings)
    pid_namespace = syscalls.CLONE_NEWPID if fds.hidden else 0  # of children (pid_namespaces(7))
    try:
        syscalls.setns(fds.target, syscalls.CLONE_NEWNS | syscalls.CLONE_NEWCGROUP | pid_namespace)
    except ProcessLookupError:
        raise FailedPrecondition(f'container "{plan["container"]}": has just ended') from None
    root = os.open("/", _DIRECTORY)
    identity = users.resolve(root, own, settings["user"])
    with _working_directory(settings["cwd"]):
        cwd = confined.open_path(root, settings["cwd"], _DIRECTORY)
    given = (fds.stdin, fds.stdout, fds.stderr)
    stdio = (
        console.open_terminal(root, own) if plan["tty"] else console.with_null(root, own, *given)
    )
    return _Start(plan["argv"], settings, identity, cwd, stdio, maps, 0, warnings, fds.hidden)


def _join_cgroups(tasks: Sequence[int]) -> None:
    """`tasks` moves a process of one thread without the grace period that writers of `cgroup.procs` wait for."""
    for file in tasks:
        os.write(file, b"0")


def _finish(status: int, start: _Start) -> NoReturn:
    """The steps inside the container's root, until its program runs."""
    settings, identity, warnings = start.settings, start.identity, start.warnings
    with _working_directory(settings["cwd"]):
        os.fchdir(start.cwd)
        os.getcwd()  # fails where it cannot be reached from the root
    console.install(start.stdio, start.maps.uid(identity["uid"]))
    warnings += credentials.set_limits(settings["rlimits"])
    if not start.maps.is_node:
        credentials.enter_user_namespace(start.maps.userns, start.owned)
    credentials.join_new_keyring()
    warnings += credentials.become(settings, identity)
    os.umask(settings["umask"])
    master = [start.stdio.master] if start.stdio.is_terminal else []
    _send(status, {"ready": {"identity": identity, "warnings": warnings}}, *master)
    _keep_only(status)
    _wait_for_go(status)
    if start.by_successor:
        _continue_in_successor(status)
    console.lead_session(start.stdio.is_terminal)
    program.execute(start.argv, settings, identity["home"])


@contextmanager
def _working_directory(path: str) -> Iterator[None]:
    """Whatever is wrong with it is the doing of the container, or of who asks for it."""
    try:
        yield
    except OSError as error:
        text = os.strerror(error.errno or 0)
        raise FailedPrecondition(f'working directory "{path}": {text}') from error


def _keep_only(status: int) -> None:
    """Close all descriptors but the standard three and the status socket."""
    os.set_inheritable(status, False)
    if status > _FIRST_OTHER:
        syscalls.close_range(_FIRST_OTHER, status - 1)
    syscalls.close_range(status + 1)


def _wait_for_go(status: int) -> None:
    """Where the supervisor ends instead, the container never begins."""
    if not os.read(status, 1):
        os._exit(1)


def _continue_in_successor(status: int) -> None:
    """Returns in the successor only, whose `status` is its own; CLONE_PARENT makes it a child of the supervisor.

    Nobody else has that socket open when the supervisor hears of it, so that its end is that of the successor.
    """
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid, pidfd = syscalls.clone3(syscalls.CLONE_PARENT, exit_signal=0)
    if pid:
        ours.close()
        _send(status, {"successor": pid}, pidfd, theirs.fileno())
        os._exit(0)
    os.dup2(ours.fileno(), status, inheritable=False)
    ours.close()
    theirs.close()
    _wait_for_go(status)


def _report_failure(status: int, error: BaseException) -> None:
    kind = "OSError" if isinstance(error, OSError) else type(error).__name__
    _send(status, {"error": kind, "text": _text(error)[:_MAX_TEXT]})


def _text(error: BaseException) -> str:
    if not isinstance(error, OSError):
        return str(error)
    named = f': "{error.filename}"' if isinstance(error.filename, str) else ""
    return f"{error.strerror or error}{named}"


def _send(status: int, message: protocol.Body, *descriptors: int) -> None:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=status)
    protocol.send(channel, protocol.encode(message), descriptors)
    channel.detach()
