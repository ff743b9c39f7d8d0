"""The rehearsal: the life of a pod, run by the launcher in its own process before it forks the first supervisor.

CPython writes what it learns by running code into its objects: specialised instructions, versions of types and of
dictionaries. Every supervisor would learn the same, each on its own copies of the same pages; after a rehearsal they
share what was learned. It runs the real code, with a socket, a container and files in a directory of its own, but
without namespaces for the pod, and its program does not exist. `docs/design.md` has what it saves.
"""

import signal
import socket
from collections.abc import Iterable

from nodeagent import files
from nodeagent.errors import StartError
from nodeagent.sandbox import paths, protocol, rootfs_defaults
from nodeagent.sandbox.paths import SUPERVISOR_SOCKET
from nodeagent.sandbox.protocol import Body
from nodeagent.sandbox.runtime.launcher_link import LauncherLink
from nodeagent.sandbox.runtime.loop import Loop
from nodeagent.sandbox.runtime.peers import Peer
from nodeagent.sandbox.spec import ContainerPlan, PodPlan, PodSettings
from nodeagent.sandbox.supervisor import main as supervisor

_POD, _CONTAINER, _PROGRAM = "rehearsal", "main", "/absent"

# An instruction is specialised when it runs for the second time.
_ROUNDS = 2
_PATIENCE_MS = 10_000


def rehearse(directory: str) -> None:
    """Rehearse. Nothing is left in the file system; descriptors are closed with the objects, at the next collection.

    Raises whatever keeps a container from being made here, or TimeoutError.
    """
    try:
        for _ in range(_ROUNDS):
            _clear(directory)
            _play(directory)
    finally:
        signal.set_wakeup_fd(-1)
        _clear(directory)


def _clear(directory: str) -> None:
    paths.unpin(directory)
    files.remove_tree(directory)


def _play(directory: str) -> None:
    for name in ("layer", "upper", "work"):
        files.ensure_directory(f"{directory}/{name}", 0o700)
    loop = Loop()
    launcher, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    plan = PodPlan(id=_POD, directory=directory, namespaces=[])
    link = LauncherLink(loop, _POD, directory, ours)
    kept = Peer(loop, launcher, _acknowledge, lambda _peer: None)
    pod = supervisor.Supervisor(supervisor.prepare(plan), loop, link, {}).pod
    agent = _Agent(loop, f"{directory}/{SUPERVISOR_SOCKET}", _requests(directory))

    def give_up() -> None:
        agent.failure = TimeoutError(f"not over after {_PATIENCE_MS} ms")
        pod.children.kill()
        loop.stop()

    loop.call_after(_PATIENCE_MS, give_up)
    loop.run()
    agent.close()
    kept.close()
    if agent.failure is not None:
        raise agent.failure


def _acknowledge(launcher: Peer, message: protocol.Message) -> None:
    """Answer as a launcher that keeps nothing of this pod."""
    protocol.close_all(message.fds)
    if message.body["op"] == "drop":
        launcher.send({"dropped": message.body["number"]})


def _requests(directory: str) -> list[Body]:
    settings = PodSettings(hostname=None, sysctls={}, shm_bytes=None, pid="container")
    return [
        {"op": "hello", **protocol.spoken()},
        {"op": "namespaces"},
        {"op": "configure", "settings": settings},
        {"op": "create", "plan": _container(directory)},
        {"op": "start", "container": _CONTAINER},
        {"op": "state"},
        {"op": "stop", "container": _CONTAINER, "signal": signal.SIGTERM, "timeout_ms": 0},
        {"op": "remove", "container": _CONTAINER},
        {"op": "shutdown"},
    ]


def _container(directory: str) -> ContainerPlan:
    return {
        "id": _CONTAINER,
        "argv": [_PROGRAM],
        "process": {
            "env": [],
            "cwd": "/",
            "user": {
                "uid": None,
                "username": "",
                "gid": None,
                "groupname": "",
                "groups": [],
                "merge_groups": True,
            },
            "capabilities": {
                "bounding": 0,
                "permitted": 0,
                "effective": 0,
                "inheritable": 0,
                "ambient": 0,
            },
            "no_new_privs": True,
            "seccomp": "",
            "seccomp_flags": 0,
            "apparmor": "",
            "selinux": "",
            "rlimits": [],
            "oom_score_adj": None,
            "umask": 0o022,
        },
        "rootfs": {
            "lower": [f"{directory}/layer"],
            "upper": f"{directory}/upper",
            "work": f"{directory}/work",
            "readonly": False,
        },
        "mounts": [rootfs_defaults.filesystem("/dev", "tmpfs", "nosuid", mode="755", size="64k")],
        "devices": [],
        "masked_paths": [],
        "readonly_paths": [],
        "pid": "container",
        "pid_target": "",
        "cgroup_namespace": True,
        "privileged": False,
        "tty": False,
        "stdin": False,
        "stdin_once": False,
        "log_path": f"{directory}/0.log",
        "log_root": directory,
    }


class _Agent:
    """An agent that sends one request after the other. failure: the first error that was not expected."""

    def __init__(self, loop: Loop, path: str, requests: Iterable[Body]) -> None:
        self.failure: Exception | None = None
        self._requests = iter(requests)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with protocol.address(path) as address:
            connection.connect(address)
        self._peer = Peer(loop, connection, self._received, lambda _peer: None)
        self._ask()

    def _ask(self) -> None:
        request = next(self._requests, None)
        if request is not None:
            self._peer.send({"id": 0, **request})

    def _received(self, _peer: Peer, message: protocol.Message) -> None:
        protocol.close_all(message.fds)
        if "event" in message.body:
            return
        if "error" in message.body:
            error = protocol.read_error(message.body)
            if self.failure is None and not isinstance(error, StartError):
                self.failure = error
        self._ask()

    def close(self) -> None:
        self._peer.close()
