"""From what was asked to what a supervisor executes: the plan of a container. Pure but for the seccomp cache.

The plan is complete: nothing in it is looked up again, so that it can be printed, stored and tested without root.
"""

import base64
from dataclasses import dataclass
from pathlib import Path

from nodeagent.cgroups.manager import CgroupMount
from nodeagent.config import Rlimits
from nodeagent.errors import InvalidArgument
from nodeagent.lifecycle import podfiles, process
from nodeagent.lifecycle.slots import id_map
from nodeagent.records import ContainerConfig, Image, MountConfig, Profile, Sandbox
from nodeagent.sandbox import rootfs, seccomp_profile
from nodeagent.sandbox.spec import (
    ContainerPlan,
    Mount,
    ProcessPlan,
    Rlimit,
    Rootfs,
)
