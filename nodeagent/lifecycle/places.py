"""Where an agent keeps what it has, and what tells it from other agents on the machine."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from nodeagent import files
from nodeagent.config import Config
from nodeagent.errors import AlreadyExists

PRIVATE = 0o700

# Whoever was given the CRI's socket, which is there by default, must be able to get to it.
STATE = 0o711


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """instance: eight hex digits of the root directory, in the names of links, nft tables and cgroups."""

    instance: str
    root: Path
    state: Path

    @classmethod
    def of(cls, config: Config) -> Self:
        root = Path(config.root).resolve()
        instance = hashlib.sha256(str(root).encode()).hexdigest()[:8]
        return cls(instance=instance, root=root, state=Path(config.state).resolve())

    @property
    def database(self) -> Path:
        return self.root / "state.db"

    @property
    def containers(self) -> Path:
        return self.root / "containers"

    @property
    def trash(self) -> Path:
        return self.root / "trash"

    @property
    def pods(self) -> Path:
        return self.state / "pods"

    def make(self) -> None:
        """Make what is missing, and take from the rest what an earlier version let others do."""
        for directory in (self.root, self.containers, self.trash, self.pods):
            files.ensure_directory(str(directory), mode=PRIVATE)
            files.narrow(str(directory), PRIVATE)
        files.narrow(str(self.state), STATE)
        for inner in (self.root / "blobs", *self.containers.iterdir(), *self.pods.iterdir()):
            files.narrow(str(inner), PRIVATE)
        for plan in self.containers.glob("*/plan.json"):
            files.narrow(str(plan), 0o600)

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the locks of both directories: two agents on one would undo each other's work."""
        with _locked(self.root, PRIVATE), _locked(self.state, STATE):
            yield


@contextmanager
def _locked(directory: Path, mode: int) -> Iterator[None]:
    files.ensure_directory(str(directory), mode=mode)
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
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
