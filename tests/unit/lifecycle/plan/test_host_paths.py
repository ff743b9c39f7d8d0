"""Looks at the node's paths, off the event loop."""

import asyncio
import threading

import pytest

from nodeagent.errors import NotFound, ResourceExhausted
from nodeagent.lifecycle.plan import host_paths
from nodeagent.lifecycle.plan.host_paths import HostPaths
from nodeagent.linux import mountinfo
from tests.support.node import wait_for


def absent() -> None:
    raise NotFound("device: not on this node")


MOUNTS = r"""
22 1 0:1 / / rw - ext4 disk rw
23 22 0:2 / /mnt/hung rw shared:1 - nfs4 server:/ rw
24 22 0:3 / /mnt/with\040blank rw - nfs4 server:/ rw
25 22 0:4 / /dev rw - devtmpfs none rw
"""


async def test_a_look_returns_or_raises_what_its_function_does() -> None:
    paths = HostPaths()
    assert await paths.look_up("it", "/dev/it", lambda: 7) == 7
    with pytest.raises(NotFound, match="not on this node"):
        await paths.look_up("it", "/dev/it", absent)
    assert not paths.under_way


async def test_looks_that_hang_hold_up_only_those_at_their_file_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mountinfo, "table", lambda: MOUNTS)
    answered = threading.Event()
    paths = HostPaths(limit=2)
    hanging = asyncio.create_task(paths.look_up("first", "/mnt/hung/a", answered.wait))
    await asyncio.sleep(0)
    assert await paths.look_up("second", "/mnt/hung/b", lambda: 7) == 7
    given_up = asyncio.create_task(paths.look_up("third", "/mnt/hung/deep/../c", answered.wait))
    await asyncio.sleep(0)
    given_up.cancel()
    for path in ("/dev/a", "/mnt/a", "/mnt/hung-not", "/mnt/with blank/a"):
        assert await paths.look_up("other", path, lambda: 7) == 7
    with pytest.raises(ResourceExhausted, match=r'fourth: "/mnt/hung/a": 2 lookups .* /mnt/hung '):
        await paths.look_up("fourth", "/mnt/hung/a", lambda: 7)
    answered.set()
    assert await hanging
    await asyncio.to_thread(wait_for, "end of the third", lambda: not paths.under_way)
    assert await paths.look_up("fifth", "/mnt/hung/a", lambda: 7) == 7


@pytest.mark.parametrize(
    ("path", "point"),
    [
        ("/mnt/hung", "/mnt/hung"),
        ("/mnt/hung/a", "/mnt/hung"),
        ("/mnt/hunger", "/"),
        ("/mnt/with blank/a", "/mnt/with blank"),
        ("/dev/disk/by-id/a", "/dev"),
        ("//mnt//hung//a", "/mnt/hung"),
        ("/", "/"),
    ],
)
def test_the_mount_point_of_a_path(path: str, point: str) -> None:
    points = {mount.point for mount in mountinfo.parse(MOUNTS)}
    assert host_paths.mount_point(path, points) == point
