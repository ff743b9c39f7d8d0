"""Executing a container's program: the environment, the search for it, the seccomp filter, and what went wrong."""

import errno
import os
from base64 import b64decode
from typing import NoReturn

from nodeagent.linux import seccomp
from nodeagent.sandbox.spec import ProcessPlan

_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class StartError(Exception):
    """The program cannot be executed; the text names it."""


def execute(argv: list[str], plan: ProcessPlan, home: str) -> NoReturn:
    """Filter all further system calls and run the program; raises `StartError` where it cannot be.

    From the filter on, nothing is called that a program does not need to be executed at all.
    """
    environment = {"HOME": home} | _environment(plan["env"])
    candidates = _candidates(argv[0], environment.get("PATH") or _DEFAULT_PATH)
    if plan["seccomp"]:
        seccomp.install(b64decode(plan["seccomp"]), plan["seccomp_flags"])
    raise StartError(f'exec "{argv[0]}": {_execute_first(candidates, argv, environment)}')


def _environment(entries: list[str]) -> dict[str, str]:
    """The last of several values for a name holds; what has no name is left out."""
    pairs = (entry.partition("=") for entry in entries)
    return {name: value for name, _, value in pairs if name}


def _candidates(name: str, search_path: str) -> list[str]:
    """The paths to try, as execvp(3) does: an empty directory is the current one."""
    if "/" in name:
        return [name]
    return [os.path.join(directory or ".", name) for directory in search_path.split(":")]


def _execute_first(candidates: list[str], argv: list[str], environment: dict[str, str]) -> str:
    """Execute the first that can be; returns only with the reason why none could."""
    reason = "executable file not found in $PATH"
    for candidate in candidates:
        try:
            os.execve(candidate, argv, environment)
        except OSError as error:
            absent = error.errno in (errno.ENOENT, errno.ENOTDIR)
            if not absent or candidate == argv[0]:
                reason = os.strerror(error.errno or 0).lower()
            if not absent and error.errno != errno.EACCES:
                break
    return reason
