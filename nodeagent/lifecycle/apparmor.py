"""AppArmor: the default profile of containers, and whether a profile is loaded.

The profile is compiled and loaded by AppArmor's own parser, once, when the agent starts; where the kernel has AppArmor
but the node no parser, containers without a profile of their own run unconfined, and the agent says so.
"""

import logging
import subprocess
from pathlib import Path

log = logging.getLogger(__name__)

NAME = "nodeagent-default"
ENABLED = Path("/sys/module/apparmor/parameters/enabled")
PROFILES = Path("/sys/kernel/security/apparmor/profiles")
PARSER = "apparmor_parser"
PARSER_SECONDS = 30

# Everything that a container does in its own namespaces, and nothing of what lies below the node's /proc and /sys.
DEFAULT = f"""
#include <tunables/global>

profile {NAME} flags=(attach_disconnected,mediate_deleted) {{
  #include <abstractions/base>

  network,
  capability,
  file,
  umount,
  signal (receive) peer=unconfined,
  signal (send, receive) peer={NAME},
  ptrace (trace, read, tracedby, readby) peer={NAME},

  deny mount,

  # of the node's kernel, which a namespace does not hide
  deny @{{PROC}}/{{kcore,kmem,mem,sysrq-trigger}} rwklx,
  deny @{{PROC}}/{{acpi,asound,bus,fs,irq,scsi}}/** wklx,
  deny @{{PROC}}/sys/{{abi,crypto,debug,dev,fs,vm}}/** wklx,
  deny @{{PROC}}/sys/kernel/{{core,kexec,kptr,modprobe,modules,panic,perf}}* wklx,
  deny @{{PROC}}/sys/kernel/{{poweroff,printk,randomize,sysrq,unprivileged}}* wklx,
  deny @{{PROC}}/sys/kernel/{{keys,random,seccomp,yama}}/** wklx,
  deny /sys/{{block,bus,class,dev,devices,hypervisor,kernel,module,power}}/** wklx,
  deny /sys/fs/{{bpf,btrfs,ext4,f2fs,fuse,pstore,selinux,smackfs,xfs}}/** wklx,
  deny /sys/{{firmware,devices/virtual/powercap,kernel/security}}/** rwklx,
}}
"""


def is_enabled() -> bool:
    try:
        return ENABLED.read_text().startswith("Y")
    except OSError:
        return False


def is_loaded(name: str) -> bool:
    try:
        return any(line.startswith(f"{name} (") for line in PROFILES.read_text().splitlines())
    except OSError:
        return False


def load_default() -> None:
    """Load the default profile, or say why there is none. Takes a part of a second; for the start of the agent."""
    if not is_enabled():
        return
    try:
        subprocess.run(
            [PARSER, "-Kr"],
            input=DEFAULT,
            text=True,
            capture_output=True,
            timeout=PARSER_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        text = getattr(error, "stderr", "") or error
        log.warning("AppArmor: no default profile, containers run unconfined by it: %s", text)
