import pytest

from nodeagent.cgroups import paths
from nodeagent.errors import InvalidArgument

ID = "0123456789abcdef" * 4


def test_cgroupfs() -> None:
    assert paths.container("/kubepods/burstable/pod1/", ID) == f"/kubepods/burstable/pod1/{ID}"


@pytest.mark.parametrize(
    "path",
    ["", "/", "//", "a/b", "/a/../b", "/a//b", "/a/./b", "/a\n/b", "/a\0", "/" + "a" * 256],
)
def test_not_a_path(path: str) -> None:
    with pytest.raises(InvalidArgument, match="cgroup"):
        paths.check(path)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a b", "é", "a" * 256])
def test_not_a_name(name: str) -> None:
    with pytest.raises(InvalidArgument, match="name"):
        paths.container("/a", name)


@pytest.mark.parametrize(
    "parent",
    [
        "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice",
        "/kubepods-burstable-pod1_2.slice",
    ],
)
def test_systemd(parent: str) -> None:
    assert paths.scope(parent, ID) == (
        "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice"
        f"/nodeagent-{ID}.scope"
    )


def test_slice_at_the_top() -> None:
    assert paths.scope("/test.slice", "x") == "/test.slice/nodeagent-x.scope"


@pytest.mark.parametrize(
    "parent",
    ["/kubepods", "/a.slice/b.slice", "/a.slice/a--b.slice", "/.slice", "/-.slice", "/a/a-b.slice"],
)
def test_not_a_slice(parent: str) -> None:
    with pytest.raises(InvalidArgument, match="slice"):
        paths.scope(parent, ID)
