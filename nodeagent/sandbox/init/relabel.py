"""SELinux labels of files that are there already: the attribute security.selinux of a whole tree.

A container that shares the tree may change it meanwhile. Each file is opened by its name in an open directory, without
following a link and without crossing a mount, and labelled by that descriptor; whatever its name means by then, it is a
file of the tree. Which files exist is read piece by piece, so that their number takes no memory.
"""

import errno
import os
import stat

from nodeagent.errors import SHORTAGES, FailedPrecondition, InvalidArgument
from nodeagent.linux import syscalls
from nodeagent.sandbox.init.steps import of_step

ATTRIBUTE = "security.selinux"

# Programs of the node need the labels of these. The other runtimes refuse them as well, though not what the short names
# are links to. What is below them may be a volume, and is relabelled.
NEVER = frozenset(
    "/ /bin /boot /dev /etc /etc/passwd /etc/pki /etc/shadow /home /lib /lib64 /media /opt /proc /root /run /sbin /srv"
    " /sys /tmp /usr /usr/bin /usr/lib /usr/lib64 /usr/sbin /var /var/lib /var/log".split()
)

# Each level keeps two descriptors open, of 1024 that a process may usually have.
MAX_DEPTH = 256

_UNFOLLOWED = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# A name alone: the last component is not followed because of O_NOFOLLOW, and opened as the link that it is.
_INSIDE = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_XDEV
_GONE = frozenset((errno.ENOENT, errno.ESTALE))
_PASSED_OVER = _GONE | {errno.EXDEV}  # a mount point is not of this tree


def require_relabelable(root: int, path: str) -> None:
    """Refuse, with InvalidArgument, what has to keep its label for the node. path: as requested; root: opened by it."""
    meant = os.readlink(f"/proc/self/fd/{root}")
    if meant in NEVER:
        raise InvalidArgument(
            f'selinux_relabel of "{path}": programs of the node need the labels of "{meant}";'
            " mount a directory of the pod's own, or mount it without selinux_relabel"
        )


def relabel_tree(root: int, label: str, path: str) -> None:
    """Give the label to a file, or to a directory with all that is in it, but not to what is mounted there.

    root: a descriptor, O_PATH is enough. path: how errors name it. Files that have the label are left alone, and so is
    a file system that keeps no labels. Raises FailedPrecondition with the first file that cannot have it.
    """
    if relabel_file(root, label, path) and _is_directory(root):
        directory = _open_directory(root)
        try:
            _relabel_below(directory, label, path, 1)
        except OSError as error:
            raise _failed(path, error) from error
        finally:
            os.close(directory)


def relabel_file(file: int, label: str, path: str) -> bool:
    """Label this file alone, even a link or a socket. False where the file system keeps no labels.

    Raises FailedPrecondition where it cannot have the label.
    """
    # fsetxattr(2) refuses an O_PATH descriptor (EBADF, open(2)); through procfs it is the same file.
    name = f"/proc/self/fd/{file}"
    try:
        if _label_of(name) != label:
            os.setxattr(name, ATTRIBUTE, label.encode())
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return False
        if error.errno not in _GONE:
            raise _failed(path, error) from error
    return True


def _label_of(name: str) -> str:
    try:
        label = os.getxattr(name, ATTRIBUTE)
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return ""
    return label.rstrip(b"\0").decode(errors="replace")


def _relabel_below(directory: int, label: str, path: str, depth: int) -> None:
    """Label what is in a directory that has its label already: what is made in it meanwhile takes that label."""
    with os.scandir(directory) as entries:
        for entry in entries:
            below = f"{path}/{entry.name}"
            found = _relabel_entry(directory, entry.name, label, below)
            if found == -1:
                continue
            try:
                if depth == MAX_DEPTH:
                    raise FailedPrecondition(
                        f'selinux_relabel of "{below}": is deeper than {MAX_DEPTH} directories'
                    )
                _relabel_below(found, label, below, depth + 1)
            finally:
                os.close(found)


def _relabel_entry(directory: int, name: str, label: str, path: str) -> int:
    """Label an entry. Returns a descriptor to read it by if it is a directory; -1 otherwise, and if it has vanished."""
    try:
        file = syscalls.openat2(directory, name, _UNFOLLOWED, resolve=_INSIDE)
    except OSError as error:
        if error.errno in _PASSED_OVER:
            return -1
        raise
    try:
        relabel_file(file, label, path)
        return _open_directory(file) if _is_directory(file) else -1
    except OSError as error:
        if error.errno in _GONE:
            return -1
        raise
    finally:
        os.close(file)


def _open_directory(file: int) -> int:
    """Open the directory that an O_PATH descriptor stands for, to be read."""
    return os.open(".", _DIRECTORY, dir_fd=file)


def _is_directory(file: int) -> bool:
    return stat.S_ISDIR(os.fstat(file).st_mode)


def _failed(path: str, error: OSError) -> OSError | FailedPrecondition:
    what = f'selinux_relabel of "{path}"'
    if error.errno in SHORTAGES:
        return of_step(what, error)
    return FailedPrecondition(f"{what}: {os.strerror(error.errno or 0)}")
