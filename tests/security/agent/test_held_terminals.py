"""A process that writes to its terminal what a file system never answers for holds the line discipline meanwhile.

Who closes the master then waits, uninterruptibly, until the file system's server goes (tty_ldisc_hangup).
"""

import os
import subprocess
from pathlib import Path

import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.e2e.streams import Streams
from tests.security.agent.conftest import NEEDS_FUSE, PullHostile
from tests.support import images, tars
from tests.support.cri import Container, Cri
from tests.support.node import wait_for

# A child writes a page of the file to the terminal; the parent ends, with what is the exec.
HOLD_TERMINAL = r"""
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
int main(void)
{
	int file = open("/fuse/page", O_RDONLY);
	char *page = mmap(0, 4096, PROT_READ, MAP_PRIVATE, file, 0);
	char line[16];
	if (page == MAP_FAILED)
		return 1;
	signal(SIGHUP, SIG_IGN);
	if (!fork())
		write(1, page, 64);
	read(0, line, sizeof line);
	return 7;
}
"""


@pytest.fixture
def image(hostile: PullHostile) -> pb.ImageSpec:
    return hostile(tars.file("hold", images.compiled(HOLD_TERMINAL), mode=0o755))


@NEEDS_FUSE
def test_the_terminal_of_an_exec_that_is_held(
    cri: Cri, crictl: Path, image: pb.ImageSpec, silent: Path
) -> None:
    mount = pb.Mount(container_path="/fuse", host_path=str(silent), readonly=True)
    container = cri.run(image=image, mounts=[mount])
    other = cri.run()
    client = Streams(crictl, cri, "websocket").command("exec", "-i", "-t", container.id, "/hold")
    keyboard, screen = os.openpty()
    with subprocess.Popen(client, stdin=screen, stdout=screen, stderr=screen) as process:
        os.close(screen)
        wait_for("the lock", lambda: holds(container))
        os.write(keyboard, b"\n")
        assert process.wait(timeout=60) in (1, 7)
    os.close(keyboard)
    cri.agent.runtime.Version(pb.VersionRequest(), timeout=60)
    assert other.exec("echo", "well").stdout == b"well\n"
    other.pod.remove()


@NEEDS_FUSE
def test_the_terminal_of_an_attached_container_that_is_held(
    cri: Cri, crictl: Path, image: pb.ImageSpec, silent: Path
) -> None:
    mount = pb.Mount(container_path="/fuse", host_path=str(silent), readonly=True)
    container = cri.run("/hold", image=image, tty=True, stdin=True, mounts=[mount])
    other = cri.run()
    client = Streams(crictl, cri, "websocket").command("attach", "-i", "-t", container.id)
    keyboard, screen = os.openpty()
    with subprocess.Popen(client, stdin=screen, stdout=screen, stderr=screen) as process:
        os.close(screen)
        wait_for("the lock", lambda: holds(container))
        os.write(keyboard, b"\n")
        cri.agent.runtime.Version(pb.VersionRequest(), timeout=60)
        process.kill()
    os.close(keyboard)
    cri.agent.runtime.Version(pb.VersionRequest(), timeout=60)
    assert other.exec("echo", "well").stdout == b"well\n"
    other.pod.remove()


def holds(container: Container) -> bool:
    """Whether a process of it waits for an answer of the file system."""
    return any(waits(path, container.id) for path in Path("/proc").glob("[0-9]*"))


def waits(process: Path, container_id: str) -> bool:
    try:
        if container_id not in (process / "cgroup").read_text():
            return False
        return (process / "wchan").read_text() == "request_wait_answer"
    except OSError:  # it has ended
        return False
