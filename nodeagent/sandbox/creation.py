"""The making of containers: a new one from its plan, or one that another supervisor has made from what it left."""

import os
import socket
import stat
from collections.abc import Sequence

from nodeagent.errors import AlreadyExists, FailedPrecondition, NotFound
from nodeagent.linux import syscalls
from nodeagent.sandbox import exits, facts, init, process, protocol
from nodeagent.sandbox.birth import Birth
from nodeagent.sandbox.children import Child
from nodeagent.sandbox.containers import Container
from nodeagent.sandbox.facts import Facts
from nodeagent.sandbox.peers import Request
from nodeagent.sandbox.pod import Pod
from nodeagent.sandbox.spec import ContainerPlan
from nodeagent.sandbox.stdio import Stdio, open_stdio

Family = dict[str, Container]


def split_join_fds(fds: Sequence[int]) -> tuple[int, list[int]]:
    """The directory of cgroup v2, -1 without one, and the `tasks` files of v1."""
    directories = [fd for fd in fds if stat.S_ISDIR(os.fstat(fd).st_mode)]
    # A list: tuple() of a generator puts tuples on a free list of CPython and takes none from it, up to 2000 times.
    return directories[0] if directories else -1, [fd for fd in fds if fd not in directories]


# ---- a new container ----


def create(pod: Pod, family: Family, request: Request) -> None:
    """Reply when the container is ready to be started; nothing is left of one that is not."""
    plan = protocol.checked(ContainerPlan, request.body["plan"])
    if protocol.checked_id(plan["id"]) in family:
        raise AlreadyExists(f'container "{plan["id"]}": exists already')
    target = _pid_namespace(pod, family, plan)
    join = request.take_all("join")
    fds = {name: fd for name in ("oom", "procs", "kill") if (fd := request.take(name)) is not None}
    try:
        _make(pod, family, plan, fds, join, target, request)
    except BaseException:
        protocol.close_all(fds.values())
        raise
    finally:
        protocol.close_all(join)


def _pid_namespace(pod: Pod, family: Family, plan: ContainerPlan) -> int | None:
    """Whose PID namespace the container is born in: None for the supervisor's, or a new one below it."""
    if plan["pid"] == "pod":
        if pod.init_pidfd is None:
            raise FailedPrecondition(f'container "{plan["id"]}": the pod shares no PID namespace')
        return pod.init_pidfd
    if plan["pid"] == "target":
        target = family.get(plan["pid_target"])
        if target is None:
            raise NotFound(f'container "{plan["pid_target"]}": not in this pod')
        if target.state != "running":
            raise FailedPrecondition(f'container "{target.id}": is {target.state}, not running')
        return target.fds["pidfd"]
    return None


def _make(
    pod: Pod,
    family: Family,
    plan: ContainerPlan,
    fds: dict[str, int],
    join: Sequence[int],
    target: int | None,
    request: Request,
) -> None:
    stdio = open_stdio(plan)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        container = Container(pod, family, plan, _nothing_known(fds), fds)
        child = _spawn(pod, container, stdio, theirs.fileno(), join, target)
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
    container.await_birth(Birth(pod.loop, ours, container), request)


def _spawn(
    pod: Pod,
    container: Container,
    stdio: Stdio,
    status: int,
    join: Sequence[int],
    target: int | None,
) -> Child:
    cgroup, tasks = split_join_fds(join)
    given = init.InitFds(status, stdio.stdin, stdio.stdout, stdio.stderr, tasks, pod.userns)
    flags = syscalls.CLONE_NEWNS
    if container.plan["pid"] == "container":
        flags |= syscalls.CLONE_NEWPID
    with pod.children_join(target):
        return pod.children.spawn(
            lambda: init.run(container.plan, given),
            container.ended,
            keep=[fd for fd in (status, *stdio[:3], pod.userns, *tasks) if fd >= 0],
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
        container.birth = Birth(container.pod.loop, status, container)
        if container.facts["started_at"]:
            container.birth.go_on()
    container.watch()
    container.keep_deadline()
