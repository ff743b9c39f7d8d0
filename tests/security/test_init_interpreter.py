"""CVE-2019-5736: a container that gets the executable of the process that becomes it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nodeagent.sandbox import rootfs_defaults
from nodeagent.sandbox.agent import interpreter
from nodeagent.sandbox.spec import ContainerPlan, Mount
from tests.kernel.sandbox.conftest import Plan
from tests.kernel.sandbox.containers import v1_hierarchies

PROJECT = Path(__file__).parents[2]

# What a supervisor does, as the program of an interpreter of its own.
SUPERVISOR = f"""
import json, sys
sys.path.insert(0, {str(PROJECT)!r})
from tests.kernel.sandbox.containers import run
print(run(json.load(sys.stdin))[1], end="")
"""

# Keep the executable open, make way for a write by executing something else, and write.
ATTACK = """
import os
print(os.readlink("/proc/self/exe"), flush=True)
os.set_inheritable(os.open("/proc/self/exe", os.O_RDONLY), True)
write = "for fd in /proc/self/fd/*; do echo overwritten > $fd; done; echo tried"
os.execv("/bin/sh", ["sh", "-c", write])
"""


def runtime_of_python() -> list[Mount]:
    """What an image would have to bring for the node's interpreter to run in it."""
    places = {sys.base_prefix, "/lib", "/lib64", "/usr/lib"}
    return [
        rootfs_defaults.bind(place, place, "ro")
        for place in sorted(places)
        if os.path.exists(place)
    ]


@pytest.fixture
def node_python(tmp_path: Path) -> Path:
    """The interpreter that the attack is after; not the machine's own."""
    return Path(shutil.copy2(os.path.realpath(sys.executable), tmp_path / "python"))


def attack(python: Path, made: ContainerPlan) -> list[str]:
    """What a container prints that is started by a sealed copy of `python`."""
    sealed = interpreter.sealed_copy(str(python))
    try:
        done = subprocess.run(
            [os.path.realpath(sys.executable), "-c", SUPERVISOR],
            executable=f"/proc/self/fd/{sealed}",
            pass_fds=[sealed],
            input=json.dumps(made),
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    finally:
        os.close(sealed)
    return done.stdout.splitlines()


@pytest.mark.parametrize("entrypoint", ["link", "interpreter of a script"])
def test_the_nodes_interpreter_is_out_of_reach(
    plan: Plan, tmp_path: Path, node_python: Path, entrypoint: str
) -> None:
    upper = tmp_path / "container" / "upper"
    upper.mkdir(parents=True)
    (upper / "attack.py").write_text(f"#!/proc/self/exe\n{ATTACK}")
    (upper / "attack.py").chmod(0o755)
    argv = ["/attack.py"] if entrypoint.startswith("int") else ["/proc/self/exe", "/attack.py"]
    mounts = [*rootfs_defaults.default_mounts(False, v1_hierarchies()), *runtime_of_python()]
    before = node_python.read_bytes()
    output = attack(
        node_python, plan(argv, mounts=mounts, process={"env": [f"PYTHONHOME={sys.base_prefix}"]})
    )
    assert output[0].startswith("/memfd:")
    assert output[-1] == "tried"
    assert node_python.read_bytes() == before
