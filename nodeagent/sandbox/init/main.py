"""The code between clone3(2) and execve(2), in the child that becomes a container's process.

`run` makes a container's first process: born in new mount and PID namespaces, it builds the root file system, enters
it, and takes on its identity. `run_exec` makes a further process of a running container. Both report over the
status socket: ``{"ready": {"identity": …, "warnings": […]}}``, with the master end of a terminal attached, then wait
for one byte, "go", and execute the program; the socket is close-on-exec, so that its end means success.
Before, ``{"hooks": true}`` asks for the hooks that the supervisor runs, and one byte comes when they have been.
``{"error": class, "text": …}`` reports the failure of any step before; what fails later is told as a plain text.

Where others share the PID namespace and may trace, the process is **hidden**: it prepares itself in the supervisor's
PID namespace, and makes a successor in the other one at the end. The successor has nothing that the program will not
have: its root, ids, capabilities, filter, cgroups and process group are its own, and it has no descriptor that leads
anywhere or whose content is trusted. With "ready" come four pipes, before the terminal: to let it go, to let the
hidden process end, to read why the program cannot be executed, and to hear that there is a successor.
After the node's file system is left, nothing is imported any more.
"""

import fcntl
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, NoReturn

from nodeagent.errors import SHORTAGES, FailedPrecondition
from nodeagent.linux import confined, mounts, syscalls
from nodeagent.sandbox import idmaps, protocol
from nodeagent.sandbox.idmaps import IdMaps
from nodeagent.sandbox.init import (
    console,
    credentials,
    handshake,
    hookroot,
    hooks,
    program,
    rootfs,
    users,
)
from nodeagent.sandbox.init.steps import of_step
from nodeagent.sandbox.runtime import procfs
from nodeagent.sandbox.spec import ContainerPlan, ExecPlan, Identity, ProcessPlan

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_FIRST_OTHER = 3  # the descriptor after standard error

# Signals that a process may have been started with as ignored, or that Python or a supervisor handles.
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
    """The descriptors that a container's first process takes over.

    status: a SOCK_SEQPACKET socket. stdin, stdout, stderr: -1 for the container's /dev/null; unused with a tty.
    cgroups: of cgroup v1, each hierarchy's `tasks` file, open for writing; on v2 the process is born in its cgroup.
    userns: the user namespace of the pod, where it has one.
    pid_namespace: a pidfd of a process whose PID namespace is shared; the process is hidden then, and its successor is
    born there.
    procfs: where a procfs of that namespace is mounted on the node; "" takes it from the process of the pidfd.
    """

    status: int
    stdin: int = -1
    stdout: int = -1
    stderr: int = -1
    cgroups: Sequence[int] = ()
    userns: int = -1
    pid_namespace: int = -1
    procfs: str = ""


class ExecFds(NamedTuple):
    """The descriptors of `run_exec`, as in `InitFds`.

    target: a pidfd of a process of the container, whose mount and cgroup namespaces are joined.
    hidden: the process is born in the supervisor's PID namespace, and its successor in the container's.
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
    hidden: the program is executed by a successor.
    begin: called before the program is executed, with the rights that it will have.
    """

    argv: list[str]
    settings: ProcessPlan
    identity: Identity
    cwd: int
    stdio: console.Stdio
    maps: IdMaps
    owned: int
    warnings: list[str]
    hidden: bool
    begin: Callable[[], None]


class _Reporter:
    """The reports of this process to its supervisor."""

    def __init__(self, status: int) -> None:
        self.status = status
        self._is_ready = False

    def ready(self, identity: Identity, warnings: list[str], *descriptors: int) -> None:
        _send(self.status, {"ready": {"identity": identity, "warnings": warnings}}, descriptors)
        self._is_ready = True

    def failed(self, error: BaseException) -> None:
        text = _text(error)[: handshake.MAX_TEXT_BYTES]
        if self._is_ready:
            os.write(self.status, text.encode(errors="replace"))
        else:
            kind = "OSError" if isinstance(error, OSError) else type(error).__name__
            _send(self.status, {"error": kind, "text": text})


def run(plan: ContainerPlan, fds: InitFds) -> NoReturn:
    """Become the first process of a container. Never returns and never raises."""
    _start(fds.status, lambda: _prepare_container(plan, fds))


def run_exec(plan: ExecPlan, settings: ProcessPlan, fds: ExecFds) -> NoReturn:
    """Become a further process of a container. Never returns and never raises."""
    _start(fds.status, lambda: _prepare_exec(plan, settings, fds))


def _start(status: int, prepare: Callable[[], _Start]) -> NoReturn:
    reporter = _Reporter(status)
    try:
        _leave_supervisor()
        _finish(reporter, prepare())
    except BaseException as error:  # noqa: BLE001 - the supervisor must know whatever it is
        reporter.failed(error)
    finally:
        os._exit(1)


def _leave_supervisor() -> None:
    """Shed what was inherited: the process group, signal handlers, ways to import, and being readable to others."""
    os.setsid()  # kill(2) of 0 would reach the supervisors of all pods
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    # The pipe of the supervisor's loop, to which a signal of ours would be written.
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _forbid_imports()
    gc.disable()  # a collection writes to the header of every object, and so copies what a fork shares
    os.umask(0)  # modes are the plan's; the program's own umask is set in `_finish`


def _forbid_imports() -> None:
    """Take away the ways to import. What is replaced is kept: freeing it would touch, and so copy, many pages."""
    _KEPT.extend((sys.path, sys.meta_path, sys.path_hooks, sys.path_importer_cache))
    sys.path, sys.meta_path, sys.path_hooks, sys.path_importer_cache = [], [], [], {}


def _prepare_container(plan: ContainerPlan, fds: InitFds) -> _Start:
    settings = plan["process"]
    maps = idmaps.of_process(settings, fds.userns)
    # First, so that the memory of all further steps is charged to the container.
    _join_cgroups(fds.cgroups)
    own = confined.own_descriptors()  # while /proc is the node's
    if "hooks" not in plan:
        credentials.write_labels(settings)
    warnings = credentials.set_oom_score(settings)
    if plan["cgroup_namespace"]:
        # After the cgroups are joined: they become the root of the namespace (cgroup_namespaces(7)).
        syscalls.unshare(syscalls.CLONE_NEWCGROUP)
    hidden = fds.pid_namespace != -1
    shared_proc = procfs.of_shared(fds.pid_namespace, fds.procfs) if hidden else -1
    built = rootfs.assemble(plan, maps, shared_proc)
    if "hooks" in plan:
        _run_hooks(plan, fds.status, maps, built.root)
    identity = users.resolve(built.root, own, settings["user"])
    with _working_directory(settings["cwd"]):
        cwd = confined.make_path(built.root, settings["cwd"], directory=True)
    stdio = _container_stdio(plan, fds, built, own)
    rootfs.seal(built, plan["masked_paths"], plan["readonly_paths"])
    mounts.enter_root(built.root)
    owned = syscalls.CLONE_NEWNS | (syscalls.CLONE_NEWCGROUP if plan["cgroup_namespace"] else 0)
    begin = partial(hookroot.run_in_place, plan)
    return _Start(
        plan["argv"], settings, identity, cwd, stdio, maps, owned, warnings, hidden, begin
    )


def _run_hooks(plan: ContainerPlan, status: int, maps: IdMaps, root: int) -> None:
    """Run the hooks of a creation while the root file system is complete, and neither entered nor masked.

    Labels are written after them: they would be those of the next program that is executed, which is a hook's.
    """
    hookroot.show(plan, root, maps)
    if hooks.of(plan, *hooks.CREATION):
        _send(status, {"hooks": True})
        _wait_for_go(status)
    hookroot.run_inside_mounts(plan, maps)
    credentials.write_labels(plan["process"])


def _container_stdio(
    plan: ContainerPlan, fds: InitFds, built: rootfs.Assembly, own: int
) -> console.Stdio:
    if not plan["tty"]:
        return console.with_null(built.root, own, fds.stdin, fds.stdout, fds.stderr)
    terminal = console.open_terminal(built.root, own)
    if built.dev != -1:
        console.bind_console(built.dev, terminal)
    return terminal


def _prepare_exec(plan: ExecPlan, settings: ProcessPlan, fds: ExecFds) -> _Start:
    maps = idmaps.of_process(settings, fds.userns)
    # All of this while /proc is the node's: that of a container may be anything.
    _join_cgroups(fds.cgroups)
    own = confined.own_descriptors()
    credentials.write_labels(settings)
    warnings = credentials.set_oom_score(settings)
    pid_namespace = syscalls.CLONE_NEWPID if fds.hidden else 0  # of children (pid_namespaces(7))
    try:
        syscalls.setns(fds.target, syscalls.CLONE_NEWNS | syscalls.CLONE_NEWCGROUP | pid_namespace)
    except ProcessLookupError:
        raise FailedPrecondition(f'container "{plan["container"]}": has just ended') from None
    # The container's: to join a mount namespace is to enter its root.
    root = os.open("/", _DIRECTORY)
    identity = users.resolve(root, own, settings["user"])
    with _working_directory(settings["cwd"]):
        cwd = confined.open_path(root, settings["cwd"], _DIRECTORY)
    given = (fds.stdin, fds.stdout, fds.stderr)
    stdio = (
        console.open_terminal(root, own) if plan["tty"] else console.with_null(root, own, *given)
    )
    return _Start(
        plan["argv"], settings, identity, cwd, stdio, maps, 0, warnings, fds.hidden, _nothing
    )


def _nothing() -> None:
    """An exec has no hooks."""


def _join_cgroups(tasks: Sequence[int]) -> None:
    """Join cgroups of v1 by their `tasks`.

    That moves a process of one thread without the grace period that writers of `cgroup.procs` wait for.
    """
    for file in tasks:
        os.write(file, b"0")


def _finish(reporter: _Reporter, start: _Start) -> NoReturn:
    """The steps inside the container's root, until its program runs."""
    settings, identity, warnings = start.settings, start.identity, start.warnings
    with _working_directory(settings["cwd"]):
        os.fchdir(start.cwd)
        os.getcwd()  # ENOENT where it cannot be reached from the root (getcwd(3), from glibc 2.27 on)
    owner = start.maps.uid(identity["uid"])
    for group in identity["groups"]:  # setgroups(2) does not say which of them it refuses
        start.maps.gid(group)
    # Before the user namespace is entered: its root could neither chown the pipes nor raise hard limits.
    console.install(start.stdio, owner)
    warnings += credentials.set_limits(settings["rlimits"])
    if not start.maps.is_node:
        credentials.enter_user_namespace(start.maps.userns, start.owned)
    credentials.join_new_keyring()
    warnings += credentials.become(settings, identity)
    os.umask(settings["umask"])
    to_execute = program.find(start.argv, settings["env"], identity["home"])
    master = [start.stdio.master] if start.stdio.is_terminal else []
    if start.hidden:
        _wait_for_go(_continue_in_successor(reporter, start, master))
        os.setsid()
    else:
        reporter.ready(identity, warnings, *master)
        [reporter.status] = _keep_only(reporter.status)
        _wait_for_go(reporter.status)
    if start.stdio.is_terminal:
        console.take_control()
    if not start.hidden:
        # Last of all, since a filter may forbid any of the calls before; a hidden process is confined already.
        credentials.confine(settings)
    start.begin()
    program.execute(to_execute)


@contextmanager
def _working_directory(path: str) -> Iterator[None]:
    """Report what is wrong with it as a fault of the container, or of the request, and not of the node."""
    try:
        yield
    except OSError as error:
        what = f'working directory "{path}"'
        if error.errno in SHORTAGES:
            raise of_step(what, error) from error
        raise FailedPrecondition(f"{what}: {os.strerror(error.errno or 0)}") from error


def _wait_for_go(status: int) -> None:
    """Wait for the byte that lets the process go on. If the supervisor ends instead, the container never starts."""
    if not os.read(status, 1):
        os._exit(1)


def _continue_in_successor(reporter: _Reporter, start: _Start, master: list[int]) -> int:
    """Returns in the successor only, with the pipe it waits on to go; CLONE_PARENT makes it the supervisor's child.

    It has pipes open only: a socket would lead whoever takes it over to the supervisor (SO_PEERPIDFD of unix(7)), and
    carry descriptors there. `seccomp.successor.CALLS` lists the system calls that are made once the filter is in force.
    """
    go, hold = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    text, born = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    reporter.ready(start.identity, start.warnings, go[1], hold[1], text[0], born[0], *master)
    ours = _keep_only(go[0], hold[0], text[1], born[1])
    reporter.status = ours[2]
    credentials.confine_visibly(start.settings)
    if syscalls.clone(syscalls.CLONE_PARENT | syscalls.CLONE_PIDFD):
        # Before BORN is sent: from then on the end of this pipe has to be the successor's.
        os.close(ours[2])
        os.write(ours[3], handshake.BORN)
        os.read(ours[1], 1)  # until the supervisor has found the successor
        os._exit(0)
    return ours[0]


def _keep_only(*descriptors: int) -> list[int]:
    """Close all descriptors but the standard three and these, which get the numbers after them."""
    # All are copied beyond the final numbers first: a dup2(2) could close one that has yet to be moved.
    beyond = _FIRST_OTHER + len(descriptors) + max(descriptors)
    copies = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, beyond) for descriptor in descriptors]
    for number, copy in enumerate(copies, _FIRST_OTHER):
        os.dup2(copy, number, inheritable=False)
    syscalls.close_range(_FIRST_OTHER + len(descriptors))
    return list(range(_FIRST_OTHER, _FIRST_OTHER + len(descriptors)))


def _text(error: BaseException) -> str:
    if not isinstance(error, OSError):
        return str(error)
    named = f': "{error.filename}"' if isinstance(error.filename, str) else ""
    return f"{error.strerror or error}{named}"


def _send(status: int, message: protocol.Body, descriptors: Sequence[int] = ()) -> None:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=status)
    protocol.send(channel, protocol.encode(message), descriptors)
    channel.detach()  # or the descriptor would be closed with the object
