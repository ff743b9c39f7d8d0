"""Code of other releases: earlier ones of the clone's history, and later ones, which are the present one, changed."""

import shutil
import subprocess
import tarfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import IN_CI, PROJECT


@dataclass(frozen=True, slots=True)
class Earlier:
    """A table of ``earlier.toml``, which explains them."""

    name: str
    commit: str
    default_places: bool
    back: bool
    marks_late: bool = False
    refused: str = ""

    def unpack(self, directory: Path) -> Path:
        """Its package, in a new directory. A clone without the commit skips the test; in CI it fails it."""
        git = ["git", "-c", "safe.directory=*", "-C", str(PROJECT)]
        archive = directory.with_suffix(".tar")
        command = [*git, "archive", f"--output={archive}", self.commit, "nodeagent"]
        try:
            made = subprocess.run(command, capture_output=True, text=True, check=False)
            reason = made.stderr.strip() if made.returncode else ""
        except OSError as error:
            reason = f"git: {error.strerror}"
        if reason:
            message = f"commit {self.commit} is not in this clone: {reason}"
            pytest.fail(message) if IN_CI else pytest.skip(message)
        with tarfile.open(archive) as tar:
            tar.extractall(directory, filter="data")
        archive.unlink()
        return directory


def earlier() -> list[Earlier]:
    with (PROJECT / "tests/upgrade/earlier.toml").open("rb") as file:
        return [Earlier(name, **fields) for name, fields in tomllib.load(file).items()]


def later(directory: Path, **changes: tuple[str, str, str]) -> Path:
    """A copy of the present package. changes: a file below it, a text that is once in it, and what it becomes."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PROJECT / "nodeagent", directory / "nodeagent", ignore=ignored)
    for name, before, after in changes.values():
        path = directory / "nodeagent" / name
        text = path.read_text()
        assert text.count(before) == 1, f"{name}: {before!r}"
        path.write_text(text.replace(before, after))
    return directory
