"""Every field of an image's config that is read has an effect; one that has none is not read."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from nodeagent.config import Config
from nodeagent.cri import messages, verbose
from nodeagent.images import manifest
from nodeagent.lifecycle.plan import process
from nodeagent.lifecycle.plan.devices import ContainerDevices
from nodeagent.lifecycle.plan.planner import HostInputs, Planner
from nodeagent.lifecycle.plan.selinux import NO_LABELS
from nodeagent.records import Container, Image, ImageConfig, Sandbox
from nodeagent.requests import ContainerConfig, Resources, SandboxConfig
from nodeagent.sandbox.seccomp.profile import Filter

IMAGE = ImageConfig(
    user="1000:44",
    env=("A=b",),
    entrypoint=("/entry",),
    cmd=("argument",),
    working_dir="/srv",
    stop_signal="SIGQUIT",
    labels={"maintainer": "somebody"},
    volumes=("/data",),
)
SHOWN = frozenset(("labels",))  # in the verbose status of the image, for people


class Recording:
    """A config that remembers which of its fields were read."""

    def __init__(self) -> None:
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> object:
        self.read.add(name)
        return getattr(IMAGE, name)


def planner() -> Planner:
    """The planner of a node without images, profiles and hierarchies."""
    none: Any = SimpleNamespace(
        lower_dirs=lambda _image: (),
        mounts=lambda: (),
        delegates=False,
        selinux=lambda _config: NO_LABELS,
    )
    return Planner(none, none, none, none, none, Config(), pods=Path("/pods"))


def plan_of(image: Image) -> None:
    config = ContainerConfig(name="c", image="i")
    container = Container(
        id="c",
        sandbox_id="s",
        config=config,
        image_id=image.id,
        image_ref=image.id,
        image_name="i",
        cgroup_path="/c",
        resources=Resources(),
        stop_signal=process.stop_signal(config, image.config),
    )
    sandbox = Sandbox(
        id="s",
        config=SandboxConfig(name="n", uid="u", namespace="ns", hostname="h"),
        cgroup_parent="/p",
        boot_id="b",
        created_at=1,
    )
    inputs = HostInputs(ContainerDevices([], []), Filter(b"", 0), "")
    planner().plan(sandbox, container, image, inputs, Path("/container"))


def image_with(config: object) -> Image:
    return Image(
        id="sha256:1",
        manifest="m",
        layers=(),
        size_bytes=1,
        config=cast(ImageConfig, config),
        pulled_at=1,
    )


def test_what_is_parsed_is_used() -> None:
    recording = Recording()
    plan_of(image_with(recording))
    messages.image(image_with(recording))
    assert recording.read | SHOWN == set(ImageConfig.__struct_fields__)
    shown = verbose.image_info(image_with(IMAGE))["info"]
    assert all(str(value) in shown for value in IMAGE.labels.values())


def test_what_is_read_of_the_document_is_kept() -> None:
    assert set(manifest._Run.__struct_fields__) == set(ImageConfig.__struct_fields__)
