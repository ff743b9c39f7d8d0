"""Faults that the agent has had, or that every runtime has had, as replacements in the text of the package.

A text that does not occur exactly once is refused (`copies.copy_with`), so that no fault is lost when the code changes.
Each fault names the harness that finds it, which `test_old_bugs.py` plays, and what that says. docs/promises.md lists
them.
"""

from dataclasses import dataclass
from typing import Literal

Harness = Literal["simulate", "chaos (inject)", "chaos (gray)", "chaos (scarce)", "history"]

_CREATIONS = "lifecycle/creations.py"
_INVENTORY = "lifecycle/inventory.py"
_POLLING = "lifecycle/supervisors/polling.py"
_REMOVAL = "lifecycle/containers/removal.py"
_SANDBOXES = "lifecycle/pods/sandboxes.py"
_SLOTS = "lifecycle/pods/slots.py"
_SUPERVISION = "lifecycle/supervisors/supervision.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """file: below the package. instead: what stands there in place of `text`."""

    file: str
    text: str
    instead: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OldBug:
    """A fault. was: what went wrong then. says: a pattern of what the harness reports.

    first: the first of the seeds that are simulated. played: what else the harness plays, a round of the sweep as
    `test_inject.FOUND` has them, or the name of a gray failure or of a shortage.
    """

    name: str
    was: str
    harness: Harness
    changes: tuple[Change, ...]
    says: str
    first: int = 0
    played: str = ""


_WITHOUT_POLLING = Change(
    file=_POLLING,
    text="if sandbox_id in self._asked:",
    instead="if sandbox_id:",
)

SIMULATED = (
    OldBug(
        name="name not released",
        was="Where an undo failed, the record of the pod stayed until the next start, and kept its name.",
        harness="simulate",
        changes=(
            Change(
                file=_SANDBOXES,
                text="        await undone(self._tasks, about, partial(self._clear, slot, sandbox))",
                instead=(
                    "        try:\n"
                    "            await self._clear(slot, sandbox)\n"
                    "        except Exception as error:\n"
                    "            about = str(error)"
                ),
            ),
            Change(
                file=_SANDBOXES,
                text="if not other.ready_at:\n",
                instead="if False:\n",
            ),
        ),
        says="its name is taken by nothing listed|had to remove leaks",
        first=10,
    ),
    OldBug(
        name="error of another creation",
        was="A creation got the error of one with another name, which had failed a moment before.",
        harness="simulate",
        changes=(
            Change(
                file=_CREATIONS,
                text="if task.done() and not _has_failed(task) and not",
                instead="if task.done() and not",
            ),
        ),
        says='a creation of image fails with image "nowhere"',
        first=10,
    ),
    OldBug(
        name="stop waits for a creation",
        was="StopPodSandbox waited for the undo of a creation that hung before it killed anything.",
        harness="simulate",
        changes=(
            Change(
                file=_REMOVAL,
                text="await undone(self._tasks, about, partial(self._undo, container))",
                instead="await self._tasks.keep(NAME, partial(self._undo, container), about=about)",
            ),
            Change(
                file=_SANDBOXES,
                text="        await self._stopping.stop_all(sandbox.id)\n",
                instead=(
                    "        if pod.creating:\n"
                    "            await asyncio.wait(pod.creating)\n"
                    "        await self._stopping.stop_all(sandbox.id)\n"
                ),
            ),
        ),
        says="StopPodSandbox: containers run after",
        first=80,
    ),
    OldBug(
        name="event of a removal told twice",
        was="Two removals of a pod at the same time both told readers of events that it was deleted.",
        harness="simulate",
        changes=(
            Change(
                file=_INVENTORY,
                text="is_first = record.id in self.sandboxes or record.id in self.containers",
                instead="is_first = True",
            ),
        ),
        says="event deleted of .* comes after deleted",
        first=78,
    ),
    OldBug(
        name="removal fails where another one was faster",
        was="Of two removals of a pod at the same time, the second failed with INTERNAL: KeyError.",
        harness="simulate",
        changes=(
            Change(
                file=_INVENTORY,
                text="self.sandboxes.pop(record.id, None)",
                instead="del self.sandboxes[record.id]",
            ),
        ),
        says="KeyError",
        first=15,
    ),
    OldBug(
        name="exit record not read",
        was="The end of which no event had arrived was 255, Unknown, though its supervisor had recorded it.",
        harness="simulate",
        changes=(
            Change(
                file=_SUPERVISION,
                text="end = exits.read(str(self._directory / container.sandbox_id), container.id)",
                instead="end = None",
            ),
        ),
        says="ended with .* which is lost",
    ),
    OldBug(
        name="retry does not join",
        was="A retry of a creation that its caller had given up was refused, as the name was taken.",
        harness="simulate",
        changes=(
            Change(
                file=_CREATIONS,
                text="        task = self._tasks.get(key)\n",
                instead="        key, task = object(), None\n",
            ),
        ),
        says="was made for a caller that gave up, and is refused to the next",
    ),
    OldBug(
        name="slots taken for leaks",
        was="The reconciliation removed warm slots that were just being made.",
        harness="simulate",
        changes=(
            Change(
                file="lifecycle/reconcile.py",
                text="recorded.unreadable | self._slots.ids",
                instead="recorded.unreadable",
            ),
        ),
        says="the reconciliation had to remove leaks",
    ),
    OldBug(
        name="early news kept for ever",
        was="The news of an end that came before the start was kept for each container that never started.",
        harness="simulate",
        changes=(
            Change(
                file=_SUPERVISION,
                text=(
                    "            if container_id in self._early:\n"
                    "                self._early[container_id] = end"
                ),
                instead="            self._early[container_id] = end",
            ),
        ),
        says="left at rest: .*early: ",
    ),
    OldBug(
        name="cgroup before the record",
        was="A container's cgroup was made before its record: a creation that was cut off left it for good.",
        harness="simulate",
        changes=(
            Change(
                file="lifecycle/containers/creation.py",
                text="                self._inventory.save(container)\n                try:",
                instead="                try:",
            ),
        ),
        says="left at rest: groups|the reconciliation had to remove leaks",
    ),
    OldBug(
        name="record gone before what it names",
        was="The record of a container went first: what could not be removed then was found by nobody.",
        harness="simulate",
        changes=(
            Change(
                file=_REMOVAL,
                text="        errors: list[Exception] = []\n",
                instead=(
                    "        errors: list[Exception] = []\n"
                    "        self._inventory.forget(container)\n"
                ),
            ),
            Change(
                file=_REMOVAL,
                text="            raise errors[0]\n        self._inventory.forget(container)",
                instead="            raise errors[0]",
            ),
        ),
        says="left at rest|the reconciliation had to remove leaks",
        first=75,
    ),
    OldBug(
        name="connection never made again",
        was="A connection to a supervisor that ended while it lived was not made again: its pod was of no use.",
        harness="simulate",
        changes=(
            Change(
                file=_SUPERVISION,
                text="await supervisor.ended.wait()\n",
                instead="await supervisor.lost.wait()\n",
            ),
        ),
        says="a container: fails without a fault: Unavailable.* is disconnected|are not heard",
        first=55,
    ),
    OldBug(
        name="slot undone only once",
        was="A slot whose directory could not be removed at once, for want of a descriptor, stayed.",
        harness="simulate",
        changes=(
            Change(
                file=_SLOTS,
                text="                self._tasks.keep(NAME, undo, about=about)",
                instead="                pass",
            ),
        ),
        says="left at rest|the reconciliation had to remove leaks",
        first=130,
    ),
    OldBug(
        name="address leaked by an undo",
        was="A slot that was made in part and undone kept its address, until none was left for pods.",
        harness="simulate",
        changes=(
            Change(
                file=_SLOTS,
                text="        await supervisor.shutdown()\n    await network.detach(pod_id)\n",
                instead="        await supervisor.shutdown()\n",
            ),
        ),
        says="had to remove leaks: .*'lease'|lease of",
        first=15,
    ),
    OldBug(
        name="host port not released",
        was="The rows of a pod's host ports stayed: no other pod could have them.",
        harness="simulate",
        changes=(
            Change(
                file="net/network.py",
                text="            self._host_ports.release(pod_id)\n        finally:",
                instead="            pass\n        finally:",
            ),
        ),
        says="taken by nothing listed: .*port|row HostPort",
    ),
    OldBug(
        name="hold of an image left",
        was="RemovePodSandbox succeeded, and left what its containers hold of images, which stayed for good.",
        harness="simulate",
        changes=(
            Change(
                file=_REMOVAL,
                text="            partial(self._release, container),\n",
                instead="",
            ),
        ),
        says="had to remove leaks: .*'hold'|row ImageHold",
    ),
)

INJECTED = (
    OldBug(
        name="exit recorded after the reap",
        was="A supervisor recorded an end only when the process was reaped: killed in between, it took the code along.",
        harness="chaos (inject)",
        changes=(
            Change(
                file="sandbox/runtime/children.py",
                text=(
                    "        if owner is not None:\n"
                    "            guarded(owner, exit_code(end))\n"
                    "        os.waitid(os.P_PID, end.si_pid, os.WEXITED)\n"
                ),
                instead=(
                    "        os.waitid(os.P_PID, end.si_pid, os.WEXITED)\n"
                    "        if owner is not None:\n"
                    "            guarded(owner, exit_code(end))\n"
                ),
            ),
            # The kernels of that time: since 6.15 a pidfd tells the code of a process that was reaped.
            Change(
                file="sandbox/exits.py",
                text="        status = _status_of_reaped(pidfd)\n",
                instead="        status = None\n",
            ),
        ),
        says="exit code 255 .*, the program wrote 7",
        played="end of the program supervisor openat KILL 1",
    ),
    OldBug(
        name="dropped exit event",
        was="The end of a container was one datagram, sent once: where that failed, it was RUNNING for ever.",
        harness="chaos (inject)",
        changes=(
            Change(
                file="sandbox/runtime/peers.py",
                text=(
                    "        except OSError as error:  # ENOMEM, ENOBUFS, ETOOMANYREFS, EMFILE\n"
                    "            self._give_up(error)\n"
                ),
                instead="        except OSError:\n            pass\n",
            ),
            _WITHOUT_POLLING,
        ),
        says="not EXITED",
        played="end of the program supervisor sendmsg ENOBUFS 2",
    ),
    OldBug(
        name="kill between a cgroup and its mark",
        was="An agent that was killed between mkdir of a cgroup and its mark took it for another one's ever after.",
        harness="chaos (inject)",
        changes=(
            Change(
                file="cgroups/tree.py",
                text="    os.mkdir(directory, 0o755 | stat.S_ISVTX)\n",
                instead="    os.mkdir(directory, 0o755)\n",
            ),
        ),
        says="is still being undone",
        played="CreateContainer agent setxattr KILL 2",
    ),
    OldBug(
        name="log line cut at a rotation",
        was="A line that was not whole yet when its log was rotated became two, one in each file.",
        harness="chaos (inject)",
        changes=(
            Change(
                file="sandbox/supervisor/pump.py",
                text="            self._log.reopen()\n",
                instead=(
                    "            for stream in self._streams.values():\n"
                    "                stream.end(self._log, self._clock)\n"
                    "            self._log.reopen()\n"
                ),
            ),
        ),
        says="the log has .*'by'",
        played="ReopenContainerLog supervisor openat EMFILE 2",
    ),
    OldBug(
        name="OOM flag lost with the supervisor",
        was="Supervisor and launcher judged ends apart: the launcher called one by the OOM killer an Error.",
        harness="chaos (inject)",
        changes=(
            Change(
                file="sandbox/launcher/main.py",
                text='            counter=deposit.fds.get("oom"),\n',
                instead="            counter=None,\n",
            ),
        ),
        says="ended by the OOM killer, and is 137 Error",
        played="end by the OOM killer supervisor openat KILL 1",
    ),
    OldBug(
        name="descriptor leaked by each command",
        was="ExecSync left the agent's files of the command's cgroup open.",
        harness="chaos (inject)",
        changes=(
            Change(
                file="lifecycle/supervisors/cgroup_files.py",
                text="            close_all((watch.oom, watch.procs, watch.kill))\n",
                instead="            close_all((watch.oom, watch.kill))\n",
            ),
        ),
        says="left: descriptors of the agent",
        played="ExecSync agent sendmsg EINTR 1",
    ),
)

TRIED = (
    OldBug(
        name="look at a device on the loop",
        was="The agent looked at the path of a device itself: a dead file server stopped every request of the node.",
        harness="chaos (gray)",
        changes=(
            Change(
                file="lifecycle/plan/host_paths.py",
                text=(
                    "        threading.Thread(target=_run, args=(function, future), daemon=True)"
                    ".start()\n"
                ),
                instead="        _run(function, future)\n",
            ),
        ),
        says="a neighbour's call",
        played="volume does not answer",
    ),
    OldBug(
        name="connection ended by a shortage",
        was="A supervisor without a free descriptor ended its connection, and the answer did not say what it lacked.",
        harness="chaos (scarce)",
        changes=(
            Change(
                file="sandbox/runtime/peers.py",
                text=('            self.send({"id": error.body.get("id"), **failure})\n'),
                instead="            del failure\n            self.close()\n",
            ),
        ),
        says="does not say what is scarce",
        played="supervisor without descriptors",
    ),
    OldBug(
        name="event of a stop not told",
        was="Readers of events were not told that a pod was stopped.",
        harness="history",
        changes=(
            Change(
                file=_SANDBOXES,
                text='stopped_at=time.time_ns()), "stopped"\n',
                instead="stopped_at=time.time_ns())\n",
            ),
        ),
        says="events: .*: stopped between .* is missing",
    ),
)

OLD_BUGS = (*SIMULATED, *INJECTED, *TRIED)
