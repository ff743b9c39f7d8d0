"""A temporary directory for agents: unlike tempfile's, its removal never enters what is still mounted in it.

tempfile changes the mode of what it cannot remove; on a procfs that an agent has left, that is the machine's own.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nodeagent import files


@contextmanager
def scratch(prefix: str, parent: str | None = None) -> Iterator[Path]:
    """Make a directory; what is mounted in it when the block ends is left, and an OSError names it."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield folder
    finally:
        files.remove_tree(str(folder))
