"""The programs with which critest loads AppArmor profiles, `sudo apparmor_parser`, for a machine that has neither."""

from __future__ import annotations

from pathlib import Path

from tests.images import DEBIAN

PACKAGE = DEBIAN / "apparmor"
SCRIPTS = {
    "sudo": 'exec "$@"',
    "apparmor_parser": f"exec {PACKAGE}/sbin/apparmor_parser --config-file /dev/null"
    f" --policy-features {PACKAGE}/usr/share/apparmor-features/features"
    f' --base {PACKAGE}/etc/apparmor.d "$@"',
}


def write_programs(folder: Path) -> None:
    """Scripts of these names: root needs no sudo, and the parser is that of an unpacked package."""
    folder.mkdir()
    for name, command in SCRIPTS.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{command}\n")
        path.chmod(0o755)
