"""What image and caller say together about a process."""

import pytest

from nodeagent.errors import InvalidArgument
from nodeagent.lifecycle.plan import process
from nodeagent.linux import capabilities
from nodeagent.records import ImageConfig
from nodeagent.requests import CapabilityChange, ContainerConfig
from nodeagent.sandbox import spec

IMAGE = ImageConfig(entrypoint=("/entry",), cmd=("a", "b"), env=("X=image", "Y=image"))


def config(**fields: object) -> ContainerConfig:
    return ContainerConfig(name="main", image="image", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, ["/entry", "a", "b"]),
        ({"args": ("c",)}, ["/entry", "c"]),
        ({"command": ("/cmd",)}, ["/cmd"]),
        ({"command": ("/cmd",), "args": ("c",)}, ["/cmd", "c"]),
    ],
)
def test_arguments(fields: dict[str, object], wanted: list[str]) -> None:
    assert process.arguments(config(**fields), IMAGE) == wanted


def test_no_command_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r'"main".*"image"'):
        process.arguments(config(), ImageConfig())


def test_environment() -> None:
    merged = process.environment(config(envs=(("Y", b"\xff"), ("Z", b""))), IMAGE, "pod")
    assert merged == [
        f"PATH={spec.DEFAULT_PATH}",
        "HOSTNAME=pod",
        "X=image",
        "Y=\udcff",
        "Z=",
    ]
    assert "TERM=xterm" in process.environment(config(tty=True), IMAGE, "pod")


def test_a_name_alone_in_an_image_takes_a_variable_away() -> None:
    image = ImageConfig(env=("X=1", "PATH", "X", "", "Y=2"))
    assert process.environment(config(), image, "pod") == ["HOSTNAME=pod", "Y=2"]


def test_a_variable_without_a_name_is_refused_when_a_container_is_made() -> None:
    with pytest.raises(InvalidArgument, match='image "image": its Env has "=x"'):
        process.environment(config(), ImageConfig(env=("=x",)), "pod")


@pytest.mark.parametrize(
    ("image_user", "wanted"),
    [
        ("", (None, "", None, "")),
        ("1000", (1000, "", None, "")),
        ("1000:50", (1000, "", 50, "")),
        ("www", (None, "www", None, "")),
        ("www:staff", (None, "www", None, "staff")),
    ],
)
def test_user_of_the_image(image_user: str, wanted: tuple[object, ...]) -> None:
    user = process.user(config(), ImageConfig(user=image_user))
    assert (user["uid"], user["username"], user["gid"], user["groupname"]) == wanted


def test_the_caller_s_user_replaces_the_image_s() -> None:
    user = process.user(config(run_as_user=7), ImageConfig(user="www:staff"))
    assert (user["uid"], user["username"], user["gid"], user["groupname"]) == (7, "", None, "")


@pytest.mark.parametrize(
    ("image_signal", "wanted"), [("", 15), ("SIGQUIT", 3), ("quit", 3), ("9", 9), ("RTMIN+1", 35)]
)
def test_stop_signal(image_signal: str, wanted: int) -> None:
    assert process.stop_signal(config(), ImageConfig(stop_signal=image_signal)) == wanted
    assert process.stop_signal(config(stop_signal=2), ImageConfig(stop_signal=image_signal)) == 2


@pytest.mark.parametrize(
    "name", ["SIGNOPE", "0", "99", "RTMIN+99", "٣", "9" * 5000, "RTMIN+" + "9" * 5000]
)
def test_unknown_stop_signal(name: str) -> None:
    with pytest.raises(InvalidArgument, match="stop signal"):
        process.stop_signal(config(), ImageConfig(stop_signal=name))


DEFAULT = capabilities.mask(process.DEFAULT_CAPABILITIES)
NET_RAW, NET_ADMIN = capabilities.mask(["NET_RAW"]), capabilities.mask(["NET_ADMIN"])
ALL = capabilities.known()


@pytest.mark.parametrize(
    ("change", "effective", "ambient"),
    [
        (CapabilityChange(), DEFAULT, 0),
        (CapabilityChange(add=("NET_ADMIN",)), DEFAULT | NET_ADMIN, 0),
        (CapabilityChange(drop=("NET_RAW",)), DEFAULT & ~NET_RAW, 0),
        (CapabilityChange(add=("ALL",)), ALL, 0),
        (CapabilityChange(drop=("ALL",)), 0, 0),
        (CapabilityChange(add=("NET_ADMIN",), drop=("ALL",)), NET_ADMIN, 0),
        (CapabilityChange(add=("ALL",), drop=("NET_RAW",)), ALL & ~NET_RAW, 0),
        (CapabilityChange(add_ambient=("NET_ADMIN",)), DEFAULT | NET_ADMIN, NET_ADMIN),
    ],
)
def test_capabilities(change: CapabilityChange, effective: int, ambient: int) -> None:
    sets = process.capability_sets(change, privileged=False)
    assert (sets["effective"], sets["bounding"], sets["permitted"]) == (effective,) * 3
    assert (sets["ambient"], sets["inheritable"]) == (ambient, ambient)


def test_privileged_has_everything() -> None:
    sets = process.capability_sets(CapabilityChange(drop=("ALL",)), privileged=True)
    assert (sets["effective"], sets["ambient"]) == (ALL, 0)
