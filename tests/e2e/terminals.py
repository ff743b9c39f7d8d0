"""Terminals for real clients, each with a tmux server of its own: what is typed, and what is on the screen."""

import os
import re
import signal
import subprocess
from pathlib import Path

from tests.support.node import wait_for

COLUMNS, ROWS = 100, 30
PATIENCE_SECONDS = 30.0

# tmux 3.3 does not always see that its child has ended; a shell does.
SHELL = ("sh", "-c", '"$@"; echo "[ended: $?]"', "sh")
ENDED = re.compile(r"\[ended: (\d+)\]")


class Terminal:
    """A command in a terminal. The screen stays when it has ended."""

    def __init__(self, socket: Path, command: list[str]) -> None:
        self._tmux = ["tmux", "-S", str(socket), "-f", os.devnull]
        self._ask(
            *("start-server", ";", "set", "-g", "remain-on-exit", "on"),
            *(";", "set", "-g", "status", "off"),
            *(";", "new-session", "-d", "-x", str(COLUMNS), "-y", str(ROWS), *SHELL, *command),
        )

    @property
    def screen(self) -> str:
        """Lines as they were written, however wide."""
        return self._ask("capture-pane", "-p", "-J")

    def type(self, line: str) -> None:
        """A line, and return."""
        self._ask("send-keys", "-l", line)
        self.press("Enter")

    def press(self, *keys: str) -> None:
        """Keys by the names that tmux has for them."""
        self._ask("send-keys", *keys)

    def resize(self, columns: int, rows: int) -> None:
        self._ask("resize-window", "-x", str(columns), "-y", str(rows))

    def shows(self, text: str) -> None:
        """Return once this is on the screen."""
        try:
            wait_for("the text", lambda: text in self.screen, PATIENCE_SECONDS)
        except AssertionError:
            raise AssertionError(f"{text!r} is not on the screen:\n{self.screen}") from None

    def exit_code(self) -> int:
        """The exit code of the command, once it has ended."""
        self.shows("[ended: ")
        ended = ENDED.search(self.screen)
        assert ended is not None, self.screen
        return int(ended[1])

    def kill(self) -> None:
        """The command, not its terminal."""
        shell = self._ask("display-message", "-p", "#{pane_pid}").strip()
        os.kill(int(Path(f"/proc/{shell}/task/{shell}/children").read_text()), signal.SIGKILL)

    def close(self) -> None:
        self._ask("kill-server")

    def _ask(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self._tmux, *arguments], capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout
