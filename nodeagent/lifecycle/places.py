"""The directories of an agent, and the name that distinguishes it from other agents on the machine."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from nodeagent import files
from nodeagent.config import DEFAULT_STATE, Config
from nodeagent.errors import AlreadyExists
from nodeagent.lifecycle import private_mount

PRIVATE = 0o700
LOCK = "lock"

# Whoever was given access to the CRI's socket, which is there by default, must be able to reach it.
STATE = 0o711

# The default of the first versions. Pods of theirs may run, whose supervisors know no other place.
EARLIER = Path("/run/nodeagent")

# Whoever has that directory as a volume may have put something else in the place of a file.
_ITSELF = os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The directories. instance: eight hex digits of the root directory, in the names of links, nft tables and cgroups.

    home: where the launcher and the pods are: the state directory, or the one of an earlier version while that has any.
    """

    instance: str
    root: Path
    state: Path
    home: Path

    @classmethod
    def of(cls, config: Config) -> Self:
        root, state = Path(config.root).resolve(), Path(config.state).resolve()
        instance = hashlib.sha256(str(root).encode()).hexdigest()[:8]
        home = EARLIER if config.state == DEFAULT_STATE and _is_used(EARLIER) else state
        return cls(instance=instance, root=root, state=state, home=home)

    @property
    def is_earlier(self) -> bool:
        """Whether the pods are where an earlier version has put them."""
        return self.home != self.state

    @property
    def database(self) -> Path:
        return self.root / "state.db"

    @property
    def journal(self) -> Path:
        """The directory of the changes that are on their way into the database.

        It is that of the pods, which the next agent finds whatever state directory it is given.
        """
        return self.home

    @property
    def containers(self) -> Path:
        return self.root / "containers"

    @property
    def trash(self) -> Path:
        return self.root / "trash"

    @property
    def staging(self) -> Path:
        return self.root / "staging"

    @property
    def pods(self) -> Path:
        return self.home / "pods"

    def make(self) -> None:
        """Make what is missing, and take from the rest what an earlier version let others do."""
        for directory in (self.root, self.containers, self.trash, self.pods):
            files.ensure_directory(str(directory), mode=PRIVATE)
            files.narrow(str(directory), PRIVATE)
        for directory in (self.state, self.home):
            files.narrow(str(directory), STATE)
        for inner in (self.root / "blobs", *self.containers.iterdir(), *self.pods.iterdir()):
            files.narrow(str(inner), PRIVATE)
        for plan in self.containers.glob("*/plan.json"):  # which earlier versions have written
            files.narrow(str(plan), 0o600)

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the locks of all directories: two agents on one would undo each other's work."""
        with ExitStack() as locks:
            locks.enter_context(_locked(self.root, PRIVATE))
            for directory in dict.fromkeys((self.state, self.home)):
                locks.enter_context(_locked(directory, STATE))
            yield


def _is_used(state: Path) -> bool:
    """Whether an agent has left pods there, or its launcher, and none runs.

    The mount shows it, which stays as long as they do, and until an agent has ended without any; a container that has
    the directory as a volume cannot make one on the node.
    """
    return private_mount.is_there(state / "pods") and not _is_held(state / LOCK)


def _is_held(lock: Path) -> bool:
    try:
        file = os.open(lock, os.O_RDONLY | os.O_NONBLOCK | _ITSELF)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


@contextmanager
def _locked(directory: Path, mode: int) -> Iterator[None]:
    files.ensure_directory(str(directory), mode=mode)
    lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | _ITSELF, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyExists(
                f"{directory}: another agent has this directory; stop that one, or give this one directories of "
                "its own with --root and --state"
            ) from None
        yield
    finally:
        os.close(lock)
