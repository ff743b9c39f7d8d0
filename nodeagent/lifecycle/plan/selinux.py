"""SELinux labels of containers: the parts that a request gives, and the node's policy for what it leaves out.

A process has a label, and so have the files that it may use: the type that the policy has for containers' files, with
the level of the process. A container that asks for no label gets none. On a node without SELinux a label has no effect:
charts carry their options to every node, so that they are ignored there, which is logged once.
"""

import logging
import re
from pathlib import Path
from typing import NamedTuple

from nodeagent.errors import FailedPrecondition, InvalidArgument
from nodeagent.requests import SELinux

log = logging.getLogger(__name__)

ENFORCE = Path("/sys/fs/selinux/enforce")
# container-selinux installs its labels in a file of its own, which the other runtimes read first as well.
CONTAINERS = Path("/usr/share/containers/selinux/contexts")
POLICIES = Path("/etc/selinux")

# The characters that policies use. A quote, for example, would end the label among the options of a mount.
_LABEL = re.compile(r"[\w.-]+:[\w.-]+:[\w.-]+(:[\w.,:-]+)?", re.ASCII)
_SETTING = re.compile(r'\s*(\w+)\s*=\s*"?([^"\s]*)"?\s*')


class Labels(NamedTuple):
    """Labels of a container. process: of what it executes; files: of what it may read and write. "" is none."""

    process: str
    files: str


NO_LABELS = Labels("", "")


class Policy:
    """The SELinux policy of this node."""

    def __init__(self) -> None:
        self._has_said_so = False

    def labels(self, asked: SELinux) -> Labels:
        """The labels of a container; NO_LABELS where the kernel has no SELinux.

        Raises InvalidArgument for a malformed label, and FailedPrecondition where the policy lacks a default.

        user, role, type and level that the request leaves out are those of the policy's label of containers; no
        categories are drawn. A policy without a label of containers' files gives them none: a request that names all
        parts does not need one.
        """
        if not ENFORCE.exists():
            if not self._has_said_so:
                self._has_said_so = True
                log.info(
                    "this kernel has no SELinux: selinux_options of all containers are ignored"
                )
            return NO_LABELS
        path, contexts = _contexts()
        parts = [asked.user, asked.role, asked.type, asked.level]
        if not all(parts):
            usual = _usual(path, contexts.get("process", ""))
            parts = [given or default for given, default in zip(parts, usual, strict=True)]
        process = _label(parts)
        if not _LABEL.fullmatch(process):
            raise InvalidArgument(
                f'selinux_options: "{process}" is not an SELinux label; a part consists of letters, digits, dots, '
                "hyphens and underscores, a level also of commas and colons"
            )
        return Labels(process, _files(asked.user, parts[3], contexts.get("file", "")))


def _usual(path: Path, label: str) -> list[str]:
    """The policy's user, role, type and level of a container's process; level is "" without MLS."""
    parts = label.split(":", 3)
    if len(parts) < 3 or not all(parts):
        raise FailedPrecondition(
            f'selinux_options: incomplete, and {path} has no label of containers ("{label}") to complete it from; '
            "install the policy of containers (container-selinux), or set user, role, type and level"
        )
    return [*parts, ""][:4]


def _files(user: str, level: str, label: str) -> str:
    """The policy's label of containers' files, with the user that is asked for, and the level of the process."""
    parts = label.split(":", 3)
    if len(parts) < 3:
        return ""
    return _label([user or parts[0], parts[1], parts[2], level])


def _label(parts: list[str]) -> str:
    return ":".join(part for part in parts if part)


def _contexts() -> tuple[Path, dict[str, str]]:
    """The policy's labels for containers, by their names, and the file that they are, or should be, in."""
    contexts = _settings(CONTAINERS)
    if contexts:
        return CONTAINERS, contexts
    policy = _settings(POLICIES / "config").get("SELINUXTYPE", "targeted")
    path = POLICIES / policy / "contexts/lxc_contexts"
    return path, _settings(path)


def _settings(path: Path) -> dict[str, str]:
    """The settings ``name = "value"`` of a file, one on a line; empty where it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {match[1]: match[2] for line in lines if (match := _SETTING.fullmatch(line))}
