"""SELinux labels of containers' processes: what a request says, and the node's policy for what it leaves out.

Volumes and images are not labelled here. On a node without SELinux there is nothing that a label could do: charts carry
their options to every node, so that they are passed over there, which the log says once.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

from nodeagent.errors import FailedPrecondition
from nodeagent.records import SELinux

log = logging.getLogger(__name__)

ENFORCE = Path("/sys/fs/selinux/enforce")
POLICIES = Path("/etc/selinux")

_POLICY = re.compile(r"\s*SELINUXTYPE\s*=\s*(\w[\w.-]*)\s*")
_PROCESS = re.compile(r'\s*process\s*=\s*"?([^"\s]+)"?\s*')


class Labels:
    """Of this node."""

    def __init__(self) -> None:
        self._has_said_so = False

    def process(self, asked: SELinux) -> str:
        """The label; "" where the kernel has no SELinux. Raises FailedPrecondition where the policy lacks a default.

        user, role, type and level that are not asked for are those of the policy's label of containers.
        """
        if not ENFORCE.exists():
            if not self._has_said_so:
                self._has_said_so = True
                log.info(
                    "this kernel has no SELinux: selinux_options are passed over, of all containers"
                )
            return ""
        parts = [asked.user, asked.role, asked.type, asked.level]
        if not all(parts):
            parts = [given or usual for given, usual in zip(parts, _usual(), strict=True)]
        return ":".join(part for part in parts if part)


def _usual() -> list[str]:
    """user, role, type and level of a container's process, as the policy has them; level is "" without MLS."""
    policy = next(_matches(POLICIES / "config", _POLICY), "targeted")
    path = POLICIES / policy / "contexts/lxc_contexts"
    label = next(_matches(path, _PROCESS), "")
    parts = label.split(":", 3)
    if len(parts) < 3 or not all(parts):
        raise FailedPrecondition(
            f'selinux_options: a part is left out, and {path} has no label of containers ("{label}") to take it from; '
            "install the policy of containers (container-selinux), or give user, role, type and level"
        )
    return [*parts, ""][:4]


def _matches(path: Path, pattern: re.Pattern[str]) -> Iterator[str]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        if match := pattern.fullmatch(line):
            yield match[1]
