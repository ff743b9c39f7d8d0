"""Executing a container's program: the environment, the search for it, and what went wrong."""

import errno
import os
from typing import NamedTuple, NoReturn

from nodeagent.errors import StartError
from nodeagent.sandbox.spec import DEFAULT_PATH


class Program(NamedTuple):
    """All that execve(2) needs, worked out before a filter is in force. candidates: the paths to try."""

    argv: list[str]
    candidates: list[str]
    environment: dict[str, str]


def find(argv: list[str], env: list[str], home: str) -> Program:
    """Work out what to execute. env: entries as ``NAME=value``; home: HOME where they have none."""
    environment = {"HOME": home} | _environment(env)
    return Program(argv, _candidates(argv[0], environment.get("PATH") or DEFAULT_PATH), environment)


def execute(program: Program) -> NoReturn:
    """Become the program. Raises StartError, which names it, where it cannot be executed.

    Makes no system call but execve(2): a filter may forbid every other one.
    """
    reason = _execute_first(program.candidates, program.argv, program.environment)
    raise StartError(f'exec "{program.argv[0]}": {reason}')


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
            # execvp(3) also goes on after EACCES, and reports it when no other candidate can be executed.
            if not absent and error.errno != errno.EACCES:
                break
    return reason
