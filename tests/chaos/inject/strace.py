"""Faults at the kernel's boundary, by strace's injection: the n-th call of a set fails, or kills, or stops its caller.

Each thread that is traced has a number for each call: its third openat(2), its third mkdir(2).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.support import leaks
from tests.support.node import PATIENCE_SECONDS, wait_for

Place = tuple[str, int]  # a call, and its number among those of that name

SIGNALS = ("KILL", "STOP")
_WAKE_UP = re.compile(r"(write|read)\(\d+<(socket|anon_inode|UNIX|pipe|/dev/pts/)")
# Of fcntl(2), only a duplicate takes a descriptor; SQLite locks with it, and does not get over an EMFILE.
_NO_DUPLICATE = re.compile(r"fcntl\(.*, F_(?!DUPFD)")
# A frame of HTTP/2, which begins with its length.
_OF_GRPC = re.compile(r'sendmsg\(.*msg_iov=\[\{iov_base="\\0')


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens at a call. what: the name of an errno, or of one of SIGNALS; lasts: at all further calls as well."""

    what: str
    lasts: bool = False

    @property
    def is_signal(self) -> bool:
        return self.what in SIGNALS

    def __str__(self) -> str:
        return f"{self.what}+" if self.lasts else self.what

    @classmethod
    def parse(cls, text: str) -> Fault:
        return cls(what=text.removesuffix("+"), lasts=text.endswith("+"))

    def at(self, when: int) -> str:
        action = f"signal={self.what}" if self.is_signal else f"error={self.what}"
        return f"{action}:when={when}{'+' if self.lasts else ''}"


class Injection:
    """One strace, attached to a process until `stop`. fault None: the calls are only counted.

    follow: all its threads, and all that it forks, as well.
    """

    def __init__(
        self,
        pid: int,
        calls: str,
        fault: Fault | None,
        when: int,
        *,
        output: Path,
        follow: bool = False,
    ) -> None:
        self._output = output
        self._when = when
        self._fault = fault
        self._follows = follow
        self._said = output.with_suffix(".said")
        output.unlink(missing_ok=True)
        self._said.unlink(missing_ok=True)
        self._pid = pid
        command = ["strace", "-y", "-s", "80", "-e", "signal=none", "-e", f"trace={calls}"]
        if fault is not None:
            command += ["-e", f"inject={calls}:{fault.at(when)}"]
        command += [*(["-f"] if follow else []), "-o", str(output), "-p", str(pid)]
        # Not a pipe, which it might fill, and wait then.
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=said)
        try:
            wait_for(f"strace attached to {pid}", self._is_attached)
        except BaseException:
            self.stop()
            raise

    def _is_attached(self) -> bool:
        """Whether no call can escape any more: it says so when it has interrupted every thread, not only seized it."""
        said = self._said.read_text(errors="replace")
        if self._process.poll() is not None:
            raise RuntimeError(f"strace does not attach to {self._pid}: {said}")
        task = f"/proc/{self._pid}/task"
        threads = os.listdir(task) if self._follows else [str(self._pid)]
        return f"Process {self._pid} attached" in said and all(
            _tracer(f"{task}/{thread}") == self._process.pid for thread in threads
        )

    def stop(self) -> None:
        """Detach. Idempotent.

        strace detaches a process that has just been stopped for a signal without that signal (PTRACE_DETACH of
        ptrace(2)). Launcher and supervisors hear of the death of a child by one: it is sent again, which harms nobody.
        """
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGCHLD)

    def await_deaths(self) -> None:
        """Return when those are dead that it has killed: they take their time, and answer nobody meanwhile."""
        if self._fault is not None and self._fault.what == "KILL":
            for thread, _ in self._signalled():
                wait_for("the death of what was killed", partial(_is_dead, thread or self._pid))

    def has_killed(self, pid: int) -> bool:
        is_kill = self._fault is not None and self._fault.what == "KILL"
        return is_kill and self._pid == pid and bool(self._signalled())

    @property
    def places(self) -> set[Place]:
        """Every call that was made, of several threads by any, but for what `is_foreign`."""
        seen: Counter[tuple[str, str]] = Counter()
        found = set()
        for thread, name, text in self._calls():
            seen[thread, name] += 1
            if not _cannot_fail_so(text):
                found.add((name, seen[thread, name]))
        return found

    @property
    def struck(self) -> list[str]:
        """The calls that the fault has hit."""
        if self._fault is None:
            return []
        if not self._fault.is_signal:
            return [text for _, _, text in self._calls() if "(INJECTED)" in text]
        return [text for _, text in self._signalled()]

    def _signalled(self) -> list[tuple[str, str]]:
        """The threads that a signal has hit, and the calls at which it did."""
        seen: Counter[tuple[str, str]] = Counter()
        hit = []
        for thread, name, text in self._calls():
            seen[thread, name] += 1
            if seen[thread, name] == self._when:
                hit.append((thread, text))
        return hit

    @property
    def is_foreign(self) -> bool:
        """Whether it has hit what cannot fail so, as a read or write of a pipe, socket, terminal or eventfd.

        They wake threads of gRPC, and our loops at a signal, which may wait for ever then. So does gRPC where its own
        send fails for want of memory (ENOBUFS): until there is room, of which an edge-triggered epoll says nothing, as
        there was room.
        """
        return any(
            _cannot_fail_so(call) or ("ENOBUFS" in call and _OF_GRPC.match(call))
            for call in self.struck
        )

    def _calls(self) -> list[tuple[str, str, str]]:
        """Thread, name and text of each call; the second half of an interrupted line is not another one."""
        try:
            lines = self._output.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return []
        pattern = re.compile(r"(\d+ +)?((\w+)\(.*)")
        return [
            ((match[1] or "").strip(), match[3], match[2])
            for line in lines
            if (match := pattern.fullmatch(line)) is not None
        ]


def _cannot_fail_so(call: str) -> bool:
    return bool(_WAKE_UP.match(call) or _NO_DUPLICATE.match(call))


def _tracer(task: str) -> int:
    try:
        with open(f"{task}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("TracerPid"))
    except (OSError, StopIteration):
        return 0


def _is_dead(thread: str | int) -> bool:
    """Whether a thread has ended, of a process also all others."""
    stat = leaks.read(f"/proc/{thread}/stat").rpartition(b")")[2].split()
    return not stat or stat[0] in (b"Z", b"X")


def unavailable() -> str:
    """The reason why nothing can be traced here, or ""."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    with (
        tempfile.TemporaryDirectory(prefix="na-strace-") as folder,
        subprocess.Popen(["sleep", "1000"]) as sleeper,
    ):
        try:
            Injection(sleeper.pid, "read", None, 1, output=Path(folder, "strace")).stop()
        except RuntimeError as error:
            return str(error)
        finally:
            sleeper.kill()
    return ""
