"""Volumes of an image: directories of the container's own, with what the image has there."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nodeagent import disk_reserve, files
from nodeagent.linux import userns
from nodeagent.sandbox import rootfs_defaults
from nodeagent.sandbox.init import volumes as made
from nodeagent.sandbox.spec import ContainerPlan, Volume
from tests.kernel.sandbox.conftest import Plan
from tests.kernel.sandbox.containers import run, start, user
from tests.kernel.sandbox.test_init_userns import EXTENTS, FIRST, MAPS, OWNED, with_mounts

MTIME = 1_000_000_000
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service=ep

Volumes = Callable[..., ContainerPlan]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The uppermost layer of the image."""
    path = tmp_path / "image"
    path.mkdir()
    return path


@pytest.fixture
def volumes(plan: Plan, tmp_path: Path, layer: Path, image: Path) -> Volumes:
    """volumes(command, *targets): a container whose image has these VOLUMEs."""

    def make(command: str | list[str], *targets: str, **changes: Any) -> ContainerPlan:
        asked = changes.pop("asked", [])
        own = [
            Volume(source=str(tmp_path / "container" / "volumes" / str(number)), target=target)
            for number, target in enumerate(targets)
        ]
        made = plan(command, mounts=with_mounts(*asked), volumes=own, **changes)
        made["rootfs"]["lower"] = [str(image), str(layer)]
        return made

    return make


def test_a_volume_has_what_the_image_has_there(
    volumes: Volumes, image: Path, tmp_path: Path
) -> None:
    (image / "data/deep").mkdir(parents=True)
    (image / "data/deep/file").write_text("content")
    os.link(image / "data/deep/file", image / "data/name")
    os.setxattr(image / "data/deep/file", "user.note", b"kept")
    os.setxattr(image / "data/deep/file", "security.capability", CAPABILITY)
    (image / "data/link").symlink_to("deep/absent")
    os.mkfifo(image / "data/pipe")
    os.mknod(image / "data/null", stat.S_IFCHR, os.makedev(1, 3))
    (image / "data/program").write_text("")
    for name, mode in (("deep/file", 0o640), ("pipe", 0o622), ("null", 0o666), ("program", 0o6755)):
        os.chown(image / "data" / name, 1000, 44)
        (image / "data" / name).chmod(mode)
    os.setxattr(image / "data/deep/file", "security.capability", CAPABILITY)
    os.chown(image / "data/link", 7, 8, follow_symlinks=False)
    os.chown(image / "data/deep", 1000, 1000)
    (image / "data/deep").chmod(0o1770)
    (image / "data").chmod(0o2775)
    names = [".", "deep", "deep/file", "name", "link", "pipe", "null", "program"]
    for name in names:
        os.utime(image / "data" / name, (MTIME, MTIME), follow_symlinks=False)
    script = "cd /data; stat -c '%n %f %u:%g %Y %h %t:%T' $*; cat deep/file; readlink link; mount"
    argv = ["/bin/sh", "-c", script, "sh", *names]
    _, inside = run(volumes(argv, "/data"))
    *_, table = [line for line in inside.splitlines() if " on /data " in line]
    assert "overlay" not in table
    _, same = run(volumes(argv))
    assert [line for line in inside.splitlines() if " on /" not in line] == [
        line for line in same.splitlines() if " on /" not in line
    ]
    assert inside.splitlines()[0].endswith(f" {MTIME} 3 0:0")
    copy = tmp_path / "container/volumes/0/deep/file"
    assert os.getxattr(copy, "user.note") == b"kept"
    assert os.getxattr(copy, "security.capability") == CAPABILITY
    assert copy.stat().st_nlink == 2


def test_a_volume_that_the_image_has_not_got(volumes: Volumes) -> None:
    """Made, also through a link of the image."""
    _, output = run(volumes("stat -c '%a %u %F' /a/b; echo x > /a/b/x; cat /a/b/x", "/a/b"))
    assert output == "755 0 directory\nx\n"


def test_a_volume_at_a_link_of_the_image(volumes: Volumes, image: Path, tmp_path: Path) -> None:
    (image / "run/app").mkdir(parents=True)
    (image / "run/app/file").write_text("content")
    (image / "var").mkdir()
    (image / "var/run").symlink_to("/run")
    assert run(volumes("cat /run/app/file; touch /run/app/new", "/var/run/app"))[1] == "content"
    assert (tmp_path / "container/volumes/0/new").exists()


def test_a_volume_is_written_to_where_the_root_is_read_only(
    volumes: Volumes, image: Path, tmp_path: Path
) -> None:
    (image / "data").mkdir()
    (image / "data/file").write_text("of the image")
    made = volumes("touch /x; echo mine > /data/file && cat /data/file", "/data")
    made["rootfs"]["readonly"] = True
    output = run(made)[1]
    assert "Read-only" in output
    assert output.endswith("mine\n")
    assert (image / "data/file").read_text() == "of the image"
    assert (tmp_path / "container/volumes/0/file").read_text() == "mine\n"


def test_a_volume_in_a_volume_and_what_is_asked_for_in_it(
    volumes: Volumes, image: Path, tmp_path: Path
) -> None:
    (image / "data/inner").mkdir(parents=True)
    (image / "data/inner/file").write_text("inner")
    (tmp_path / "asked").mkdir()
    (tmp_path / "asked/file").write_text("asked")
    asked = [rootfs_defaults.bind(str(tmp_path / "asked"), "/data/inner/asked")]
    made = volumes(
        "cat /data/inner/file /data/inner/asked/file; touch /data/inner/x",
        "/data",
        "/data/inner",
        asked=asked,
    )
    assert run(made)[1] == "innerasked"
    assert (tmp_path / "container/volumes/1/x").exists()
    assert not (tmp_path / "container/volumes/0/inner/x").exists()


def test_an_overlay_is_made_of_a_volume(volumes: Volumes) -> None:
    """Docker-in-Docker and kind do so, whose images have a VOLUME for that."""
    script = """
        cd /data; mkdir lower upper work merged; echo below > lower/file
        mount -t overlay none -o lowerdir=lower,upperdir=upper,workdir=work merged
        echo above > merged/file; cat upper/file
    """
    mask = (1 << 38) - 1
    sets = dict.fromkeys(("bounding", "permitted", "effective"), mask)
    made = volumes(
        script, "/data", process={"capabilities": {**sets, "inheritable": 0, "ambient": 0}}
    )
    assert run(made)[1] == "above\n"


def test_a_start_that_is_repeated_makes_a_volume_anew(
    volumes: Volumes, image: Path, tmp_path: Path
) -> None:
    (image / "data").mkdir()
    (image / "data/file").write_text("content")
    (tmp_path / "container/volumes/0/half").mkdir(parents=True)
    assert run(volumes("ls /data", "/data"))[1] == "file\n"


def test_a_volume_propagates_nothing(volumes: Volumes) -> None:
    _, output = run(volumes("cat /proc/self/mountinfo", "/data"))
    (line,) = [line for line in output.splitlines() if line.split()[4] == "/data"]
    assert line.split()[6] == "-"


def test_a_volume_that_is_a_file_of_the_image(volumes: Volumes, image: Path) -> None:
    (image / "data").write_text("")
    with start(volumes("true", "/data")) as process:
        assert process.message["error"] == "FailedPrecondition"
        assert process.message["text"] == "volume of the image at /data: the image has a file there"


def test_a_volume_as_deep_as_paths_are_long(volumes: Volumes, image: Path, tmp_path: Path) -> None:
    """Neither descriptors nor the stack grow with it."""
    path = image / "data"
    path.mkdir()
    for _ in range(1000):
        path /= "d"
        path.mkdir()
    (path / "file").write_text("content")
    assert run(volumes(f"cat /{path.relative_to(image)}/file", "/data"))[1] == "content"
    for directory in (image, tmp_path / "container"):  # too deep for others
        files.remove_tree(str(directory))


def test_a_volume_at_a_link_to_the_root(volumes: Volumes, image: Path, tmp_path: Path) -> None:
    """It is treated as one that is "/": it would be a copy of the whole image, over the root, where "/.." leads to."""
    (image / "all").symlink_to("..")
    assert run(volumes("stat -c %d:%i / | grep -c $(stat -c %d:%i /..)", "/all"))[1] == "1\n"
    assert os.listdir(tmp_path / "container/volumes/0") == []


def test_holes_of_a_file_stay_holes(volumes: Volumes, image: Path, tmp_path: Path) -> None:
    """A few bytes of a layer can make a sparse file of a terabyte: a copy in full would be the end of the disk."""
    (image / "data").mkdir()
    with (image / "data/file").open("wb") as file:
        file.write(b"first")
        file.seek(64 << 20)
        file.write(b"second")
        file.truncate(128 << 20)
    (image / "data/empty").touch()
    _, output = run(
        volumes("stat -c %s /data/file /data/empty; grep -c second /data/file", "/data")
    )
    assert output.split() == [str(128 << 20), "0", "1"]
    copy = tmp_path / "container/volumes/0/file"
    assert copy.read_bytes() == (image / "data/file").read_bytes()
    assert copy.stat().st_blocks == (image / "data/file").stat().st_blocks < 100


def test_a_volume_leaves_the_disk_its_reserve(
    volumes: Volumes, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image / "data").mkdir()
    (image / "data/file").touch()
    monkeypatch.setattr(disk_reserve, "_RESERVE_BYTES", 1 << 60)
    monkeypatch.setattr(disk_reserve, "_RESERVE_SHARE", 1)
    with start(volumes("true", "/data")) as process:
        assert process.message["error"] == "ResourceExhausted"
        assert process.message["text"].startswith("volume of the image at /data: ")
        assert "left on the disk" in process.message["text"]


@pytest.mark.parametrize("sizes", [[32 << 20], [1 << 20] * 32, [0] * 8000])
def test_the_disk_is_looked_at_while_a_volume_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    """For files as for bytes: volumes in volumes are as many copies of what the innermost has."""
    (tmp_path / "image").mkdir()
    for number, size in enumerate(sizes):
        (tmp_path / f"image/{number}").write_bytes(bytes(size))
    looks: list[int] = []
    monkeypatch.setattr(disk_reserve, "require_space", lambda _, size: looks.append(size))
    opened = [
        os.open(tmp_path / "image", os.O_PATH),
        made.make(str(tmp_path / "container/volumes/0")),
    ]
    made.fill(opened[1], opened[0])
    for descriptor in opened:
        os.close(descriptor)
    assert 8 <= len(looks) <= 10
    assert len(os.listdir(tmp_path / "container/volumes/0")) == len(sizes)


@pytest.fixture
def pod() -> Iterator[dict[int, int]]:
    made = userns.create(EXTENTS, EXTENTS, OWNED)
    yield made
    for descriptor in made.values():
        os.close(descriptor)


@pytest.mark.parametrize("asked", ["/dev/asked", "/opt/asked"])
def test_devices_of_an_image_are_of_no_use_in_a_user_namespace(
    volumes: Volumes, image: Path, pod: dict[int, int], asked: str
) -> None:
    """They would be its root's, who gets no right to a device of the node; those that are asked for work."""
    (image / "data").mkdir()
    for path in (image / "zero", image / "data/zero"):
        os.mknod(path, stat.S_IFCHR, os.makedev(1, 5))
        path.chmod(0o666)
    paths = ["/data/zero", asked, *["/zero"] * asked.startswith("/dev")]
    script = f"for path in {' '.join(paths)}; do dd if=$path count=1 2>&- | grep -c ''; done"
    devices = [rootfs_defaults.character_device(asked, 1, 5)]
    with start(volumes(script, "/data", process=MAPS, devices=devices), pod=pod) as process:
        assert process.ready
        process.go()
        assert process.output().split() == ["0", "1", "0"][: len(paths)]


def test_ids_of_a_volume_in_a_user_namespace(
    volumes: Volumes, image: Path, tmp_path: Path, pod: dict[int, int]
) -> None:
    (image / "data").mkdir()
    (image / "data/file").touch()
    os.chown(image / "data", 1000, 1000)
    os.chown(image / "data/file", 5, 6)
    made = volumes(
        "stat -c %u:%g /data /data/file /absent; touch /data/mine",
        "/data",
        "/absent",
        process={**MAPS, "user": user(uid=1000)},
    )
    with start(made, pod=pod) as process:
        assert process.ready
        process.go()
        assert process.output().split() == ["1000:1000", "5:6", "0:0"]
    own = tmp_path / "container/volumes/0"
    assert own.stat().st_uid == FIRST + 1000
    assert (own / "file").stat().st_gid == FIRST + 6
    assert (own / "mine").stat().st_uid == FIRST + 1000
    assert (image / "data/file").stat().st_uid == 5
