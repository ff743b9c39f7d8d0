"""What a person at a terminal sees of exec and attach: crictl in tmux, over both wires."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.streams import Streams
from tests.e2e.terminals import COLUMNS, ROWS, Terminal
from tests.support.cri import RUNNING, Container, Cri
from tests.support.node import wait_for

Open = Callable[[list[str]], Terminal]

PROMPT = "/ # "
DETACH = ("C-p", "C-q")
SIZES = "stty size; trap 'stty size; exit 0' WINCH; while :; do sleep 0.1; done"


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Open]:
    """Opens terminals for command lines."""
    with ExitStack() as stack:

        def open_one(command: list[str]) -> Terminal:
            number = len(list(tmp_path.iterdir()))
            opened = Terminal(tmp_path / f"tmux-{number}", command)
            stack.callback(opened.close)
            return opened

        yield open_one


@pytest.fixture(scope="module")
def container(cri: Cri) -> Iterator[Container]:
    made = cri.run()
    yield made
    made.pod.remove()


def test_a_shell(streams: Streams, container: Container, terminal: Open) -> None:
    """Ctrl-C ends what the shell runs, and the shell's end is crictl's."""
    shell = terminal(streams.command("exec", "-it", container.id, "sh"))
    shell.shows(PROMPT)
    shell.type("answer=$((6 * 7))")
    shell.type("sleep 1234")
    wait_for("the sleep", lambda: "sleep 1234" in container.shell("ps"))
    shell.press("C-c")
    shell.type("echo ended with $?, answer $answer")
    shell.shows("ended with 130, answer 42")
    assert "sleep 1234" not in container.shell("ps")
    shell.type("exit 7")
    assert shell.exit_code() == 1  # crictl has but one for errors
    shell.shows("command terminated with exit code 7")


def test_a_client_that_is_gone(streams: Streams, container: Container, terminal: Open) -> None:
    """What has a terminal is hung up; what has none reads the end of its input."""
    shell = terminal(streams.command("exec", "-it", container.id, "sh"))
    shell.shows(PROMPT)
    shell.type("sleep 1235")
    with streams.running("exec", "-i", container.id, "sh", "-c", "sleep 1236 & cat; kill $!"):
        wait_for("both", lambda: {"sleep 1235", "sleep 1236"} <= commands(container))
    shell.kill()
    wait_for("their end", lambda: not {"sleep 1235", "sleep 1236"} & commands(container))


def commands(container: Container) -> set[str]:
    return {line.strip() for line in container.shell("ps -o args").splitlines()}


def test_sizes(streams: Streams, container: Container, terminal: Open) -> None:
    """A program finds the size of crictl's terminal when it starts, and hears of another."""
    program = terminal(streams.command("exec", "-it", container.id, "sh", "-c", SIZES))
    program.shows(f"{ROWS} {COLUMNS}\n")
    program.resize(120, 40)
    program.shows("40 120\n")
    assert program.exit_code() == 0


def test_two_at_one_terminal(streams: Streams, cri: Cri, terminal: Open) -> None:
    """Both see what comes from now on; either leaves, by its keys or killed, and the container goes on."""
    container = cri.run("sh", "-c", "echo before; exec sh", tty=True, stdin=True)
    container.said("before")
    attach = streams.command("attach", "-it", container.id)
    first, second = terminal(attach), terminal(attach)
    for person, name in ((first, "first"), (second, "second")):
        person.type(f"echo {name} came at $((6 * 7))")
        person.shows(f"{name} came at 42\n")
    first.type("echo both see $((6 * 7))")
    for person in (first, second):
        person.shows("both see 42\n")
        assert "before" not in person.screen
    first.press(*DETACH)
    assert first.exit_code() == 0
    second.type("echo one sees $((6 * 7))")
    second.shows("one sees 42\n")
    second.kill()
    third = terminal(attach)
    third.type("echo third came at $((6 * 7))")
    third.shows("third came at 42\n")
    assert "one sees" not in first.screen + third.screen
    third.type("exit 5")
    third.shows("command terminated with exit code 5")
    assert container.ended().exit_code == 5
    container.pod.remove()


def test_the_size_of_who_attaches(streams: Streams, cri: Cri, terminal: Open) -> None:
    container = cri.run("sh", tty=True, stdin=True)
    watcher = terminal(streams.command("attach", "-it", container.id))
    wait_for("its size", lambda: size(container) == f"{ROWS} {COLUMNS}")
    watcher.resize(120, 40)
    wait_for("another size", lambda: size(container) == "40 120")
    assert container.status.state == RUNNING
    container.pod.remove()


def size(container: Container) -> str:
    """The size of the container's terminal."""
    return container.shell("stty -F /dev/console size")
