"""A real agent to attack, images made for it, and a check that the node's files stay as they are."""

import itertools
import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.e2e.conftest import agent, cri
from tests.security.fuse import Node, serving
from tests.support import fake_registry, images
from tests.support.cri import Cri
from tests.support.registry import Registry
from tests.support.tars import Member

__all__ = ["agent", "cri"]

PullHostile = Callable[..., pb.ImageSpec]

NEEDS_FUSE = pytest.mark.skipif(
    not os.path.exists("/dev/fuse"), reason="this kernel has no FUSE: the guest's, for one"
)

_tags = itertools.count()


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A directory of the node that nothing may get at."""
    path = tmp_path / "outside"
    path.mkdir()
    (path / "precious").write_text("precious")
    yield path
    assert os.listdir(path) == ["precious"]
    assert (path / "precious").read_text() == "precious"


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "volume"
    path.mkdir()
    return path


@pytest.fixture
def hostile(cri: Cri, registry: Registry) -> PullHostile:
    """hostile(*members, **config): as `pull_hostile`, for the agent of all tests."""
    return partial(pull_hostile, cri, registry)


def pull_hostile(cri: Cri, registry: Registry, *members: Member, **config: Any) -> pb.ImageSpec:
    """Pull busybox with a layer of these members on top, and this config."""
    layers = images.busybox().layers
    if members:
        layers += (fake_registry.layer(*members),)
    tag = str(next(_tags))
    registry.push(images.Image("test/hostile", (tag,), layers, {**images.SHELL, **config}))
    spec = pb.ImageSpec(image=f"{registry.host}/test/hostile:{tag}")
    cri.agent.images.PullImage(pb.PullImageRequest(image=spec), timeout=60)
    return spec


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Path]:
    """Where a file system has a file `page` that to read is never answered."""
    point = tmp_path / "fuse"
    point.mkdir()
    with serving(point, {"page": [Node(stat.S_IFREG | 0o644, size=4096, silent=True)]}):
        yield point


def attempted(call: Callable[[], object]) -> str:
    """What an attack says that may be refused; empty where it is not."""
    try:
        call()
    except grpc.RpcError as error:
        return error.details() or error.code().name
    return ""
