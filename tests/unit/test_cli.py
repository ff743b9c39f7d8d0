"""The command line: what it prints, and how it says what is wrong."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent import cli, config_file, config_reference

NO_PROFILE = '{"defaultAction": "SCMP_ACT_NONSENSE"}'


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    """The command line narrows that of its process, which is the one of all tests here."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line on stderr of a command that fails."""
    assert cli.main(list(arguments)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_the_defaults_are_printed_where_the_configuration_is_broken(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "config.toml"
    path.write_text("colour = 3")
    assert cli.main(["config", "--defaults", "--config", str(path)]) == 0
    assert capsys.readouterr().out == config_reference.commented_defaults()


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(tmp_path / "absent.toml")
    assert said(capsys, "config", "--config", path) == (
        f"nodeagent: {path}: No such file or directory\n"
    )


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.EADDRINUSE, "Address already in use"), "Address already in use"),
        (OSError("connection lost"), "connection lost"),
        (OSError(errno.EXDEV, "Invalid link", "/a", None, b"/b"), "/a: /b: Invalid link"),
        (OSError(errno.ENOENT, "No such file", Path("/a")), "/a: No such file"),
    ],
)
def test_an_error_of_the_system_is_told_without_its_number(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: OSError,
    text: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(config_file, "load", fail)
    assert said(capsys, "config") == f"nodeagent: {text}\n"


@pytest.mark.parametrize(("uid", "remedy"), [(1000, "; nodeagent has to run as root"), (0, "")])
def test_who_is_not_root_is_told_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, uid: int, remedy: str
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/var/lib/nodeagent")

    monkeypatch.setattr(config_file, "load", fail)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert said(capsys, "config") == f"nodeagent: /var/lib/nodeagent: Permission denied{remedy}\n"


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "no such file"), (NO_PROFILE, "SCMP_ACT_NONSENSE")]
)
def test_no_agent_starts_with_a_default_seccomp_profile_that_is_none(
    tmp_path: Path, content: str | None, problem: str
) -> None:
    profile = tmp_path / "profile.json"
    if content is not None:
        profile.write_text(content)
    settings = tmp_path / "config.toml"
    # An agent that came as far as its network would be refused there: nothing of it would be left either.
    settings.write_text(f'[seccomp]\ndefault_profile = "{profile}"\n[network]\nsubnet4 = ""\n')
    command = [sys.executable, "-m", "nodeagent", "serve", "--config", str(settings)]
    for place in ("root", "state"):
        command += [f"--{place}", str(tmp_path / place)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f'nodeagent: seccomp.default_profile: seccomp profile "{profile}": ')
    assert problem in line
    assert not (tmp_path / "root").exists()
