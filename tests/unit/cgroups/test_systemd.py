import pytest

from nodeagent.cgroups import paths, systemd
from nodeagent.errors import InvalidArgument

ID = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    "parent",
    [
        "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice",
        "/kubepods-burstable-pod1_2.slice",
    ],
)
def test_systemd(parent: str) -> None:
    assert systemd.container(parent, ID) == (
        "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice"
        f"/nodeagent-{ID}.scope"
    )


def test_parents_of_callers() -> None:
    whole = "/kubepods.slice/kubepods-pod1.slice"
    assert systemd.parent("/kubepods-pod1.slice") == systemd.parent(f"{whole}/") == whole
    assert paths.parent(f"{whole}/") == whole
    with pytest.raises(InvalidArgument, match="slice"):
        systemd.parent("/kubepods")


def test_slice_at_the_top() -> None:
    assert systemd.container("/test.slice", "x") == "/test.slice/nodeagent-x.scope"


@pytest.mark.parametrize(
    "parent",
    ["/kubepods", "/a.slice/b.slice", "/a.slice/a--b.slice", "/.slice", "/-.slice", "/a/a-b.slice"],
)
def test_not_a_slice(parent: str) -> None:
    with pytest.raises(InvalidArgument, match="slice"):
        systemd.container(parent, ID)


def test_parents_of_our_own() -> None:
    default = systemd.as_slice("/nodeagent-1a2b")
    assert default == "/nodeagent.slice/nodeagent-1a2b.slice"
    assert systemd.as_slice("/nodeagent-1a2b.slice") == default
    pod = systemd.pod(default, "abc")
    assert pod == f"{default}/nodeagent-1a2b-abc.slice"
    assert systemd.expand_slice(pod) == pod
