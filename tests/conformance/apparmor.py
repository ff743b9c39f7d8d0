"""The programs that load AppArmor profiles, sudo (critest calls it) and apparmor_parser, where there are none."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.images import DEBIAN

PACKAGE = DEBIAN / "apparmor"
SCRIPTS = {
    "sudo": 'exec "$@"',
    "apparmor_parser": f"exec {PACKAGE}/sbin/apparmor_parser --config-file /dev/null"
    f" --policy-features {PACKAGE}/usr/share/apparmor-features/features"
    f' --base {PACKAGE}/etc/apparmor.d "$@"',
}


def put_in_path(folder: Path) -> None:
    """Scripts of these names, for all that is run from now on. The parser is that of an unpacked package."""
    folder.mkdir()
    for name, command in SCRIPTS.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{command}\n")
        path.chmod(0o755)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
