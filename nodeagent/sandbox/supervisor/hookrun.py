"""The hooks that a supervisor runs for a container: prestart, createRuntime, poststart and poststop.

A child of it, the runner, goes back to the node's namespaces and runs them there, one after the other, and reports what
has failed. It is in the supervisor's cgroup, and no container sees it.

poststop runs once, whatever is killed: the runner does not end with its supervisor, and the container's directory has a
file that it locks, and writes to before the first hook. A successor of the supervisor starts another runner, which
waits for the lock and finds that it was done. Hooks are lost only if the runner itself is killed, if no process can be
started for it, or by a reboot. Its supervisor reports which hooks were not run, or not to their end.

poststart runs at most once: not for a container that has ended before, and it ends with its supervisor, whose successor
runs it where the program was not known to be executed.
"""

import fcntl
import os
import signal
import socket
from collections.abc import Callable, Sequence

from nodeagent.errors import FailedPrecondition
from nodeagent.linux import processes, syscalls
from nodeagent.sandbox import paths
from nodeagent.sandbox.init import hookroot, hooks
from nodeagent.sandbox.runtime import process
from nodeagent.sandbox.runtime.children import Child
from nodeagent.sandbox.runtime.loop import report
from nodeagent.sandbox.spec import ContainerPlan, Hook
from nodeagent.sandbox.supervisor import namespaces
from nodeagent.sandbox.supervisor.pod import Pod
from nodeagent.words import HookStage

_MAX_TEXT = 4096
_CLAIM = "poststop"
_BEGUN = b"begun\n"

Done = Callable[[str], None]


class ContainerHooks:
    """The hooks of one container. There is one runner at a time: the next stage waits for it."""

    def __init__(self, pod: Pod, plan: ContainerPlan) -> None:
        self._pod = pod
        self._plan = plan
        self._runner: _Runner | None = None
        self._next: Callable[[], None] | None = None

    @property
    def are_running(self) -> bool:
        return self._runner is not None

    @property
    def are_left(self) -> bool:
        """Whether some are running, or are to be run after the end."""
        return self._runner is not None or bool(hooks.of(self._plan, "poststop"))

    def create(self, pid: int, done: Done) -> None:
        """Run prestart and createRuntime. done: gets what has failed, "" for nothing. pid: of the waiting process."""

        def ended(text: str) -> None:
            hookroot.unlink(self._plan)
            done(text)

        try:
            hookroot.link(self._plan, pid)
        except OSError as error:
            # The disk may be full. Whoever waits for the hooks has to hear of it.
            done(f"hooks {', '.join(hooks.CREATION)}: {error}")
            return
        self._run(hooks.CREATION, "creating", pid, ended)

    def end_creation(self) -> None:
        """Kill the hooks of a creation, as the process that they were told of ends."""
        if self._runner is not None and self._runner.stages == hooks.CREATION:
            self._runner.kill()

    def after_start(self, pid: int, done: Callable[[], None]) -> None:
        """Run poststart; failures are only logged."""
        if hooks.of(self._plan, "poststart"):
            self._run(("poststart",), "running", pid, lambda text: self._say(text, done))
        else:
            done()

    def after_end(self, done: Callable[[], None]) -> None:
        """Run poststop, once for a container however often it is asked for, after hooks that are running."""
        if self._runner is not None:
            self._next = lambda: self.after_end(done)
        elif hooks.of(self._plan, "poststop"):
            self._run(("poststop",), "stopped", 0, lambda text: self._say(text, done))
        else:
            done()

    def _say(self, text: str, done: Callable[[], None]) -> None:
        if text:
            report(f"container {self._plan['id']}: {text}")
        done()

    def _run(self, stages: tuple[HookStage, ...], status: str, pid: int, done: Done) -> None:
        def ended(text: str) -> None:
            self._runner = None
            done(text)
            action, self._next = self._next, None
            if action is not None:
                action()

        told = hooks.state(self._plan, status, pid)
        try:
            self._runner = _Runner(self._pod, self._plan, stages, told, ended)
        except OSError as error:
            text = f"hooks {', '.join(stages)}: {error}"
            self._pod.loop.call_after(0, lambda: done(text))


class _Runner:
    """The running hooks of some stages. done: gets what has failed, "" for nothing."""

    def __init__(
        self,
        pod: Pod,
        plan: ContainerPlan,
        stages: tuple[HookStage, ...],
        told: bytes,
        done: Done,
    ) -> None:
        self.stages = stages
        self._pod = pod
        self._done = done
        self._text: str | None = None
        found = hooks.of(plan, *stages)
        bundle = plan["hooks"]["bundle"]
        claim = f"{paths.container(pod.directory, plan['id'])}/{_CLAIM}"
        claim = claim if "poststop" in stages else ""
        self._child, self._ours = _spawn(pod, found, told, bundle, claim, self._ended)
        pod.loop.watch(self._ours.fileno(), self._heard)

    def kill(self) -> None:
        try:
            signal.pidfd_send_signal(self._child.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def _heard(self, _events: int) -> None:
        """Receive its report, which it sends once, before it ends."""
        try:
            data = self._ours.recv(_MAX_TEXT, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._text = data[1:].decode(errors="replace")
        else:
            self._pod.loop.forget(self._ours.fileno())

    def _ended(self, code: int) -> None:
        """Call `done` a moment later, when the runner has been reaped."""
        if self._text is None:
            self._heard(0)
        self._pod.loop.forget(self._ours.fileno())
        self._ours.close()
        os.close(self._child.pidfd)
        text = self._text
        if text is None:
            text = f"hooks {', '.join(self.stages)}: not run to their end, exit code {code}"
        self._pod.loop.call_after(0, lambda: self._done(text))


def _spawn(
    pod: Pod,
    found: Sequence[tuple[HookStage, Hook]],
    told: bytes,
    bundle: str,
    claim: str,
    ended: Callable[[int], None],
) -> tuple[Child, socket.socket]:
    """Fork a runner, with the namespaces of our parent, the launcher or what inherited us: those of the node."""
    kinds: list[str] = [kind for kind in pod.namespaces if kind in namespaces.FLAGS]
    nodes: dict[str, int] = {}
    try:
        for kind in kinds:
            nodes[kind] = os.open(f"/proc/{os.getppid()}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
        return pod.children.spawn_connected(
            lambda status: _be_runner(nodes, found, told, bundle, claim, status),
            ended,
            keep=tuple(nodes.values()),
        )
    finally:
        for descriptor in nodes.values():
            os.close(descriptor)


def _be_runner(
    nodes: dict[str, int],
    found: Sequence[tuple[HookStage, Hook]],
    told: bytes,
    bundle: str,
    claim: str,
    status: int,
) -> None:
    if not claim:  # poststop has to be run whatever becomes of the supervisor
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    process.set_title("na-hooks", f"nodeagent.sandbox.hookrun {bundle}")
    faults: list[str] = []
    try:
        processes.set_oom_score(0)
        for kind, namespace in nodes.items():
            syscalls.setns(namespace, namespaces.FLAGS[kind])
        if not claim or _claimed(claim):
            faults = _run_all(found, told, bundle)
    except Exception as error:  # noqa: BLE001 whatever it is, the supervisor tells who asked
        faults = [f"hooks of {bundle}: {error}"]
    text = "; ".join(faults).encode(errors="replace")[: _MAX_TEXT - 1]
    try:
        os.write(status, b"\0" + text)
    except OSError:
        pass  # the supervisor has died
    os._exit(0)


def _claimed(path: str) -> bool:
    """Whether this process is the one to run them; the claim is exclusive and for good."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX)  # until this process ends
    if os.read(file, 1):
        return False
    os.write(file, _BEGUN)
    return True


def _run_all(found: Sequence[tuple[HookStage, Hook]], told: bytes, bundle: str) -> list[str]:
    """Run hooks; returns what has failed. The first failure ends a creation; later stages run all their hooks."""
    faults = []
    for stage, hook in found:
        try:
            hooks.run(stage, hook, told, bundle, lambda: None)
        except (FailedPrecondition, OSError) as error:
            faults.append(str(error))
            if stage in hooks.CREATION:
                break
    return faults
