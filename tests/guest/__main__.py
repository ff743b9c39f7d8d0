"""Runs a command as root on a throw-away machine with another kernel and cgroup v2.

    python -m tests.guest --setup [KERNEL...] [selinux]
    python -m tests.guest [options] DIRECTORY -- COMMAND...

The machine's root is the host's, read-only below an overlay; DIRECTORY is the host's own, read-write, at the same
path; /tmp and /var/tmp are a fresh ext4. Nothing of the host's cgroups or network is touched. The exit status is the
command's (128 + n for a signal), 124 after the timeout, 125 when the machine died.
"""

import argparse
import re
import signal
import sys
from pathlib import Path

from tests.guest import machine, setup


def main() -> int:
    options = _parser().parse_args()
    if options.setup is not None:
        for name in options.setup or ["uml"]:
            if name == "selinux":
                setup.prepare_policy_compiler()
            else:
                setup.prepare(name)
        return 0
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    directory = Path(options.directory or "").resolve()
    if not command or not directory.is_dir() or re.search(r"[\s,\"']", str(directory)):
        sys.exit(
            "DIRECTORY -- COMMAND... wanted; no blanks, commas or quotes in the directory's name"
        )
    guest = machine.Guest(
        kernel=options.kernel,
        init=options.init,
        security=options.security,
        memory_mib=options.memory,
        cpus=options.cpus,
        timeout_seconds=options.timeout,
        disk=options.disk,
        verbose=options.verbose,
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    environment = dict(pair.split("=", 1) for pair in options.env)
    return machine.run(guest, command, directory, environment)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="guest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setup", nargs="*", metavar="KERNEL", help="unpack what is needed")
    parser.add_argument(
        "--kernel",
        choices=setup.KERNELS,
        default="uml",
        help="uml: user-mode Linux of sid, the quickest; uml-trixie: of trixie, has iptables; "
        "qemu: bookworm-backports under emulation, has everything",
    )
    parser.add_argument("--init", choices=("none", "systemd"), default="none")
    parser.add_argument(
        "--security",
        choices=("apparmor", "selinux"),
        default="apparmor",
        help="selinux has no policy: selinux.sh loads one, and runs a command",
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds")
    parser.add_argument("--memory", type=int, default=2048, help="MiB")
    parser.add_argument("--cpus", type=int, default=1, help="of qemu")
    parser.add_argument("--disk", type=Path, metavar="FILE", help="an ext4 to use and to keep")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the console")
    parser.add_argument("directory", nargs="?")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    return parser


if __name__ == "__main__":
    sys.exit(main())
