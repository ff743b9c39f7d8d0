"""A hierarchy that another mount covers, in a mount namespace of the test's own."""

import subprocess
import sys

PROGRAM = """
import os

from nodeagent.cgroups.manager import Cgroups
from nodeagent.linux import syscalls

def check(what, found):
    assert found, what

syscalls.unshare(syscalls.CLONE_NEWNS)
syscalls.mount("", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)

def opened():
    return Cgroups.open(driver="cgroupfs", default_parent="/covered")

cgroups = opened()
own = cgroups._layout.hierarchies[0].mount
check("at first", not cgroups.covered())
for target in (own, "/sys/fs", "/sys"):
    syscalls.mount("cover", target, "tmpfs", 0)
    check(target, cgroups.covered() == own)
    syscalls.umount2(target, 0)
    check(f"{target} again", not cgroups.covered())

syscalls.mount(own, own, "", syscalls.MS_BIND)
check("a copy of the whole", not cgroups.covered() and not opened().covered())
syscalls.umount2(own, 0)

# A part of the same hierarchy, as a container has it, seen by an agent that is started then.
group = own
for name in sorted(os.listdir(own)):
    if os.path.isdir(f"{own}/{name}"):
        group = f"{own}/{name}"
        break
if group != own:
    syscalls.mount(group, own, "", syscalls.MS_BIND)
    check("a part", cgroups.covered() == own)
    later = opened()
    check("a part, from the start", later.covered() == own)
    syscalls.umount2(own, 0)
    check("a part, again", not cgroups.covered())
    check("a part, from the start, again", not later.covered())
"""


def test_a_hierarchy_that_is_covered() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
