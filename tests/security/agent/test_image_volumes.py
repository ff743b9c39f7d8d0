"""Volumes of images whose authors mean harm: what is where VOLUME is, and where that leads."""

import os
import stat
from pathlib import Path

import pytest

from nodeagent.api import runtime_pb2 as pb
from nodeagent.lifecycle.usage import disk
from tests.e2e.conftest import client, own_agent
from tests.security.agent.conftest import PullHostile, pull_hostile
from tests.support import tars
from tests.support.cri import Cri, Pod
from tests.support.node import RunningAgent, wait_for
from tests.support.registry import Registry

__all__ = ["own_agent"]

SPARSE = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 40)}


def making(pod: Pod, image: pb.ImageSpec) -> pb.CreateContainerRequest:
    config = pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name="main"), image=image, command=["sleep", "1000"]
    )
    return pb.CreateContainerRequest(
        pod_sandbox_id=pod.id, sandbox_config=pod.config, config=config
    )


def made(cri: Cri) -> list[Path]:
    """What is on the disk of containers, or on its way from there."""
    return [
        *(cri.agent.root / "lib/containers").iterdir(),
        *(cri.agent.root / "lib/trash").iterdir(),
    ]


def mounts_of(cri: Cri) -> list[str]:
    """In the agent's directories, but for those of pods that wait to be taken."""
    table = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in table if str(cri.agent.root) in line and "/run/pods/" not in line]


def test_what_is_where_volumes_are(cri: Cri, hostile: PullHostile, outside: Path) -> None:
    """A file of a terabyte in a layer of 200 bytes, links out of the image, a pipe, a device, a set-user-ID program."""
    members = [
        tars.directory("d/sub"),
        tars.file("d/sparse", b"x", pax_headers=SPARSE),
        tars.link("d/sub/again", "d/sparse"),
        tars.file("d/setuid", b"#!/bin/sh", mode=0o4755),
        tars.symlink("d/out", str(outside)),
        tars.member("d/pipe", b"6"),
        tars.char("d/null", 1, 3, mode=0o666),
        tars.symlink("to-node", f"../../../../../..{outside}"),
        tars.symlink("to-proc", "/proc/1/root"),
        tars.symlink("to-root", ".."),
    ]
    places = [
        "/d",
        "/d/sub",
        "/d/sub/../..",
        "/to-node/made",
        "/to-proc/made",
        "/to-root",
        "/sys/x",
    ]
    image = hostile(*members, Volumes={place: {} for place in places})
    before = mounts_of(cri)
    pod = cri.pod()
    answer = cri.agent.runtime.CreateContainer(making(pod, image), timeout=60)
    own = cri.agent.root / "lib/containers" / answer.container_id
    used = disk.measure(own / "upper", own / "volumes").used_bytes
    assert used is not None
    assert used < 1 << 20
    (volumes,) = (path for path in (own / "volumes").iterdir() if (path / "setuid").exists())
    assert (volumes / "sparse").stat().st_size == 1 << 40
    assert (volumes / "sparse").stat().st_ino == (volumes / "sub/again").stat().st_ino
    assert stat.S_ISFIFO((volumes / "pipe").stat().st_mode)
    assert os.readlink(volumes / "out") == str(outside)
    pod.remove()
    wait_for(
        "an empty disk",
        lambda: not own.exists() and not list((cri.agent.root / "lib/trash").iterdir()),
    )
    assert mounts_of(cri) == before


@pytest.mark.parametrize("end", ["agent", "pod"])
def test_nothing_is_left_of_a_volume_that_was_being_filled(
    own_agent: RunningAgent, registry: Registry, end: str
) -> None:
    """Volumes in volumes: the innermost files are copied for each."""
    cri = client(own_agent, registry)
    path = "/".join(["d"] * 60)
    image = pull_hostile(
        cri,
        registry,
        *(tars.file(f"{path}/{number}") for number in range(2000)),
        Volumes={"/" + "/".join(["d"] * depth): {} for depth in range(1, 60)},
    )
    pod = cri.pod()
    call = cri.agent.runtime.CreateContainer.future(making(pod, image))
    wait_for("a volume", lambda: any((each / "volumes/0").exists() for each in made(cri)))
    if end == "agent":
        own_agent.kill()
        call.cancel()
        own_agent.start()
    else:
        pod.remove()
        call.cancel()
    wait_for("an empty disk", lambda: not made(cri))
    if end == "agent":
        pod.run(name="other")
        pod.remove()
    assert cri.run("true").ended().exit_code == 0
