"""A container in its supervisor: from the request to create it to the record of its end.

::

    creating ── ready ──► created ── go ──► starting ── executed ──► running ── end ──► exited
       └─ failed or killed ─► undone            └────── failed: exit code 128 ──────────┘

No method waits. What takes time is answered later: the requests that wait for it are kept with the container. A
container whose creator has gone is finished all the same; `remove` undoes it.
"""

import os
import signal
import struct
import termios
import time
from collections.abc import Collection
from fcntl import ioctl

from nodeagent.errors import FailedPrecondition, StartError
from nodeagent.linux import processes
from nodeagent.sandbox import exits, facts, protocol
from nodeagent.sandbox.facts import Facts
from nodeagent.sandbox.protocol import Body
from nodeagent.sandbox.runtime.launcher_link import Deposit
from nodeagent.sandbox.runtime.loop import Timer, guarded, report
from nodeagent.sandbox.runtime.peers import Request
from nodeagent.sandbox.spec import ContainerPlan, Exit, Identity
from nodeagent.sandbox.supervisor.birth import Birth
from nodeagent.sandbox.supervisor.groups import Group
from nodeagent.sandbox.supervisor.hookrun import ContainerHooks
from nodeagent.sandbox.supervisor.pod import Pod
from nodeagent.sandbox.supervisor.pump import Pump

START_FAILED = 128

_OF_BIRTH = ("status", "go")


class Container:
    """A container. fds: the supervisor's, by the names under which the launcher keeps copies of them.

    pidfd; stdin, stdout, stderr, or master with a terminal; status, and go, until the program is executed; oom, procs,
    kill.
    members: all containers of the pod by id, where this one is until nothing is left of it.
    """

    def __init__(
        self,
        pod: Pod,
        members: "dict[str, Container]",
        plan: ContainerPlan,
        known: Facts,
        fds: dict[str, int],
    ) -> None:
        self.pod = pod
        self._members = members
        self.plan = plan
        self.id = plan["id"]
        self.facts = known
        self.fds = fds
        self.exit: Exit | None = None
        self.birth: Birth | None = None
        self.is_hidden = False
        self.group = Group(pod.loop, procs=fds.get("procs"), kill=fds.get("kill"))
        self.pump: Pump | None = None
        self._failure: Exception | None = None
        self._deadline: Timer | None = None
        self.creation: Request | None = None
        self._start: Request | None = None
        self._removals: list[Request] = []
        self.hooks = ContainerHooks(pod, plan)
        self.is_over = False

    # --- creation ---

    def await_birth(self, birth: Birth) -> None:
        """Wait for the process, which prepares itself, and meanwhile make the files of what is known of it.

        Raises OSError, or ResourceExhausted for a plan that is too long.
        """
        self.birth = birth
        birth.await_hooks = self._run_hooks_of_creation
        facts.make_directory(self.pod.directory, self.plan)
        if not self.plan["tty"]:
            self.open_pump()

    def abort(self, error: Exception) -> None:
        """Fail a creation whose process has been made: it is killed, and the request answered at its end."""
        if self.birth is not None:
            self.birth.abandon(error)
        else:
            self._failure = error
            self.kill()

    def resume_birth(self, birth: Birth) -> None:
        """Resume the birth of a process that reported "ready" to an earlier supervisor."""
        self.birth = birth
        birth.give_up = self._give_up_birth

    def succeeded(self, pid: int) -> None:
        child = self.pod.children.adopt_sibling(pid, self.ended)
        os.close(self.fds["pidfd"])
        self.fds["pidfd"] = child.pidfd
        self.facts["pid"], self.facts["ticks"] = pid, processes.start_ticks(pid)
        self.is_hidden = False
        if self.facts["killed"]:
            self._signal(signal.SIGKILL)

    def first_ended(self, code: int) -> None:
        """A hidden process ends when its successor has been found."""
        if self.is_hidden and self.birth is not None:
            self.birth.listen()
        if self.is_hidden:
            self.ended(code)

    def ready(self, identity: Identity, warnings: list[str], master: int | None) -> None:
        if master is not None:
            os.set_blocking(master, False)
            self.fds["master"] = master
        self.facts["identity"], self.facts["warnings"] = identity, warnings
        if self.birth is not None:
            self.fds.update(self.birth.descriptors)
        try:
            if self.pump is None:
                self.open_pump()
            self._save(created_at=time.time_ns())
        except OSError as error:
            if self.birth is not None:
                self.birth.abandon(error)
            return
        self.pod.launcher.keep(self.id, self.deposit())
        if self.birth is not None:
            self.birth.give_up = self._give_up_birth
        if self.creation is not None:
            self.creation.reply(self.describe())
            self.creation = None

    def open_pump(self) -> Pump:
        names = ("stdout", "stderr", "master")
        outputs = {name: self.fds[name] for name in names if name in self.fds}
        journal = facts.open_journal(self.pod.directory, self.id)
        limit = self.plan.get("log_limit")
        self.pump = Pump(self.pod.loop, outputs, journal, self.pod.clock, limit)
        return self.pump

    def _run_hooks_of_creation(self) -> None:
        """Run the hooks of a creation while the process waits, with a complete root file system."""

        def done(text: str) -> None:
            if self.birth is not None and text:
                self.birth.abandon(FailedPrecondition(text))
            elif self.birth is not None:
                self.birth.proceed()

        self.hooks.create(self.facts["pid"], done)

    def _undo(self) -> None:
        """Undo a creation whose process ended before it was ready; whoever waits for that hears of it in any case."""
        guarded(lambda: protocol.close_all(self._release()))
        self._members.pop(self.id, None)
        self.pod.loop.persist(
            lambda: facts.remove(self.pod.directory, self.id),
            f"container {self.id}: its files cannot be removed",
        )
        removals, self._removals = self._removals, []
        if self.creation is not None and removals:
            self.creation.fail(FailedPrecondition(f'container "{self.id}": removed while created'))
        elif self.creation is not None:
            self.creation.fail(self._failure or FailedPrecondition("init: was killed"))
        for request in removals:
            request.reply()

    # --- start ---

    def start(self, request: Request) -> None:
        """Reply when the program is executed, with the time at which it was let go."""
        if self.birth is None or self.pump is None or self.facts["started_at"] or self.exit:
            raise FailedPrecondition(f'container "{self.id}": is {self.state}, not created')
        # Of these two, the first may be repeated after a failure of the second.
        self.pump.start(self.plan["log_path"], self.plan.get("log_root", ""))
        # Recorded before the process is let go: a successor that found the old state would never start it.
        self._save(started_at=time.time_ns())
        self._start = request
        self.birth.go()

    def executed(self) -> None:
        """Run poststart hooks and reply, also where an earlier supervisor let it go.

        Hooks are run only while the process is there.
        """
        self._forget_birth()
        if not self.is_over:
            self.hooks.after_start(self.facts["pid"], self._reply_start)

    def _reply_start(self) -> None:
        if self._start is not None:
            self._start.reply({"at": self.facts["started_at"]})
            self._start = None

    def failed(self, error: Exception) -> None:
        """Kill the process, which has reported why it cannot execute its program, in case it does not end by itself."""
        self._failure = error
        self._forget_birth()
        self.kill()

    def _give_up_birth(self, descriptors: Collection[int]) -> None:
        self.pod.launcher.drop(self.id, _OF_BIRTH, descriptors)

    def _forget_birth(self) -> None:
        self.birth = None
        for name in _OF_BIRTH:
            self.fds.pop(name, None)  # given up by the birth

    def share_pid_namespace(self) -> None:
        """Record that others join the PID namespace which is this container's own."""
        known = self.facts.copy()
        known["shared"] = True
        facts.save(self.pod.directory, self.id, known)
        self.facts = known

    # --- stop ---

    def stop(self, number: int, timeout_ms: int) -> None:
        """Send the signal, once; kill at the earliest deadline that anybody asks for."""
        if self.exit is not None:
            return
        if timeout_ms <= 0 or not self.facts["started_at"]:
            self.kill()
            return
        if not self.facts["signalled"]:
            self.facts["signalled"] = True
            self._signal(number)
        deadline = time.monotonic_ns() + timeout_ms * 1_000_000
        if not self.facts["deadline"] or deadline < self.facts["deadline"]:
            self.facts["deadline"] = deadline
            self.keep_deadline()
        self._note("deadline")

    def keep_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        if self.facts["deadline"]:
            self._deadline = self.pod.loop.call_at(self.facts["deadline"], self.kill)

    def kill(self) -> None:
        """Kill all processes. The end of a PID namespace's first one ends the others; else the cgroup is killed."""
        if self.exit is not None or self.is_over:
            return
        if not self.facts["killed"]:
            self.facts["killed"] = True
            self._note(
                "kill"
            )  # before the signal: whoever else sees the end must know whose it was
        self._signal(signal.SIGKILL)
        if self.plan["pid"] != "container":
            self.group.kill()

    def _signal(self, number: int) -> None:
        """Send a signal. ESRCH of a pidfd means that the process was reaped: no other news of its end will come."""
        if "pidfd" not in self.fds:
            return
        try:
            signal.pidfd_send_signal(self.fds["pidfd"], number)
        except ProcessLookupError:
            self.pod.loop.call_after(0, self._reaped)

    # --- end ---

    def ended(self, code: int) -> None:
        """Record the end of the process while it is a zombie: afterwards the kernel has forgotten it."""
        if self.is_over:
            return
        self.is_over = True
        # No step keeps the others from being done: this is called once.
        if self.birth is not None:
            guarded(self.birth.conclude)
        guarded(
            self.hooks.end_creation
        )  # before the pid that they were told can be another process's
        if not self.facts["created_at"]:
            self.hooks.after_end(self._undo)
            return
        if self.plan["pid"] != "container":
            guarded(self.group.kill)
        if self.pump is not None:
            guarded(self.pump.finish)
        if self._failure is not None and self.facts["started_at"]:
            code = START_FAILED
        self.exit = exits.judge(
            code,
            killed=self.facts["killed"],
            oom_before=self.facts["oom_kills"],
            counter=self.fds.get("oom"),
        )
        try:
            self.exit = exits.record(self.pod.directory, self.id, self.exit)
        except OSError as error:  # a full disk: it has ended all the same
            report(f"container {self.id}: exit code {code} is not recorded: {error}")
        self.pod.loop.call_after(0, self._tell_end)
        guarded(lambda: self.pod.launcher.drop(self.id, None, self._release()))
        if self.hooks.are_left:
            self.hooks.after_end(self.remove_as_asked)

    def cut_off(self) -> None:
        """Undo a creation that ended with an earlier supervisor, as its process did."""
        self.is_over = True
        self.hooks.after_end(self._undo)

    def watch(self) -> None:
        """Watch for the end of a process that is not our child."""
        self.pod.loop.watch(self.fds["pidfd"], self._watched_ended)

    def _watched_ended(self, _events: int) -> None:
        self.pod.loop.forget(self.fds["pidfd"])
        code = exits.code_of_watched(self.facts["pid"], self.fds["pidfd"])
        self.ended(exits.UNKNOWN if code is None else code)

    def _reaped(self) -> None:
        if self.exit is None and "pidfd" in self.fds:
            self._watched_ended(0)

    def _release(self) -> list[int]:
        """Release all resources of the container; returns the descriptors that are still to be closed."""
        if self._deadline is not None:
            self._deadline.cancel()
        if self.pump is not None:
            self.pump.close()
        self.group.close()
        for name in ("procs", "kill"):  # closed by the group
            self.fds.pop(name, None)
        left = list(self.fds.values())
        self.fds.clear()
        return left

    def _tell_end(self) -> None:
        """Answer and report the end: after it has been recorded and the process reaped."""
        if self.exit is None:
            return
        if self._start is not None and self._failure is not None:
            self._start.fail(StartError(f'container "{self.id}": {self._failure}'))
            self._start = None
        self._reply_start()
        self.pod.tell({"event": "exit", "container": self.id, "exit": self.exit})
        self.remove_as_asked()

    def remove_as_asked(self) -> None:
        """Carry out the removals that had to wait for the end, or for the hooks after it."""
        removals, self._removals = self._removals, []
        for request in removals:
            self.remove(request)

    def remove(self, request: Request) -> None:
        """Reply when nothing is left of it; one that has not ended is killed. Hooks are waited for."""
        if self.exit is None or self.hooks.are_running:
            self._removals.append(request)
            self.kill()
            return
        if self.pump is not None:
            self.pump.write_left()
        try:
            facts.remove(self.pod.directory, self.id)
        except OSError as error:
            request.fail(error)
            return
        self._members.pop(self.id, None)
        request.reply()

    # --- the rest ---

    def resize(self, width: int, height: int) -> None:
        if "master" not in self.fds:
            raise FailedPrecondition(f'container "{self.id}": has no terminal, or is {self.state}')
        set_size(self.fds["master"], width, height)

    def reopen_log(self) -> None:
        if self.pump is None or not self.facts["started_at"] or self.exit:
            raise FailedPrecondition(f'container "{self.id}": is {self.state}, not running')
        self.pump.reopen_log()

    def close_stdin(self) -> None:
        """Let the container read the end of its input, as soon as nobody else holds it."""
        descriptor = self.fds.pop("stdin", None)
        if descriptor is not None:
            self.pod.launcher.drop(self.id, ["stdin"], [descriptor])

    @property
    def state(self) -> str:
        if self.exit is not None:
            return "exited"
        if self.facts["started_at"]:
            return "running" if self.birth is None else "starting"
        return "created" if self.facts["created_at"] else "creating"

    def describe(self) -> Body:
        log = {
            "dropped_log_lines": self.pump.dropped_lines if self.pump else 0,
            "held_back_ms": self.pump.held_back_ms if self.pump else 0,
        }
        return {"id": self.id, **self.facts, "exit": self.exit, **log}

    def deposit(self) -> Deposit:
        return Deposit(self.facts["pid"], self.facts["oom_kills"], self.fds)

    def _note(self, what: str) -> None:
        """Write down what is known for whoever comes after us; on a full disk, only we know it."""
        if not self.facts["created_at"]:
            return  # a creation that is cut off is undone, whatever is known of it
        try:
            self._save()
        except OSError as error:
            report(f"container {self.id}: its {what} is not recorded: {error}")

    def _save(self, *, created_at: int | None = None, started_at: int | None = None) -> None:
        """Record what is known and what has just happened; if that fails, the latter has not happened."""
        known = self.facts.copy()
        if created_at is not None:
            known["created_at"] = created_at
        if started_at is not None:
            known["started_at"] = started_at
        facts.save(self.pod.directory, self.id, known)
        self.facts = known


def set_size(master: int, width: int, height: int) -> None:
    ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", height, width, 0, 0))
