from pathlib import Path

from nodeagent.cgroups import hierarchy
from nodeagent.cgroups.hierarchy import ContainerMount
from nodeagent.linux import mountinfo


def line(mount: Path, kind: str, options: str) -> str:
    return f"30 20 0:26 / {mount} rw,nosuid shared:9 - {kind} {kind} rw,{options}\n"


def cgroup2(mount: Path, controllers: str) -> str:
    mount.mkdir(exist_ok=True)
    (mount / "cgroup.controllers").write_text(controllers)
    return line(mount, "cgroup2", "nsdelegate,memory_recursiveprot")


def test_v2(tmp_path: Path) -> None:
    found = hierarchy.detect(str(tmp_path), mountinfo.parse(cgroup2(tmp_path, "cpu memory\n")))
    assert found.kind == "v2"
    assert found.controllers == {"cpu", "memory"}
    assert found.mounts() == (ContainerMount("", "cgroup2", "nsdelegate,memory_recursiveprot"),)


def test_hybrid(tmp_path: Path) -> None:
    text = (
        line(tmp_path / "cpu,cpuacct", "cgroup", "xattr,cpu,cpuacct")
        + line(tmp_path / "systemd", "cgroup", "xattr,name=systemd")
        + cgroup2(tmp_path / "unified", "")
    )
    found = hierarchy.detect(str(tmp_path), mountinfo.parse(text))
    assert found.kind == "hybrid"
    assert found.controllers == {"cpu", "cpuacct"}
    assert found.hierarchies[0] is found.unified
    assert found.mounts() == (
        ContainerMount("cpu,cpuacct", "cgroup", "cpu,cpuacct", ("cpu", "cpuacct")),
        ContainerMount("systemd", "cgroup", "none,name=systemd"),
    )


def test_v1_keeps_track_by_the_freezer(tmp_path: Path) -> None:
    text = line(tmp_path / "pids", "cgroup", "pids") + line(
        tmp_path / "freezer", "cgroup", "freezer"
    )
    found = hierarchy.detect(str(tmp_path), mountinfo.parse(text))
    assert found.kind == "v1"
    assert found.hierarchies[0].controllers == {"freezer"}


def test_other_mounts_are_no_hierarchies(tmp_path: Path) -> None:
    text = (
        line(tmp_path / "pids", "cgroup", "pids")
        + line(tmp_path / "again", "cgroup", "pids")
        + line(tmp_path / "a" / "deeper", "cgroup", "cpu")
        + line(Path("/elsewhere"), "cgroup", "memory")
        + line(tmp_path / "tmp", "tmpfs", "size=1")
    )
    found = hierarchy.detect(str(tmp_path), mountinfo.parse(text))
    assert [h.mount for h in found.hierarchies] == [str(tmp_path / "pids")]


def test_a_mount_point_may_have_any_white_space_in_its_name(tmp_path: Path) -> None:
    text = line(tmp_path / "a\rb\x0b\x0c\x1c\x85\u2028c", "tmpfs", "size=1") + line(
        tmp_path / "pids", "cgroup", "pids"
    )
    assert hierarchy.detect(str(tmp_path), mountinfo.parse(text)).controllers == {"pids"}
