"""What hooks see of a container that is being made: its bundle and its root file system, at the paths of its state.

Both are in a small file system that is mounted over the agent's state directory, in the container's mount namespace
only and until its root is entered. So nothing of other pods is seen there, and root of a user namespace, who cannot
pass the directories of pods, reaches them as well. To hooks in the node's mount namespace a link beside the bundle
shows the root file system for as long as they run.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from nodeagent.linux import mounts, syscalls
from nodeagent.sandbox.bundle import CONFIG, ROOTFS
from nodeagent.sandbox.idmaps import IdMaps
from nodeagent.sandbox.init import credentials, hooks
from nodeagent.sandbox.spec import ContainerPlan

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_LEVELS = 5  # of pods/<id>/containers/<id>/bundle, in the agent's state directory


def show(plan: ContainerPlan, root: int, maps: IdMaps) -> None:
    """Move the root file system, which is complete, to where its hooks look for it."""
    bundle = plan["hooks"]["bundle"]
    top = _covered(bundle, maps)
    tree = mounts.make_filesystem("tmpfs", {"mode": "755"}, ["nosuid", "nodev"])
    place = tree
    for name in os.path.relpath(os.path.dirname(bundle), top).split("/"):
        place = _make_directory(place, name)
    inside = _make_directory(place, os.path.basename(bundle))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    file = os.open(CONFIG, flags, 0o644, dir_fd=inside)
    os.write(file, plan["hooks"]["config"].encode())
    syscalls.move_mount(tree, os.open(top, _DIRECTORY))
    syscalls.move_mount(root, _make_directory(place, ROOTFS))  # never into what is detached


def _covered(bundle: str, maps: IdMaps) -> str:
    """The agent's state directory, or what is above it that root of a user namespace could not pass."""
    above = [bundle]
    while above[-1] != "/":
        above.append(os.path.dirname(above[-1]))
    state = above[_LEVELS]
    if maps.is_node:
        return state
    passed = (path for path in reversed(above[_LEVELS:-1]))
    return next((path for path in passed if not os.stat(path).st_mode & stat.S_IXOTH), state)


def _make_directory(parent: int, name: str) -> int:
    os.mkdir(name, 0o755, dir_fd=parent)
    return os.open(name, _DIRECTORY, dir_fd=parent)


def run_inside_mounts(plan: ContainerPlan, maps: IdMaps) -> None:
    """The hooks of createContainer: in the container's namespaces, before its root is entered."""
    root = f"{os.path.dirname(plan['hooks']['bundle'])}/{ROOTFS}"

    def enter() -> None:
        """In a user namespace a hook has mounts of its own, for it has no rights to those of the container.

        A copy of a mount that is locked there (mount_namespaces(7)) is not: a hook can make it its root.
        """
        if not maps.is_node:
            credentials.enter_user_namespace(maps.userns, syscalls.CLONE_NEWNS)
            os.setgroups([])
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            syscalls.mount(root, root, "", syscalls.MS_BIND | syscalls.MS_REC)

    told = hooks.state(plan, "creating", os.getpid())
    with _children_in_own_pid_namespace():
        for stage, hook in hooks.of(plan, "createContainer"):
            hooks.run(stage, hook, told, plan["hooks"]["bundle"], enter)


@contextmanager
def _children_in_own_pid_namespace() -> Iterator[None]:
    """A hidden process has its successor born in another one (pid_namespaces(7)), which no hook shall be in."""
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    successors = os.open("/proc/self/ns/pid_for_children", os.O_RDONLY | os.O_CLOEXEC)
    syscalls.setns(own, syscalls.CLONE_NEWPID)
    yield
    syscalls.setns(successors, syscalls.CLONE_NEWPID)


def run_in_place(plan: ContainerPlan) -> None:
    """The hooks of startContainer: in the container, by who is about to execute its program."""
    found = hooks.of(plan, "startContainer")
    if found:
        told = hooks.state(plan, "created", os.getpid())
        for stage, hook in found:
            hooks.run_inside(stage, hook, told)


def link(plan: ContainerPlan, pid: int) -> None:
    """On the node, for the hooks of createRuntime. pid: of the process in whose mount namespace the root is shown."""
    directory = os.path.dirname(plan["hooks"]["bundle"])
    unlink(plan)
    os.symlink(f"/proc/{pid}/root{directory}/{ROOTFS}", f"{directory}/{ROOTFS}")


def unlink(plan: ContainerPlan) -> None:
    """Before the pid can be another process's."""
    try:
        os.unlink(f"{os.path.dirname(plan['hooks']['bundle'])}/{ROOTFS}")
    except FileNotFoundError:
        pass
