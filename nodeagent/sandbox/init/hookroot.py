"""The view that hooks have of a container in creation: its bundle and its root file system, at the paths of its state.

Both are in a small file system that is mounted over the agent's state directory, in the container's mount namespace
only and until its root is entered. So nothing of other pods is seen there, and the root of a user namespace, which
cannot traverse the directories of pods, reaches them as well. Hooks in the node's mount namespace see the root file
system through a link beside the bundle, for as long as they run.
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
    # After `tree` is attached: before Linux 6.15 nothing can be mounted in a detached tree.
    syscalls.move_mount(root, _make_directory(place, ROOTFS))


def _covered(bundle: str, maps: IdMaps) -> str:
    """The agent's state directory, or the first one above it that root of a user namespace cannot traverse."""
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
    """Run the hooks of createContainer: in the container's namespaces, before its root is entered."""
    root = f"{os.path.dirname(plan['hooks']['bundle'])}/{ROOTFS}"

    def enter() -> None:
        """Enter a mount namespace of its own in a user namespace: a hook has no rights to the container's there.

        The root is bound over itself: unlike the mounts that are locked there (mount_namespaces(7)), this copy is not,
        and a hook can make it its root.
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
    """Fork in the caller's own PID namespace, and not in the one of the successor of a hidden process.

    The latter is that of containers (pid_namespaces(7)), in which no hook may be.
    """
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    successors = os.open("/proc/self/ns/pid_for_children", os.O_RDONLY | os.O_CLOEXEC)
    syscalls.setns(own, syscalls.CLONE_NEWPID)
    yield
    syscalls.setns(successors, syscalls.CLONE_NEWPID)


def run_in_place(plan: ContainerPlan) -> None:
    """Run the hooks of startContainer: in the container, in the process that is about to execute its program."""
    found = hooks.of(plan, "startContainer")
    if found:
        told = hooks.state(plan, "created", os.getpid())
        for stage, hook in found:
            hooks.run_inside(stage, hook, told)


def link(plan: ContainerPlan, pid: int) -> None:
    """Make the link on the node for the hooks of createRuntime.

    pid: of the process in whose mount namespace the root is shown.
    """
    directory = os.path.dirname(plan["hooks"]["bundle"])
    unlink(plan)
    os.symlink(f"/proc/{pid}/root{directory}/{ROOTFS}", f"{directory}/{ROOTFS}")


def unlink(plan: ContainerPlan) -> None:
    """Remove the link; to be called before the pid can be another process's."""
    try:
        os.unlink(f"{os.path.dirname(plan['hooks']['bundle'])}/{ROOTFS}")
    except FileNotFoundError:
        pass
