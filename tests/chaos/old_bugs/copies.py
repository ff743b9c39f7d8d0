"""Copies of the package with texts replaced, for processes that are started from them."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import nodeagent
import tests
from tests.chaos.old_bugs.bugs import Change

_PACKAGE = Path(nodeagent.__file__).parent
_TESTS = Path(tests.__path__[0])


def copy_with(changes: Iterable[Change], folder: Path) -> Path:
    """A new directory of a copy with these changes, and of the tests, for PYTHONPATH."""
    # With what Python has compiled: that of a file which is changed has another time, and is compiled again.
    shutil.copytree(_PACKAGE, folder / "nodeagent")
    (folder / "tests").symlink_to(_TESTS)
    for change in changes:
        path = folder / "nodeagent" / change.file
        source = path.read_text()
        count = source.count(change.text)
        assert count == 1, f"{change.file} has {count} of the text that is replaced:\n{change.text}"
        path.write_text(source.replace(change.text, change.instead))
    return folder
