"""What a container does to the pipes of its output hurts its own log, and nobody else."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nodeagent.linux import processes
from nodeagent.sandbox.spec import LogLimit
from tests.kernel.sandbox.containers import make_layer, user
from tests.kernel.sandbox.supervised import Node, Pod, eventually, running_node
from tests.support.images import compiled

# One attack for each first argument; all of them need no right but that to their own descriptors.
ATTACKS = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

static void line(int number)
{
	char text[32];
	write(1, text, sprintf(text, "line %d\n", number));
}

static void lines(int count)
{
	for (int number = 1; number <= count; number++)
		line(number);
}

/* Each write is a packet, which ends a read; what does not fit into it is thrown away. */
static void packets(void)
{
	fcntl(1, F_SETFL, fcntl(1, F_GETFL) | O_DIRECT);
	lines(20000);
}

static void sizes(void)
{
	for (int number = 1; number <= 20000; number++) {
		if (number % 50 == 0)
			fcntl(1, F_SETPIPE_SZ, number % 100 ? 4096 : 1 << 20);
		line(number);
	}
}

/* Pages that change after they have been written. */
static void pages(void)
{
	static char page[65536] __attribute__((aligned(4096)));
	for (int round = 0; round < 100; round++) {
		struct iovec part = {page, sizeof page};
		for (unsigned i = 0; i < sizeof page; i++)
			page[i] = i % 64 == 63 ? '\n' : 'a' + round % 2;
		while (part.iov_len) {
			long done = vmsplice(1, &part, 1, 0);
			part.iov_base = (char *)part.iov_base + done;
			part.iov_len -= done;
		}
		memset(page, '\n', sizeof page);
	}
}

/* Takes its output away again, and leaves the pipe now and then without anybody who could write to it. */
static void thief(void)
{
	static char taken[65536];
	int reader = open("/proc/self/fd/1", O_RDONLY | O_NONBLOCK);
	for (int number = 1; number <= 20000; number++) {
		line(number);
		if (number % 7 == 0)
			read(reader, taken, sizeof taken);
	}
}

/* The end of the pipe is seen; then it has a writer again. */
static void ends(void)
{
	int reader = open("/proc/self/fd/1", O_RDONLY | O_NONBLOCK);
	char name[32];
	line(1);
	close(1);
	close(2);
	usleep(200000);
	sprintf(name, "/proc/self/fd/%d", reader);
	open(name, O_WRONLY | O_NONBLOCK);
	for (;;) {
		line(2);
		usleep(1000);
	}
}

int main(int count, char **argument)
{
	setvbuf(stdout, NULL, _IONBF, 0);
	if (!strcmp(argument[1], "packets")) packets();
	else if (!strcmp(argument[1], "sizes")) sizes();
	else if (!strcmp(argument[1], "pages")) pages();
	else if (!strcmp(argument[1], "thief")) thief();
	else if (!strcmp(argument[1], "ends")) ends();
	else return 1;
	if (count > 2)
		pause();
	return 0;
}
"""

NOBODY = {
    "user": user(uid=65534, gid=65534),
    "capabilities": dict.fromkeys(
        ("bounding", "permitted", "effective", "inheritable", "ambient"), 0
    ),
    "no_new_privs": True,
}
COUNTED = [f"line {number}" for number in range(1, 20001)]
TICK = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done"


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_layer(tmp_path_factory.mktemp("image") / "layer")
    (path / "bin" / "attack").write_bytes(compiled(ATTACKS))
    (path / "bin" / "attack").chmod(0o755)
    return path


@pytest.fixture
async def node(tmp_path: Path, layer: Path) -> AsyncIterator[Node]:
    async with running_node(tmp_path, layer) as node:
        yield node


@pytest.fixture
async def pod(node: Node) -> AsyncIterator[Pod]:
    """A pod with a container beside the attacker's, whose log has to be whole in the end."""
    pod = await node.pod()
    await pod.run(TICK, "other")
    yield pod
    written = len(pod.log("other"))
    await eventually(lambda: len(pod.log("other")) > written + 5)
    lines = pod.log("other")
    assert lines == [str(number + 1) for number in range(len(lines))]


async def attack(pod: Pod, name: str, **changes: Any) -> None:
    await pod.run(["/bin/attack", name], process=NOBODY, **changes)


async def rests(pod: Pod) -> None:
    """Return once the supervisor waits: one that spins never does, on however busy a machine."""
    await eventually(lambda: processes.stat_fields(pod.supervisor.pid)[0] == b"S")


async def test_packets(pod: Pod) -> None:
    await attack(pod, "packets")
    assert (await pod.wait("main"))["code"] == 0
    assert pod.log() == COUNTED
    await rests(pod)


async def test_packets_that_come_while_supervisors_die(pod: Pod) -> None:
    await attack(pod, "packets")
    for _ in range(3):
        await asyncio.sleep(0.05)
        await pod.kill_supervisor()
        await pod.succeed()
    await pod.wait("main")
    assert pod.log() == COUNTED


async def test_a_packet_in_the_pipe_when_nobody_writes_any_more(pod: Pod) -> None:
    await pod.run(["/bin/attack", "packets", "stay"], process=NOBODY)
    await eventually(lambda: len(pod.log()) == len(COUNTED))
    assert pod.log() == COUNTED
    await rests(pod)
    await pod.supervisor.stop("main", signal.SIGKILL, 0)
    await pod.wait("main")


async def test_a_pipe_that_changes_its_size(pod: Pod) -> None:
    await attack(pod, "sizes")
    await pod.wait("main")
    assert pod.log() == COUNTED


async def test_pages_that_change_after_they_were_written(pod: Pod) -> None:
    """Its own log has one or the other; what a supervisor that is killed has taken, its successor has as well."""
    await attack(pod, "pages")
    for _ in range(3):
        await asyncio.sleep(0.05)
        await pod.kill_supervisor()
        await pod.succeed()
    await pod.wait("main")
    text = "".join(line + "\n" for line in pod.log())
    assert len(text) == 100 * 65536
    assert set(text) <= set("ab\n")
    await rests(pod)


async def test_a_reader_of_its_own_pipe(pod: Pod) -> None:
    await pod.run(["/bin/attack", "thief"])
    assert (await pod.wait("main"))["code"] == 0
    await rests(pod)
    assert {tag for _, tag, _ in pod.records()} <= {"F"}


async def test_an_end_that_is_opened_again(pod: Pod) -> None:
    await pod.run(["/bin/attack", "ends"])
    await eventually(lambda: pod.log() == ["line 1"])
    await rests(pod)
    await pod.supervisor.stop("main", signal.SIGKILL, 0)
    assert (await pod.wait("main"))["code"] == 137


async def test_a_terminal_that_nobody_has_open_for_a_while(pod: Pod) -> None:
    script = (
        "echo 1; exec 0<&- 1>&- 2>&-; sleep 0.5; exec 1> /dev/console; echo 2; sleep 0.5; echo 3"
    )
    await pod.run(script, tty=True)
    assert (await pod.wait("main"))["code"] == 0
    assert pod.log() == ["1\r", "2\r", "3\r"]


async def test_a_terminal_that_was_let_go_of_while_supervisors_change(pod: Pod) -> None:
    script = "exec 0<&- 1>&- 2>&-; sleep 1; exec 1> /dev/console; echo 2; sleep 0.5; echo 3"
    await pod.run(script, tty=True)
    await pod.kill_supervisor()
    await pod.succeed()
    await pod.wait("main")
    assert pod.log() == ["2\r", "3\r"]
    await rests(pod)


async def test_a_log_that_has_become_something_else_is_lost_alone(pod: Pod) -> None:
    """A container that shares the directory can do that; a successor of the supervisor finds it so."""
    await pod.run(TICK)
    await eventually(lambda: len(pod.log()) > 5)
    await pod.kill_supervisor()
    pod.log_path().rename(pod.log_path().with_name("moved"))
    pod.log_path().mkdir()
    await pod.succeed()
    assert {state.id for state in await pod.supervisor.state()} == {"main", "other"}
    await pod.supervisor.stop("main", signal.SIGKILL, 0)
    assert (await pod.wait("main"))["code"] == 137


# ---- the limit ----

LIMIT = LogLimit(bytes_per_second=1 << 20, burst_bytes=1 << 20)


async def test_a_flood_of_newlines_is_held_back(pod: Pod) -> None:
    """Each of them is 45 bytes in the log. The container waits, the supervisor rests."""
    begin = time.monotonic()
    await pod.run("yes ''", log_limit=LIMIT)
    await asyncio.sleep(2)
    size = pod.log_path().stat().st_size
    # One read may be all newlines, and overdraws by what they make.
    allowed = allowed_bytes(LIMIT, begin) + (4 << 20)
    assert LIMIT["burst_bytes"] < size < allowed
    await rests(pod)
    [state] = [state for state in await pod.supervisor.state() if state.id == "main"]
    assert state.held_back_ms > 0
    await pod.supervisor.stop("main", signal.SIGKILL, 0)
    await pod.wait("main")


async def test_many_small_writes_count_for_more_than_their_bytes(pod: Pod) -> None:
    """What they cost is that somebody wakes up for each; all that was read at once has one stamp."""
    begin = time.monotonic()
    await pod.run("while :; do echo; done", log_limit=LIMIT)
    await asyncio.sleep(2)
    reads = {line.split()[0] for line in pod.log_path().read_bytes().splitlines()}
    assert len(reads) <= allowed_bytes(LIMIT, begin) / 4096 + 1
    await pod.supervisor.stop("main", signal.SIGKILL, 0)
    await pod.wait("main")


async def test_nothing_is_lost_to_a_limit(pod: Pod) -> None:
    await pod.run(["/bin/attack", "packets"], log_limit=LIMIT)
    await asyncio.sleep(0.1)
    await pod.kill_supervisor()
    await pod.succeed()
    assert (await pod.wait("main"))["code"] == 0
    assert pod.log() == COUNTED


def allowed_bytes(limit: LogLimit, begin: float) -> float:
    """Since then, of the monotonic clock."""
    return limit["burst_bytes"] + (time.monotonic() - begin) * limit["bytes_per_second"]
