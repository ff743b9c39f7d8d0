"""The seed by which a run of the tests chooses, of all that the harnesses can do, the part that it plays."""

import os
import subprocess
import zlib

from tests.support import images

VARIABLE = "CHAOS_SEED"


def of_this_run() -> int:
    """That of the environment, else one of the commit: a commit plays the same again, the next one another part."""
    given = os.environ.get(VARIABLE)
    return int(given) if given else zlib.crc32(_git("rev-parse", "HEAD").encode())


def commit() -> str:
    """The commit that is tested, with a mark if the tree differs from it; "unknown" without its repository."""
    return _git("describe", "--always", "--dirty") or "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-c", "safe.directory=*", "-C", str(images.PROJECT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
