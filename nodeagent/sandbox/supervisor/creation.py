"""The creation of a container: from its plan to a process that has done everything but execute its program."""

import os
import signal
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

from nodeagent.errors import AlreadyExists, FailedPrecondition, NodeAgentError, NotFound
from nodeagent.linux import processes, syscalls
from nodeagent.sandbox import exits, paths, protocol
from nodeagent.sandbox.facts import Facts
from nodeagent.sandbox.init import main as init
from nodeagent.sandbox.runtime import process
from nodeagent.sandbox.runtime.children import Child
from nodeagent.sandbox.runtime.peers import Request
from nodeagent.sandbox.spec import ContainerPlan
from nodeagent.sandbox.supervisor import visibility
from nodeagent.sandbox.supervisor.birth import Birth
from nodeagent.sandbox.supervisor.containers import Container
from nodeagent.sandbox.supervisor.groups import split_join_fds
from nodeagent.sandbox.supervisor.pod import Pod
from nodeagent.sandbox.supervisor.stdio import Stdio, open_stdio

Members = dict[str, Container]

# The time for killed execs to end: they may have to wait for processor time of their container.
_PATIENCE_SECONDS = 10.0
_PAUSE_MS = 5


class PidNamespace(NamedTuple):
    """A PID namespace that a container shares. process: a pidfd of a process in it; procfs: as in `init.InitFds`.

    owner: the container whose own it is, None where it is the pod's.
    """

    process: int
    procfs: str
    owner: Container | None


class _Creation(NamedTuple):
    """A request to create a container, with the descriptors that came with it."""

    pod: Pod
    members: Members
    request: Request
    plan: ContainerPlan
    fds: dict[str, int]
    join: list[int]

    def close(self) -> None:
        protocol.close_all((*self.fds.values(), *self.join))


def create(pod: Pod, members: Members, request: Request) -> None:
    """Reply when the container is ready to be started; nothing is left of one that is not."""
    plan = protocol.checked(ContainerPlan, request.body["plan"])
    if protocol.checked_id(plan["id"]) in members:
        raise AlreadyExists(f'container "{plan["id"]}": exists already')
    shared = _shared_namespace(pod, members, plan)
    if shared is not None:
        visibility.require_successor(f'container "{plan["id"]}"', plan["process"], tty=plan["tty"])
    join = request.take_all("join")
    fds = {name: fd for name in ("oom", "procs", "kill") if (fd := request.take(name)) is not None}
    creation = _Creation(pod, members, request, plan, fds, join)
    try:
        if shared is not None and shared.owner and not shared.owner.facts.get("shared"):
            _share(creation, shared.owner, time.monotonic() + _PATIENCE_SECONDS)
        else:
            _make(creation, shared)
    except BaseException:
        creation.close()
        raise


def _share(creation: _Creation, owner: Container, deadline: float) -> None:
    """Kill what is being prepared visibly in a container's own PID namespace, before anybody joins it.

    Further execs are hidden from now on; those that an earlier supervisor has begun are found as well.
    """
    creation.pod.about_to_share.add(owner.id)
    left = process.ours_in(os.stat(f"/proc/{owner.facts['pid']}/ns/pid"))
    for pidfd in left:
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        os.close(pidfd)
    if left and time.monotonic() > deadline:
        raise FailedPrecondition(
            f'container "{owner.id}": {len(left)} of its execs are being started, and do not end; try again later'
        )
    if left:
        creation.pod.loop.call_after(_PAUSE_MS, lambda: _share_later(creation, owner, deadline))
        return
    owner.share_pid_namespace()
    creation.pod.about_to_share.discard(owner.id)
    _make(creation, _shared_namespace(creation.pod, creation.members, creation.plan))


def _share_later(creation: _Creation, owner: Container, deadline: float) -> None:
    """Call `_share` again for a request that has waited; all that was checked then is checked again."""
    try:
        if creation.plan["id"] in creation.members:
            raise AlreadyExists(f'container "{creation.plan["id"]}": exists already')
        if creation.request.peer is not creation.pod.agent:
            raise FailedPrecondition(
                f'container "{creation.plan["id"]}": the agent that asked for it has disconnected'
            )
        _shared_namespace(creation.pod, creation.members, creation.plan)
        _share(creation, owner, deadline)
    except (NodeAgentError, OSError) as error:
        creation.close()
        creation.request.fail(error)


def _shared_namespace(pod: Pod, members: Members, plan: ContainerPlan) -> PidNamespace | None:
    """The PID namespace that the container shares; None if it is in the supervisor's, or in a new one below it."""
    if plan["pid"] in ("container", "node"):
        return None
    namespace = visibility.POD
    if plan["pid"] == "target":
        target = members.get(plan["pid_target"])
        if target is None:
            raise NotFound(f'container "{plan["pid_target"]}": not in this pod')
        if target.state != "running":
            raise FailedPrecondition(f'container "{target.id}": is {target.state}, not running')
        namespace = visibility.namespace_of(target)
    if namespace == visibility.NODE:
        return None
    if namespace == visibility.POD:
        if pod.init_pidfd is None:
            raise FailedPrecondition(f'container "{plan["id"]}": the pod shares no PID namespace')
        procfs = paths.procfs_pin(pod.directory)
        if not os.path.exists(procfs):
            raise FailedPrecondition(
                f'pod "{pod.id}": an earlier release made its shared PID namespace, without the procfs that a further '
                "container needs; stop and remove the pod, and make it again"
            )
        return PidNamespace(pod.init_pidfd, procfs, None)
    owner = members.get(namespace)
    if owner is None or owner.state != "running":
        raise FailedPrecondition(
            f'container "{namespace}": has ended, and its PID namespace with it'
        )
    return PidNamespace(members[plan["pid_target"]].fds["pidfd"], "", owner)


def _make(creation: _Creation, shared: PidNamespace | None) -> None:
    """Fork the process. Closes `join`; the other descriptors belong to the container from here on."""
    pod, members, request, plan, fds, join = creation
    stdio = open_stdio(plan)
    try:
        container = Container(pod, members, plan, nothing_known(fds), fds)
        child, ours = _spawn(pod, container, stdio, join, shared)
    except BaseException:
        stdio.close_kept()
        raise
    finally:
        stdio.close_given()
    protocol.close_all(join)
    join.clear()  # or `create` would close them again, should anything below fail
    fds.update(stdio.kept, pidfd=child.pidfd, status=ours.detach())
    container.creation, container.is_hidden = request, shared is not None
    members[plan["id"]] = container
    hidden = child.pid if shared is not None else None
    try:
        known = container.facts
        known["pid"], known["ticks"] = child.pid, processes.start_ticks(child.pid)
        known["pipes"] = {name: os.fstat(fd).st_ino for name, fd in stdio.kept.items()}
        known["namespace"] = _name_of(plan, shared)
        birth = Birth(pod.loop, fds["status"], container, hidden)
        container.await_birth(birth)
    except (NodeAgentError, OSError) as error:
        # The process is there, so its end is what the request waits for, and what gives the descriptors back.
        container.abort(error)


def _name_of(plan: ContainerPlan, shared: PidNamespace | None) -> str:
    if shared is None:
        return plan["id"] if plan["pid"] == "container" else visibility.NODE
    return shared.owner.id if shared.owner else visibility.POD


def _spawn(
    pod: Pod,
    container: Container,
    stdio: Stdio,
    join: Sequence[int],
    shared: PidNamespace | None,
) -> tuple[Child, socket.socket]:
    cgroup, tasks = split_join_fds(join)
    # The status is a connection that comes with the child.
    given = init.InitFds(-1, stdio.stdin, stdio.stdout, stdio.stderr, tasks, pod.userns)
    if shared is not None:
        given = given._replace(pid_namespace=shared.process, procfs=shared.procfs)
    flags = syscalls.CLONE_NEWNS
    if container.plan["pid"] == "container":
        flags |= syscalls.CLONE_NEWPID
    kept = [*stdio[:3], pod.userns, given.pid_namespace, *tasks]
    return pod.children.spawn_connected(
        lambda status: init.run(container.plan, given._replace(status=status)),
        container.ended if shared is None else container.first_ended,
        keep=[fd for fd in kept if fd >= 0],
        flags=flags,
        cgroup=cgroup,
    )


def nothing_known(fds: dict[str, int]) -> Facts:
    return {
        "pid": 0,
        "ticks": 0,
        "pipes": {},
        "identity": {"uid": 0, "gid": 0, "groups": [], "home": ""},
        "warnings": [],
        "created_at": 0,
        "started_at": 0,
        "oom_kills": exits.oom_kills(fds.get("oom")),
        "signalled": False,
        "killed": False,
        "deadline": 0,
    }
