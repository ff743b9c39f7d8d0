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


def test_pod() -> None:
    assert paths.pod("/nodeagent-1", "abc") == "/nodeagent-1/abc"
