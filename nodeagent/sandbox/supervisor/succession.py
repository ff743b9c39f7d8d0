"""Succession: the containers of a supervisor that has died are taken over by another one.

Their plans and states are in the pod's directory; their descriptors were kept by the launcher.
"""

from collections.abc import Callable
from typing import TypeVar

from nodeagent.linux import processes
from nodeagent.sandbox import exits, facts, planfile, protocol
from nodeagent.sandbox.facts import Facts
from nodeagent.sandbox.runtime import process
from nodeagent.sandbox.runtime.loop import report
from nodeagent.sandbox.spec import ContainerPlan
from nodeagent.sandbox.supervisor import visibility
from nodeagent.sandbox.supervisor.birth import Birth
from nodeagent.sandbox.supervisor.containers import Container
from nodeagent.sandbox.supervisor.creation import Members, nothing_known
from nodeagent.sandbox.supervisor.pod import Pod

T = TypeVar("T")


def restore(pod: Pod, members: Members, kept: dict[str, dict[str, int]]) -> None:
    """Take over what is in the pod's directory, with the descriptors that the launcher has kept.

    Raises IncompatibleVersion before anything is touched.
    """
    for container_id, (plan, known) in _all_found(pod.directory).items():
        if plan is None or known is None:
            # Its process has ended, for lack of a supervisor to tell that it is ready.
            _restore_cut_off(pod, members, container_id, plan)
            continue
        fds = kept.pop(container_id, {})
        container = Container(pod, members, plan, known, fds)
        members[container_id] = container
        _take_over(container)
    for fds in kept.values():
        protocol.close_all(fds.values())
    for container in members.values():
        _note_namespace(members, container)


def _all_found(pod: str) -> dict[str, tuple[ContainerPlan | None, Facts | None]]:
    """Plan and facts of each container, None for what is not there or is damaged."""
    return {
        container_id: (
            _loaded(planfile.load, pod, container_id),
            _loaded(facts.load, pod, container_id),
        )
        for container_id in facts.listed(pod)
    }


def _loaded(load: Callable[[str, str], T], pod: str, container_id: str) -> T | None:
    try:
        return load(pod, container_id)
    except (FileNotFoundError, ValueError):
        return None


def _restore_cut_off(
    pod: Pod, members: Members, container_id: str, plan: ContainerPlan | None
) -> None:
    """Nothing is left of it, but hooks that are owed to those which have been run."""
    if plan is None:
        facts.remove(pod.directory, container_id)
        return
    container = members[container_id] = Container(pod, members, plan, nothing_known({}), {})
    container.cut_off()


def _note_namespace(members: Members, container: Container) -> None:
    """Facts of an earlier version do not tell whose PID namespace a container is in, nor who shares one."""
    namespace = visibility.namespace_of(container)
    while (owner := members.get(namespace)) is not None and owner is not container:
        further = visibility.namespace_of(owner)
        if further == namespace:
            owner.facts["shared"] = True
            break
        namespace = further
    container.facts["namespace"] = namespace


def _take_over(container: Container) -> None:
    """Take over one container. What cannot be had for a shortage is asked for again, and hurts no other container."""
    try:
        container.exit = exits.read(container.pod.directory, container.id)
    except OSError as error:  # whoever records an end finds the earlier record
        report(f"container {container.id}: no record of its end can be read: {error}")
    if container.exit is not None and not container.fds:
        if container.hooks.are_left:
            container.hooks.after_end(container.remove_as_asked)
        return
    if "pidfd" not in container.fds:
        _find_again(container)
        if "pidfd" in container.fds:  # or the next successor would have to find it again
            container.pod.launcher.keep(container.id, container.deposit())
    loop = container.pod.loop
    loop.persist(lambda: _resume_output(container), f"container {container.id}: no output")
    if container.exit is not None or "pidfd" not in container.fds:
        container.ended(exits.UNKNOWN)
    else:
        loop.persist(lambda: _watch(container), f"container {container.id}: not watched")


def _resume_output(container: Container) -> None:
    if container.is_over or container.pump is not None:
        return
    pump = container.open_pump()
    if container.facts["started_at"]:
        pump.go_on(container.plan["log_path"], container.plan.get("log_root", ""))


def _find_again(container: Container) -> None:
    """Find the process and its pipes through /proc, where the launcher has died and kept nothing."""
    known = container.facts
    pidfd = processes.open_pidfd(known["pid"], known["ticks"])
    if pidfd is not None:
        container.fds["pidfd"] = pidfd
        container.fds.update(process.reopen_pipes(known["pid"], known["pipes"]))


def _watch(container: Container) -> None:
    if container.is_over:
        return
    if "status" in container.fds and container.birth is None:
        pid = container.facts["pid"]
        birth = Birth.resume(container.pod.loop, container.fds, container, pid)
        container.resume_birth(birth)
        if container.facts["started_at"]:
            birth.go_on()
    container.watch()
    container.keep_deadline()
