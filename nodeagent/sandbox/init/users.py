"""The identity of a process, from a request and the /etc/passwd and /etc/group of the container's own root.

The files are not trusted: they are found confined to the root, opened only when they have proved to be regular and of
bounded size, and malformed lines are skipped. The node's name services are never asked (passwd(5), group(5)).
"""

import errno
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from nodeagent.errors import InvalidArgument, NotFound
from nodeagent.linux import confined
from nodeagent.linux.userns import MAX_ID
from nodeagent.sandbox.spec import Identity, UserRequest

MAX_FILE_BYTES = 1 << 20
_MAX_LINE_BYTES = 64 << 10
_MAX_GROUPS = 65536  # NGROUPS_MAX (getgroups(2))

# Errors of links in a circle, or to the node's descriptors, or to too long a name.
_FAULTS_OF_A_LINK = frozenset((errno.ELOOP, errno.EXDEV, errno.ENAMETOOLONG))

_PASSWD = "/etc/passwd"
_GROUP = "/etc/group"


class User(NamedTuple):
    """An entry of /etc/passwd."""

    name: bytes
    uid: int
    gid: int
    home: str


class Group(NamedTuple):
    """An entry of /etc/group."""

    name: bytes
    gid: int
    members: frozenset[bytes]


def resolve(root: int, own: int, request: UserRequest) -> Identity:
    """Resolve against the files inside the directory `root`; own: of `confined.own_descriptors`.

    Raises `NotFound` for a name that is in neither, `InvalidArgument` for a file that is not regular or too large.
    """
    passwd = read_file(root, own, _PASSWD)
    group = read_file(root, own, _GROUP) if _needs_groups(request) else b""
    return identify(request, passwd, group)


def _needs_groups(request: UserRequest) -> bool:
    return bool(request["merge_groups"] or request["groupname"])


def identify(request: UserRequest, passwd: bytes, group: bytes) -> Identity:
    """The identity that `request` means, with the contents of the two files."""
    user = _find_user(request, passwd)
    gid = _find_gid(request, user, group)
    groups = {gid, *request["groups"]}
    if request["merge_groups"]:
        groups.update(entry.gid for entry in parse_group(group) if user.name in entry.members)
    if (highest := max(user.uid, *groups)) > MAX_ID:
        raise InvalidArgument(f"user or group {highest}: more than {MAX_ID}")
    if len(groups) > _MAX_GROUPS:
        raise InvalidArgument(f"{len(groups)} groups for one process: more than {_MAX_GROUPS}")
    return {"uid": user.uid, "gid": gid, "groups": sorted(groups), "home": user.home}


def _find_user(request: UserRequest, passwd: bytes) -> User:
    if request["username"]:
        name = os.fsencode(request["username"])
        for user in parse_passwd(passwd):
            if user.name == name:
                return user
        raise NotFound(f'user "{request["username"]}": not in {_PASSWD} of the image')
    uid = request["uid"] or 0
    for user in parse_passwd(passwd):
        if user.uid == uid:
            return user
    return User(b"", uid, 0, "/")


def _find_gid(request: UserRequest, user: User, group: bytes) -> int:
    if request["gid"] is not None:
        return request["gid"]
    if not request["groupname"]:
        return user.gid
    name = os.fsencode(request["groupname"])
    for entry in parse_group(group):
        if entry.name == name:
            return entry.gid
    raise NotFound(f'group "{request["groupname"]}": not in {_GROUP} of the image')


def parse_passwd(content: bytes) -> Iterator[User]:
    """``name:password:uid:gid:comment:home:shell``; fields after the group may be missing."""
    for fields in _entries(content):
        uid, gid = _number(fields, 2), _number(fields, 3)
        if uid is not None and gid is not None:
            home = os.fsdecode(fields[5]) if len(fields) > 5 else ""
            yield User(fields[0], uid, gid, home or "/")


def parse_group(content: bytes) -> Iterator[Group]:
    """``name:password:gid:member,member``; the members may be missing."""
    for fields in _entries(content):
        gid = _number(fields, 2)
        if gid is not None:
            members = fields[3].split(b",") if len(fields) > 3 else []
            yield Group(fields[0], gid, frozenset(filter(None, members)))


def _entries(content: bytes) -> Iterator[list[bytes]]:
    for line in content.split(b"\n"):
        fields = line.strip().split(b":") if len(line) <= _MAX_LINE_BYTES else [b""]
        if fields[0] and b"\0" not in line:
            yield fields


def _number(fields: list[bytes], index: int) -> int | None:
    if len(fields) <= index or not fields[index].isdigit() or len(fields[index]) > 10:
        return None
    number = int(fields[index])
    return number if number <= MAX_ID else None


def read_file(root: int, own: int, path: str) -> bytes:
    """A regular file inside `root`, b"" where there is none; a fifo or device is refused unopened.

    Raises InvalidArgument for what is the image's fault, and OSError for what is the node's.
    """
    try:
        found = confined.open_path(root, path)
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except OSError as error:
        if error.errno not in _FAULTS_OF_A_LINK:
            raise
        raise InvalidArgument(f"{path} of the image: {os.strerror(error.errno or 0)}") from error
    try:
        size = _size_of_small_file(found, path)
        file = confined.open_again(own, found, os.O_RDONLY)
    finally:
        os.close(found)
    try:
        return os.read(file, size)
    finally:
        os.close(file)


def _size_of_small_file(found: int, path: str) -> int:
    status = os.fstat(found)
    if not stat.S_ISREG(status.st_mode):
        raise InvalidArgument(f"{path} of the image: not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise InvalidArgument(f"{path} of the image: larger than {MAX_FILE_BYTES} bytes")
    return status.st_size
