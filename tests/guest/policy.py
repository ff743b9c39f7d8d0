"""The tests' policy of SELinux, compiled: what `selinux.sh` loads in a guest."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.guest import setup

SOURCE = Path(__file__).with_name("selinux.cil")
LOADER = Path(__file__).with_name("selinux.sh")
COMPILER = setup.folder("selinux") / "usr/bin/secilc"


def is_prepared() -> bool:
    return COMPILER.exists()


def compiled() -> Path:
    """Where it is on the host, which is the same path in a guest."""
    target = setup.folder("selinux") / "policy"
    scratch = target.with_name(f"policy-{os.getpid()}")
    libraries = ":".join(
        str(path.parent) for path in setup.folder("selinux").rglob("libsepol.so.*")
    )
    command = [str(COMPILER), "-o", str(scratch), "-f", "/dev/null", str(SOURCE)]
    subprocess.run(command, env={**os.environ, "LD_LIBRARY_PATH": libraries}, check=True)
    scratch.rename(target)
    return target
