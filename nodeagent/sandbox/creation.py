"""The making of containers: a new one from its plan, or one that another supervisor has made from what it left."""

import os
import socket
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nodeagent.errors import AlreadyExists, FailedPrecondition, NotFound
from nodeagent.linux import syscalls
from nodeagent.sandbox import exits, facts, init, namespaces, process, protocol, visibility
from nodeagent.sandbox.birth import Birth
from nodeagent.sandbox.children import Child
from nodeagent.sandbox.containers import Container
from nodeagent.sandbox.facts import Facts
from nodeagent.sandbox.groups import split_join_fds
from nodeagent.sandbox.peers import Request
from nodeagent.sandbox.pod import Pod
from nodeagent.sandbox.spec import ContainerPlan
from nodeagent.sandbox.stdio import Stdio, open_stdio

Family = dict[str, Container]


# ---- a new container ----


class PidNamespace(NamedTuple):
    """A PID namespace that a container shares. process: a pidfd of who is in it; procfs: as in `init.InitFds`."""

    process: int
    procfs: str


def create(
    pod: Pod, family: Family, request: Request, before_sharing: Callable[[str], None]
) -> None:
    """Reply when the container is ready to be started; nothing is left of one that is not.

    before_sharing: called with the name of the PID namespace (`visibility.pid_namespace`) that it is born into.
    """
    plan = protocol.checked(ContainerPlan, request.body["plan"])
    if protocol.checked_id(plan["id"]) in family:
        raise AlreadyExists(f'container "{plan["id"]}": exists already')
    shared = _shared_namespace(pod, family, plan)
    if shared is not None:
        visibility.require_successor(f'container "{plan["id"]}"', plan["process"], tty=plan["tty"])
        before_sharing(visibility.pid_namespace(family, plan))
    join = request.take_all("join")
    fds = {name: fd for name in ("oom", "procs", "kill") if (fd := request.take(name)) is not None}
    try:
        _make(pod, family, plan, fds, join, shared, request)
    except BaseException:
        protocol.close_all(fds.values())
        raise
    finally:
        protocol.close_all(join)


def _shared_namespace(pod: Pod, family: Family, plan: ContainerPlan) -> PidNamespace | None:
    """Whose PID namespace the container is born into: None for the supervisor's, or a new one below it."""
    if plan["pid"] == "target":
        target = family.get(plan["pid_target"])
        if target is None:
            raise NotFound(f'container "{plan["pid_target"]}": not in this pod')
        if target.state != "running":
            raise FailedPrecondition(f'container "{target.id}": is {target.state}, not running')
    namespace = visibility.pid_namespace(family, plan)
    if namespace == visibility.NODE or plan["pid"] == "container":
        return None
    if namespace == visibility.POD:
        if pod.init_pidfd is None:
            raise FailedPrecondition(f'container "{plan["id"]}": the pod shares no PID namespace')
        return PidNamespace(pod.init_pidfd, namespaces.procfs_pin(pod.directory))
    return PidNamespace(family[plan["pid_target"]].fds["pidfd"], "")


def _make(
    pod: Pod,
    family: Family,
    plan: ContainerPlan,
    fds: dict[str, int],
    join: Sequence[int],
    shared: PidNamespace | None,
    request: Request,
) -> None:
    stdio = open_stdio(plan)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        container = Container(pod, family, plan, _nothing_known(fds), fds)
        child = _spawn(pod, container, stdio, theirs.fileno(), join, shared)
    except BaseException:
        ours.close()
        stdio.close_kept()
        raise
    finally:
        theirs.close()
        stdio.close_given()
    fds.update(stdio.kept, pidfd=child.pidfd, status=ours.fileno())
    container.facts["pid"], container.facts["ticks"] = child.pid, process.start_ticks(child.pid)
    container.facts["pipes"] = {name: os.fstat(fd).st_ino for name, fd in stdio.kept.items()}
    family[plan["id"]] = container
    hidden = child.pid if shared is not None else None
    birth = Birth(pod.loop, ours, container, hidden)
    container.await_birth(birth, request, hidden=shared is not None)


def _spawn(
    pod: Pod,
    container: Container,
    stdio: Stdio,
    status: int,
    join: Sequence[int],
    shared: PidNamespace | None,
) -> Child:
    cgroup, tasks = split_join_fds(join)
    given = init.InitFds(status, stdio.stdin, stdio.stdout, stdio.stderr, tasks, pod.userns)
    if shared is not None:
        given = given._replace(pid_namespace=shared.process, procfs=shared.procfs)
    flags = syscalls.CLONE_NEWNS
    if container.plan["pid"] == "container":
        flags |= syscalls.CLONE_NEWPID
    kept = [status, *stdio[:3], pod.userns, given.pid_namespace, *tasks]
    return pod.children.spawn(
        lambda: init.run(container.plan, given),
        container.ended if shared is None else container.first_ended,
        keep=[fd for fd in kept if fd >= 0],
        flags=flags,
        cgroup=cgroup,
    )


def _nothing_known(fds: dict[str, int]) -> Facts:
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


# ---- the containers of a supervisor that has died ----


def restore(pod: Pod, family: Family, kept: dict[str, dict[str, int]]) -> None:
    """Take over what is in the pod's directory, with the descriptors that the launcher has kept."""
    for container_id in facts.listed(pod.directory):
        try:
            plan, known = facts.load(pod.directory, container_id)
        except (FileNotFoundError, ValueError):
            # Its process has ended, for lack of a supervisor to tell that it is ready.
            facts.remove(pod.directory, container_id)
            continue
        fds = kept.pop(container_id, {})
        container = Container(pod, family, plan, known, fds)
        family[container_id] = container
        _take_over(container)
    for fds in kept.values():
        protocol.close_all(fds.values())


def _take_over(container: Container) -> None:
    container.exit = exits.read(container.pod.directory, container.id)
    if container.exit is not None and not container.fds:
        return
    if "pidfd" not in container.fds:
        _find_again(container)
    container.open_pump()
    if container.facts["started_at"] and container.pump is not None:
        container.pump.go_on(container.plan["log_path"], container.plan.get("log_root", ""))
    if container.exit is not None or "pidfd" not in container.fds:
        container.ended(exits.UNKNOWN)
    else:
        _watch(container)


def _find_again(container: Container) -> None:
    """Without a launcher that kept anything, the process and its pipes may still be there."""
    known = container.facts
    pidfd = process.open_pidfd(known["pid"], known["ticks"])
    if pidfd is not None:
        container.fds["pidfd"] = pidfd
        container.fds.update(process.reopen_pipes(known["pid"], known["pipes"]))


def _watch(container: Container) -> None:
    if "status" in container.fds:
        status = socket.socket(fileno=container.fds["status"])
        container.birth = Birth.resume(container.pod.loop, status, container)
        if container.facts["started_at"]:
            container.birth.go_on()
    container.watch()
    container.keep_deadline()
