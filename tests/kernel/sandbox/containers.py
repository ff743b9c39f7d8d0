"""Containers for tests: plans around a busybox root, and their way through `init` without a supervisor.

A container's first process is a child of the test itself, in namespaces that end with it.
"""

import array
import json
import os
import select
import shutil
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, cast

from nodeagent.linux import capabilities, syscalls
from nodeagent.linux.processes import pid_of_pidfd
from nodeagent.sandbox import rootfs_defaults
from nodeagent.sandbox.init import handshake
from nodeagent.sandbox.init import main as init
from nodeagent.sandbox.spec import ContainerPlan, ExecPlan, ProcessPlan, UserRequest
from tests.support.images import static_busybox

DEFAULT_CAPABILITIES = (
    "CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE SYS_CHROOT KILL"
    " AUDIT_WRITE"
).split()
MASKED = [
    "/proc/kcore",
    "/proc/keys",
    "/proc/timer_list",
    "/proc/acpi",
    "/sys/firmware",
    "/proc/absent",
]
READONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]

_APPLETS = (
    "cat chmod chown dd echo env false grep id kill ln ls mkdir mkfifo mknod mount ps readlink rm sh sleep stat touch"
    " true tty umount"
).split()
_NAMESPACES = (
    syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWNET
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUTS
)


def make_layer(path: Path) -> Path:
    """An image layer with busybox, a few users and nothing else."""
    for directory in ("bin", "etc", "tmp", "home/app"):
        (path / directory).mkdir(parents=True)
    shutil.copy2(static_busybox(), path / "bin" / "busybox")
    for applet in _APPLETS:
        (path / "bin" / applet).symlink_to("busybox")
    (path / "etc" / "passwd").write_text(
        "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n"
    )
    (path / "etc" / "group").write_text("root:x:0:\napp:x:1000:\nvideo:x:44:app\n")
    (path / "tmp").chmod(0o1777)
    return path


def v1_hierarchies() -> dict[str, list[str]]:
    """The cgroup mounts of this machine as `default_mounts` wants them."""
    found: dict[str, list[str]] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split()
        path = fields.split()[4]
        if kind == "cgroup2":
            found[path.removeprefix("/sys/fs/cgroup").strip("/")] = []
        elif kind == "cgroup":
            shown = [option for option in options.split(",") if option not in ("rw", "ro")]
            found[path.removeprefix("/sys/fs/cgroup/")] = shown
    return found


def user(**changes: Any) -> UserRequest:
    request = UserRequest(
        uid=None, username="", gid=None, groupname="", groups=[], merge_groups=True
    )
    return cast(UserRequest, {**request, **changes})


def process_plan(**changes: Any) -> ProcessPlan:
    mask = capabilities.mask(DEFAULT_CAPABILITIES)
    plan = ProcessPlan(
        env=["PATH=/usr/bin:/bin", "GREETING=hello"],
        cwd="/",
        user=user(),
        capabilities={
            "bounding": mask,
            "permitted": mask,
            "effective": mask,
            "inheritable": 0,
            "ambient": 0,
        },
        no_new_privs=False,
        seccomp="",
        seccomp_flags=0,
        apparmor="",
        selinux="",
        rlimits=[],
        oom_score_adj=None,
        umask=0o022,
    )
    return cast(ProcessPlan, {**plan, **changes})


def container_plan(
    directory: Path,
    layer: Path,
    argv: list[str],
    *,
    process: Mapping[str, Any] | None = None,
    **changes: Any,
) -> ContainerPlan:
    """A plan with fresh upper and work directories below `directory`."""
    for name in ("upper", "work"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    plan = ContainerPlan(
        id="0" * 64,
        argv=argv,
        process=process_plan(**(process or {})),
        rootfs={
            "lower": [str(layer)],
            "upper": str(directory / "upper"),
            "work": str(directory / "work"),
            "readonly": False,
        },
        mounts=rootfs_defaults.default_mounts(False, v1_hierarchies()),
        devices=[],
        masked_paths=MASKED,
        readonly_paths=READONLY,
        pid="container",
        pid_target="",
        cgroup_namespace=True,
        privileged=False,
        tty=False,
        stdin=False,
        stdin_once=False,
        log_path="",
    )
    return cast(ContainerPlan, {**plan, **changes})


def exec_plan(argv: list[str], *, tty: bool = False) -> ExecPlan:
    return {"container": "0" * 64, "argv": argv, "tty": tty, "timeout_ms": 0}


class Process:
    """A process on its way through `init`, seen from where the supervisor would be."""

    def __init__(
        self, pidfd: int, status: socket.socket, stdout: int, *, hidden: bool = False
    ) -> None:
        self.pidfd = pidfd
        self.status = status
        self.stdout = stdout
        self.others: list[int] = []
        self.message = self._receive()
        self.pipes = [self.others.pop(0) for _ in range(4)] if hidden and self.others else []
        self.master = self.others.pop(0) if self.others else -1

    @property
    def pid(self) -> int:
        info = Path(f"/proc/self/fdinfo/{self.pidfd}").read_text()
        return int(info.split("\nPid:")[1].split()[0])

    @property
    def ready(self) -> dict[str, Any]:
        assert "ready" in self.message, self.message
        return cast(dict[str, Any], self.message["ready"])

    def _receive(self) -> dict[str, Any]:
        data, ancillary, _, _ = self.status.recvmsg(65536, socket.CMSG_SPACE(5 * 4))
        for _, _, rights in ancillary:
            self.others = array.array("i", rights).tolist()
        return cast(dict[str, Any], json.loads(data)) if data else {}

    def go(self) -> str:
        """Let the program run; returns what `init` says then, nothing when all is well."""
        if self.pipes:
            os.write(self.pipes[0], b"g")
            return os.read(self.pipes[2], 65536).decode()
        with suppress(BrokenPipeError):
            self.status.send(b"g")
        return self.status.recv(65536).decode()

    def follow(self) -> None:
        """Be the successor of a hidden process from now on."""
        _, hold, _, born = self.pipes
        assert os.read(born, 1) == handshake.BORN
        pid = pid_of_pidfd(self.pid, handshake.SUCCESSOR_PIDFD)
        pidfd = os.pidfd_open(pid)
        os.close(hold)
        self.pipes.remove(hold)
        self.pipes.insert(1, -1)
        os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        os.close(self.pidfd)
        self.pidfd = pidfd

    def output(self) -> str:
        """All that it writes until it ends."""
        chunks = []
        with suppress(OSError):  # a terminal whose last slave is closed answers EIO
            while chunk := os.read(self.stdout if self.master == -1 else self.master, 65536):
                chunks.append(chunk)
        return b"".join(chunks).decode(errors="replace")

    def wait(self, timeout: float = 60) -> int:
        """Its exit code, or the negative number of the signal that ended it."""
        if not select.select([self.pidfd], [], [], timeout)[0]:
            raise TimeoutError("the process does not end")
        result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOWAIT)
        assert result is not None
        return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status

    def close(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        self.status.close()
        for descriptor in (self.pidfd, self.stdout, self.master, *self.pipes):
            if descriptor != -1:
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start(plan: ContainerPlan, *, stdin: int = -1, pod: Mapping[int, int] | None = None) -> Process:
    """A container up to its report. pod: namespaces by CLONE_NEW…, among them a user namespace that owns the others."""
    joined = {kind: fd for kind, fd in (pod or {}).items() if kind != syscalls.CLONE_NEWUSER}
    userns = (pod or {}).get(syscalls.CLONE_NEWUSER, -1)

    def child(status: int, stdout: int) -> None:
        for kind, descriptor in joined.items():
            syscalls.setns(descriptor, kind)
        init.run(plan, init.InitFds(status, stdin, stdout, stdout, userns=userns))

    return _clone(child, _NAMESPACES & ~sum(joined))


def start_exec(
    container: Process,
    plan: ExecPlan,
    settings: ProcessPlan,
    *,
    userns: int = -1,
    hidden: bool = False,
) -> Process:
    """A further process in a running container, born in its PID namespace if not hidden."""

    def child(status: int, stdout: int) -> None:
        fds = init.ExecFds(
            status, container.pidfd, -1, stdout, stdout, userns=userns, hidden=hidden
        )
        init.run_exec(plan, settings, fds)

    if hidden:
        return _clone(child, 0, hidden=True)

    own = os.open("/proc/self/ns/pid", os.O_RDONLY)
    syscalls.setns(container.pidfd, syscalls.CLONE_NEWPID)
    try:
        return _clone(child, 0)
    finally:
        syscalls.setns(own, syscalls.CLONE_NEWPID)
        os.close(own)


def _clone(child: Callable[[int, int], None], namespaces: int, *, hidden: bool = False) -> Process:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reader, writer = os.pipe()
    pid, pidfd = syscalls.clone3(namespaces)
    if pid == 0:
        child(theirs.fileno(), writer)
        os._exit(99)
    theirs.close()
    os.close(writer)
    return Process(pidfd, ours, reader, hidden=hidden)


def run(plan: ContainerPlan, **options: Any) -> tuple[int, str]:
    """Exit code and output of a container that shall start."""
    with start(plan, **options) as process:
        assert process.ready
        assert process.go() == ""
        output = process.output()
        return process.wait(), output
