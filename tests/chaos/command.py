"""The frame of commands that play one trial after another: a directory, a registry, and a look at what is left."""

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from tests.support import leaks
from tests.support.images import Image
from tests.support.registry import Registry, running_registry


class Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


def play(
    what: str,
    trials: Iterable[T],
    wanted: Sequence[str],
    pushed: Sequence[Image],
    is_wrong: Callable[[T, Path, Registry], bool],
) -> int:
    """Play those whose names have one of the wanted parts, or all; print what is left. Returns the exit status.

    what: the trials, for the verdict and for the directory, which stays where something is left. is_wrong: plays one.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"na-chaos-{what}-"))
    os.environ[leaks.VARIABLE] = folder.name
    machine = leaks.Machine(folder.name, folder)
    failed = 0
    with running_registry(folder / "registry") as registry:
        for image in pushed:
            registry.push(image)
        for number, trial in enumerate(trials):
            if not wanted or any(part in trial.name for part in wanted):
                failed += is_wrong(trial, folder / str(number), registry)
    left = machine.left()
    print(*(f"left on the machine: {each}" for each in left), sep="\n")
    print(f"{failed} {what} are not as they must be" if failed or left else "all as it must be")
    if not left:
        subprocess.run(["rm", "-rf", "--one-file-system", str(folder)], check=True)
    return 1 if failed or left else 0
