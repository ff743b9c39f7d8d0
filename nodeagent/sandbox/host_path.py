"""Host paths of a mount plan: how they are opened, made where they are absent, and what they must be.

A container's first process uses it before it accesses anything of the container; `nodeagent check --pod` uses it to
predict the outcome.
"""

import errno
import os
from contextlib import suppress

from nodeagent.errors import SHORTAGES, FailedPrecondition, InvalidArgument, NotFound
from nodeagent.linux import mounts, syscalls
from nodeagent.sandbox.spec import Mount


def open_host_path(mount: Mount) -> int:
    """Open a host path; an absent one is made a directory where the plan says so, as every other runtime does."""
    path, absent = mount["source"], mount.get("absent")
    what = f'host path "{path}" for {mount["target"]}'
    try:
        try:
            return syscalls.open_tree(syscalls.AT_FDCWD, path, 0)
        except FileNotFoundError:
            if absent != "make":
                raise
        _make_directories(path)
        return syscalls.open_tree(syscalls.AT_FDCWD, path, 0)
    except FileNotFoundError as error:
        reason = ", and absent_mount_sources_to_reject has it" if absent == "reject" else ""
        raise NotFound(f"{what}: {os.strerror(errno.ENOENT)}{reason}") from error
    except OSError as error:
        if error.errno in SHORTAGES:
            raise
        raise FailedPrecondition(f"{what}: {os.strerror(error.errno or 0)}") from error


def _make_directories(path: str) -> None:
    """Make a directory and its missing parents, mode 0755, owned by the node's root.

    No dangling link is followed: whoever made it would choose what is made.
    """
    missing = [path]
    while not os.path.lexists(parent := os.path.dirname(missing[-1])):
        missing.append(parent)
    for directory in reversed(missing):
        with suppress(FileExistsError):  # of another container, or a link to nothing
            os.mkdir(directory, 0o755)


def require_propagation(mount: Mount, origin: int) -> None:
    """Require that the origin's mount propagates: a shared one for "shared", any but a private one for "slave"."""
    asked = mount["propagation"]
    if asked == "private":
        return
    found = mounts.propagation_of(origin)
    if found == "private" or (asked == "shared" and found == "slave"):
        raise InvalidArgument(
            f'propagation "{asked}" of {mount["target"]}: host path "{mount["source"]}"'
            f" is on a {found} mount"
        )
