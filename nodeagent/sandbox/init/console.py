"""Standard input, output and error of a container's process: pipes, the null device, or a pseudoterminal.

A terminal comes from the devpts instance that is the container's own. That, and /dev/null, may have been changed by
hostile processes when a further process is started: it is opened only after it has proved to be the expected device.
Slaves are reached through their master (TIOCGPTPEER), never by name.
"""

import errno
import fcntl
import os
import stat
import struct
import termios
from typing import NamedTuple

from nodeagent.errors import SHORTAGES, FailedPrecondition
from nodeagent.linux import confined, mounts, syscalls
from nodeagent.sandbox.init.steps import of_step

_DEVPTS_SUPER_MAGIC = 0x1CD1
_TIOCSPTLCK = 0x40045431
_TIOCGPTPEER = 0x5441


class Stdio(NamedTuple):
    """Three descriptors; a terminal is all three of them, and has a master end."""

    stdin: int
    stdout: int
    stderr: int
    master: int = -1

    @property
    def is_terminal(self) -> bool:
        return self.master != -1


def open_terminal(root: int, own: int) -> Stdio:
    """A new terminal of the devpts that is mounted at /dev/pts inside `root`; own: of `confined.own_descriptors`."""
    path = "/dev/pts/ptmx"
    found = _find_device(root, path, os.makedev(5, 2), follow=False)
    if syscalls.statfs_type(found) != _DEVPTS_SUPER_MAGIC:
        raise FailedPrecondition(f'terminal "{path}": not on devpts')
    master = confined.open_again(own, found, os.O_RDWR | os.O_NOCTTY)
    # A new slave cannot be opened until it is unlocked (unlockpt(3)).
    fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
    # O_NOCTTY: the caller leads a session without a terminal, and this one would become its own (open(2)).
    slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    return Stdio(slave, slave, slave, master)


def with_null(root: int, own: int, stdin: int, stdout: int, stderr: int) -> Stdio:
    """The given descriptors, with /dev/null inside `root` for each that is -1; own: of `confined.own_descriptors`.

    Never the node's null device: a container could change the node's file through it.
    """
    given = (stdin, stdout, stderr)
    if -1 not in given:
        return Stdio(*given)
    null = confined.open_again(
        own, _find_device(root, "/dev/null", os.makedev(1, 3)), os.O_RDWR | os.O_NOCTTY
    )
    return Stdio(*(null if descriptor == -1 else descriptor for descriptor in given))


def _find_device(root: int, path: str, number: int, *, follow: bool = True) -> int:
    """Return an O_PATH descriptor of the device, so that what may be there instead is not opened.

    A /dev that the request mounts may lack it.
    """
    try:
        found = confined.open_path(root, path, follow=follow)
    except OSError as error:
        what = f'device "{path}" of the container'
        if error.errno in SHORTAGES:
            raise of_step(what, error) from error
        raise FailedPrecondition(f"{what}: {os.strerror(error.errno or 0)}") from error
    status = os.fstat(found)
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != number:
        text = f'device "{path}" of the container: not the device that belongs there'
        raise FailedPrecondition(text)
    return found


def bind_console(dev: int, terminal: Stdio) -> None:
    """Make the terminal the file `console` of the container's own /dev."""
    target = confined.make_path(dev, "console", directory=False, follow=False)
    syscalls.move_mount(mounts.clone_tree(terminal.stdin, recursive=False), target)


def install(stdio: Stdio, uid: int) -> None:
    """Put the descriptors in the places 0, 1 and 2.

    They are made the user's own, so that /dev/stdout and its like can be opened again.
    """
    for place, descriptor in enumerate(stdio[:3]):
        _give_to(descriptor, uid)
        os.dup2(descriptor, place)


def take_control() -> None:
    """Make the terminal that is standard input the one that controls the session which the caller leads."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _give_to(descriptor: int, uid: int) -> None:
    status = os.fstat(descriptor)
    # A device that is no terminal is /dev/null, which all users of the container share.
    if status.st_uid == uid or (stat.S_ISCHR(status.st_mode) and not os.isatty(descriptor)):
        return
    try:
        os.fchown(descriptor, uid, -1)
    except OSError as error:
        # a file system, or a kind of file, without owners
        if error.errno not in (errno.EPERM, errno.EROFS, errno.EINVAL, errno.EOPNOTSUPP):
            raise
