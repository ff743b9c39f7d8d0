"""The control files of one group: their paths, reading them, and writing several of them or none.

The files of a group are in one directory on v2 and in one per hierarchy on v1; here they are known by name alone.
"""

import errno
import os
from collections.abc import Mapping, Sequence

from nodeagent.errors import (
    FailedPrecondition,
    InvalidArgument,
    NodeAgentError,
    NotFound,
    PermissionDenied,
    Unsupported,
)

Setting = tuple[str, str]
"""The name of a control file, and what is written to it."""

_CHUNK = 16384
_ABSENT = -1

# Files with a line for each device: the values that remove a line.
_LINE_RESET = {
    "io.max": "rbps=max wbps=max riops=max wiops=max",
    "io.weight": "default",
    "io.latency": "target=0",
}

_ERRORS: dict[int, type[NodeAgentError]] = {
    errno.EINVAL: InvalidArgument,
    errno.ERANGE: InvalidArgument,
    errno.EOVERFLOW: InvalidArgument,
    errno.ENODEV: InvalidArgument,
    errno.EBUSY: FailedPrecondition,
    errno.ENOSPC: FailedPrecondition,
    errno.EACCES: PermissionDenied,
    errno.EPERM: PermissionDenied,
    errno.EOPNOTSUPP: Unsupported,
}


class ControlFiles:
    """The control files of one group. directories: by controller; "" is the one of all other files."""

    def __init__(self, directories: Mapping[str, str]) -> None:
        self._directories = directories
        self._kept: dict[str, int] = {}

    def path(self, name: str) -> str | None:
        """The path that the file `name` has or would have; None without its controller."""
        controller = name.partition(".")[0]
        directory = self._directories.get(controller) or self._directories.get("")
        return None if directory is None else f"{directory}/{name}"

    def has(self, name: str) -> bool:
        path = self.path(name)
        return path is not None and os.path.exists(path)

    def read(self, name: str, absent: str = "") -> str:
        """Read the whole text without its last line end, or return `absent` where there is no such file.

        Raises NotFound where the group has gone.
        """
        path = self.path(name)
        if path is None:
            return absent
        try:
            with open(path, encoding="utf-8") as file:
                return file.read().rstrip("\n")
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
            _require_group(os.path.dirname(path))
            return absent

    def sample(self, name: str) -> bytes | None:
        """Read the present text through a descriptor that is kept; None where the file cannot be read."""
        try:
            file = self._kept.get(name)
            if file is None:
                file = self._kept[name] = self._open(name)
            if file == _ABSENT:
                return None
            # At offset 0 the kernel renders the text again (fs/seq_file.c, seq_read_iter).
            data = os.pread(file, _CHUNK, 0)
            return data if len(data) < _CHUNK else data + _rest(file)
        except OSError:
            return None

    def _open(self, name: str) -> int:
        path = self.path(name)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC) if path else _ABSENT
        except FileNotFoundError:
            return _ABSENT

    def write(self, settings: Sequence[Setting]) -> None:
        """Write all of `settings`, in order; where one fails, the earlier ones are set back.

        Raises the class of `_ERRORS` for the kernel's reason, with file and value in the text.
        """
        undo: list[Setting] = []
        for name, value in settings:
            try:
                undo.append(self._replace(name, value))
            except OSError as error:
                failure = self._explain(name, value, error)
                self._restore(undo, failure)
                raise failure from error

    def _replace(self, name: str, value: str) -> Setting:
        """Write, and return the setting that restores the file."""
        path = self.path(name)
        if path is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            old = os.read(file, _CHUNK).decode()
            os.pwrite(file, value.encode(), 0)
        finally:
            os.close(file)
        return name, reverse(name, value, old)

    def _restore(self, undo: Sequence[Setting], failure: NodeAgentError) -> None:
        # Backwards, as the order was chosen so that each step is valid: see `v1._memory`.
        for name, value in reversed(undo):
            try:
                self._replace(name, value)
            except OSError as error:
                failure.add_note(f"{name}: cannot be set back to {value}: {error.strerror}")

    def _explain(self, name: str, value: str, error: OSError) -> NodeAgentError:
        path = self.path(name)
        if path is None:
            return Unsupported(f'{name}: "{value}" needs a controller that this machine lacks')
        if error.errno in (errno.ENOENT, errno.ENODEV):
            _require_group(os.path.dirname(path))
        if error.errno == errno.ENOENT:
            return Unsupported(f'{path}: cannot write "{value}": this kernel has no such file')
        kind = _ERRORS.get(error.errno or 0, NodeAgentError)
        return kind(f'{path}: cannot write "{value}": {error.strerror}')

    def close(self) -> None:
        """Close the kept descriptors; they are opened again as needed."""
        while self._kept:
            _, file = self._kept.popitem()
            if file != _ABSENT:
                os.close(file)


def _require_group(directory: str) -> None:
    if not os.path.isdir(directory):
        raise NotFound(f"cgroup {directory}: has been removed")


def _rest(file: int) -> bytes:
    rest = b""
    while data := os.pread(file, _CHUNK, _CHUNK + len(rest)):
        rest += data
    return rest


def reverse(name: str, value: str, old: str) -> str:
    """The value that undoes the writing of `value` to the file `name`, which held `old`."""
    if name not in _LINE_RESET:
        return old.strip() or "\n"  # a write of no bytes would change nothing
    key = value.split(maxsplit=1)[0]
    if key.isdigit():
        key = "default"
    for line in old.splitlines():
        if line.split()[0] == key:
            return line
    return f"{key} {_LINE_RESET[name]}"
