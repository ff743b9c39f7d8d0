"""Numbers about the images of this node."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class FsUsage:
    """The space that images take. mountpoint: a directory on their file system."""

    mountpoint: str
    used_bytes: int
    inodes_used: int


@dataclass(slots=True)
class Counters:
    """Counts since the agent's start. pulls: ended ones, by "success" and "failure"; skipped: of present layers."""

    pulls: Counter[str] = field(default_factory=Counter)
    pulls_in_progress: int = 0
    fetched_bytes: int = 0
    skipped_bytes: int = 0
    layers_fetched: int = 0
    layers_skipped: int = 0
