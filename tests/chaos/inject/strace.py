"""Faults at the kernel's boundary, by strace's injection: the n-th call of a set fails, or kills, or stops its caller.

Each thread that is traced has a
number for each call: its third openat(2), its third mkdir(2).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

Place = tuple[str, int]  # a call, and its number among those of that name

SIGNALS = ("KILL", "STOP")
_WAKE_UP = re.compile(r"(write|read)\(\d+<(socket|anon_inode|UNIX|pipe)")
_ATTACH_SECONDS = 20.0


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
        output.unlink(missing_ok=True)
        command = ["strace", "-qq", "-y", "-s", "80", "-e", "signal=none", "-e", f"trace={calls}"]
        if fault is not None:
            command += ["-e", f"inject={calls}:{fault.at(when)}"]
        command += [*(["-f"] if follow else []), "-o", str(output), "-p", str(pid)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self._await_attachment(pid)

    def _await_attachment(self, pid: int) -> None:
        deadline = time.monotonic() + _ATTACH_SECONDS
        while not self._is_attached(pid):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                raise RuntimeError(
                    f"strace does not attach to {pid}: {self._process.communicate()[1]}"
                )
            time.sleep(0.005)

    def _is_attached(self, pid: int) -> bool:
        threads = os.listdir(f"/proc/{pid}/task") if self._follows else [str(pid)]
        return all(_tracer(f"/proc/{pid}/task/{thread}") == self._process.pid for thread in threads)

    def stop(self) -> None:
        """Detach. Idempotent."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.communicate(timeout=_ATTACH_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    @property
    def places(self) -> set[Place]:
        """Every call that was made, of several threads by any, but for what `is_foreign`."""
        seen: Counter[tuple[str, str]] = Counter()
        found = set()
        for thread, name, text in self._calls():
            seen[thread, name] += 1
            if not _WAKE_UP.match(text):
                found.add((name, seen[thread, name]))
        return found

    @property
    def struck(self) -> list[str]:
        """The calls that the fault has hit."""
        if self._fault is None:
            return []
        if not self._fault.is_signal:
            return [text for _, _, text in self._calls() if "(INJECTED)" in text]
        seen: Counter[tuple[str, str]] = Counter()
        hit = []
        for thread, name, text in self._calls():
            seen[thread, name] += 1
            if seen[thread, name] == self._when:
                hit.append(text)
        return hit

    @property
    def is_foreign(self) -> bool:
        """Whether it has hit a read or write of a pipe, socket or eventfd, which cannot fail so.

        They wake threads of gRPC, and our loops at a signal, which may wait for ever then.
        """
        return any(_WAKE_UP.match(call) for call in self.struck)

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


def _tracer(task: str) -> int:
    try:
        with open(f"{task}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("TracerPid"))
    except (OSError, StopIteration):
        return 0


def unavailable() -> str:
    """The reason why nothing can be traced here, or ""."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        try:
            tried = subprocess.run(
                ["strace", "-qq", "-c", "-o", "/dev/null", "-p", str(sleeper.pid)],
                capture_output=True,
                text=True,
                timeout=0.5,
                check=False,
            )
            return f"strace cannot attach to a process: {tried.stderr.strip()}"
        except subprocess.TimeoutExpired:
            return ""
        finally:
            sleeper.kill()
