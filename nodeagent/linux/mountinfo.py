"""The mounts of the caller's namespace, from /proc/self/mountinfo (proc_pid_mountinfo(5)).

The kernel's table has them without a request to a server, which statfs(2) may make.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

_OCTAL = re.compile(r"\\([0-7]{3})")


class Mount(NamedTuple):
    """A line of the table. device: major:minor, as in st_dev; root: the part of the file system that is shown.

    propagation: the optional fields, as "shared:5"; options: those of the file system, behind the last hyphen.
    """

    id: int
    device: str
    root: str
    point: str
    propagation: tuple[str, ...]
    kind: str
    options: str


def table() -> str:
    """Read the whole file: a newline ends each line, a space each field; names may have other white space."""
    with open(
        "/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n"
    ) as file:
        return file.read()


def parse(text: str) -> Iterator[Mount]:
    """The mounts of a table; one that covers another comes after it."""
    return (_mount(line) for line in text.split("\n") if line)


def with_id(mount_id: int) -> Mount:
    """The mount with this id of statx(2). Raises OSError where it is not in the caller's namespace."""
    start = f"{mount_id} "
    for line in table().split("\n"):
        if line.startswith(start):
            return _mount(line)
    raise OSError(f"mount {mount_id} is not in /proc/self/mountinfo")


def _mount(line: str) -> Mount:
    head, _, tail = line.partition(" - ")
    mount_id, _, device, root, point, _, *propagation = head.split(" ")
    kind, _, options = tail.split(" ", 2)
    return Mount(
        int(mount_id), device, _name(root), _name(point), tuple(propagation), kind, options
    )


def _name(field: str) -> str:
    """Decode a path of the table, in which blanks, tabs, line feeds and backslashes are octal."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field) if "\\" in field else field
