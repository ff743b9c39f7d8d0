"""The mount plan, executed: what a container sees, and what it does to the node."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from nodeagent import files
from nodeagent.linux import capabilities, mounts, syscalls
from nodeagent.sandbox import rootfs_defaults
from nodeagent.sandbox.spec import Device, Mount
from tests.kernel.sandbox.conftest import Plan
from tests.kernel.sandbox.containers import DEFAULT_CAPABILITIES, run, start, v1_hierarchies

DEFAULT = rootfs_defaults.default_mounts(False, v1_hierarchies())


def with_mounts(*added: Mount) -> list[Mount]:
    return [*DEFAULT, *added]


def image(target: str, lower: list[Path], sub_path: str = "") -> Mount:
    made = rootfs_defaults.bind("", target)
    return cast(
        Mount, {**made, "kind": "image", "lower": list(map(str, lower)), "sub_path": sub_path}
    )


def mounted(output: str) -> dict[str, tuple[str, str]]:
    """The mounts of a mountinfo: file system and options by mount point; the topmost wins."""
    found = {}
    for line in output.splitlines():
        fields, _, rest = line.partition(" - ")
        found[fields.split()[4]] = (rest.split()[0], fields.split()[5])
    return found


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "volume"
    path.mkdir()
    (path / "file").write_text("content")
    return path


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A directory of the node on a shared mount of its own."""
    path = tmp_path / "shared"
    path.mkdir()
    mount = mounts.make_filesystem("tmpfs")
    target = os.open(path, os.O_PATH)
    syscalls.move_mount(mount, target)
    mounts.set_propagation(mount, "shared")
    os.close(target)
    os.close(mount)
    yield path
    syscalls.umount2(str(path), syscalls.MNT_DETACH)


# ---- what every container has ----


def test_default_file_systems(plan: Plan) -> None:
    table = mounted(run(plan("cat /proc/self/mountinfo"))[1])
    assert table["/"][0] == "overlay"
    assert table["/proc"] == ("proc", "rw,nosuid,nodev,noexec,relatime")
    assert table["/dev"] == ("tmpfs", "rw,nosuid")
    assert table["/dev/pts"] == ("devpts", "rw,nosuid,noexec,relatime")
    assert table["/dev/mqueue"] == ("mqueue", "rw,nosuid,nodev,noexec,relatime")
    assert table["/sys"] == ("sysfs", "ro,nosuid,nodev,noexec,relatime")
    assert table["/sys/fs/cgroup"][1].startswith("ro,nosuid,nodev,noexec")
    for name, options in v1_hierarchies().items():
        point = f"/sys/fs/cgroup/{name}".rstrip("/")
        kind = "cgroup" if options else "cgroup2"
        assert table[point] == (kind, "ro,nosuid,nodev,noexec,relatime")


def test_nothing_of_the_node_is_mounted(plan: Plan) -> None:
    points = mounted(run(plan("cat /proc/self/mountinfo"))[1])
    assert not [point for point in points if point.startswith(("/tmp", "/var", "/work"))]


def test_a_privileged_container_may_write_to_sysfs(plan: Plan) -> None:
    made = plan(
        "cat /proc/self/mountinfo",
        mounts=rootfs_defaults.default_mounts(True, v1_hierarchies()),
        masked_paths=[],
        readonly_paths=[],
    )
    table = mounted(run(made)[1])
    assert table["/sys"][1].startswith("rw,")
    assert all(table[point][1].startswith("rw,") for point in table if "cgroup" in point)


def test_devices_and_links(plan: Plan) -> None:
    script = """
        cd /dev; stat -c '%n %t:%T %a %F' null zero full random urandom tty
        readlink fd; readlink ptmx; readlink stderr
    """
    _, output = run(plan(script))
    assert output.splitlines() == [
        "null 1:3 666 character special file",
        "zero 1:5 666 character special file",
        "full 1:7 666 character special file",
        "random 1:8 666 character special file",
        "urandom 1:9 666 character special file",
        "tty 5:0 666 character special file",
        "/proc/self/fd",
        "pts/ptmx",
        "/proc/self/fd/2",
    ]


def test_further_devices(plan: Plan) -> None:
    def device(path: str, **changes: Any) -> Device:
        return cast(Device, {**rootfs_defaults.character_device(path, 1, 3), **changes})

    devices = [
        device("/dev/net/tun", major=10, minor=200, mode=0o600, uid=5, gid=6),
        device("/opt/block", type="b", major=7, minor=0),
        device("/dev/null", mode=0o600),
    ]
    _, output = run(
        plan("stat -c '%t:%T %a %u:%g %F' /dev/net/tun /opt/block /dev/null", devices=devices)
    )
    assert output.splitlines() == [
        "a:c8 600 5:6 character special file",
        "7:0 666 0:0 block special file",
        "1:3 600 0:0 character special file",
    ]


def test_a_device_below_the_place_of_a_link(plan: Plan) -> None:
    devices = [rootfs_defaults.character_device("/dev/fd/9", 1, 3)]
    _, output = run(plan("stat -c %t:%T /dev/fd/9; readlink /dev/stdin", devices=devices))
    assert output.splitlines() == ["1:3", "/proc/self/fd/0"]


def test_a_dev_of_the_request_is_left_alone(plan: Plan, volume: Path) -> None:
    """It may be the node's own."""
    added = [mount for mount in DEFAULT if not mount["target"].startswith("/dev")]
    made = plan(
        "ls /dev",
        mounts=[*added, rootfs_defaults.bind(str(volume), "/dev")],
        devices=[rootfs_defaults.DEFAULT_DEVICES[1]],
    )
    with start(made, stdin=os.open("/dev/null", os.O_RDONLY)) as process:
        process.go()
        assert process.output() == "file\n"
    assert os.listdir(volume) == ["file"]


def test_a_device_that_a_dev_of_the_request_lacks(plan: Plan, volume: Path) -> None:
    """Asked for, it is there, be it by the mount, or the container is not made."""
    added = [mount for mount in DEFAULT if not mount["target"].startswith("/dev")]
    asked = rootfs_defaults.character_device("/dev/fuse", 10, 229)
    mounts = [*added, rootfs_defaults.bind(str(volume), "/dev")]
    for number in (None, 228):
        if number:
            os.mknod(volume / "fuse", stat.S_IFCHR | 0o666, os.makedev(10, number))
        with start(plan("true", mounts=mounts, devices=[asked])) as process:
            assert process.message["error"] == "InvalidArgument"
            assert "device /dev/fuse: an image or a mount" in process.message["text"]
    os.unlink(volume / "fuse")
    os.mknod(volume / "fuse", stat.S_IFCHR | 0o666, os.makedev(10, 229))
    made = plan("ls /dev", mounts=mounts, devices=[asked])
    with start(made, stdin=os.open("/dev/null", os.O_RDONLY)) as process:
        process.go()
        assert process.output() == "file\nfuse\n"


# ---- masks ----


def test_masked_and_readonly_paths(plan: Plan, volume: Path) -> None:
    script = """
        ls /sys/firmware /masked; cat /masked-file /proc/keys
        echo x > /masked-file && echo swallowed
        touch /masked/x || echo refused
        touch /kept/x || echo kept
        cat /kept/file
    """
    added = [rootfs_defaults.bind(str(volume), path) for path in ("/masked", "/kept")]
    added.append(rootfs_defaults.bind(str(volume / "file"), "/masked-file"))
    made = plan(
        script,
        mounts=with_mounts(*added),
        masked_paths=[
            "/masked",
            "/masked-file",
            "/sys/firmware",
            "/proc/keys",
            "/absent",
            "/etc/passwd/x",
        ],
        readonly_paths=["/kept", "/absent"],
    )
    _, output = run(made)
    lines = [
        line for line in output.splitlines() if not line.startswith(("touch", "/sys", "/masked"))
    ]
    assert [line for line in lines if line] == ["swallowed", "refused", "kept", "content"]
    assert (volume / "file").read_text() == "content"


def test_masks_share_one_file_system(plan: Plan) -> None:
    _, output = run(plan("cat /proc/self/mountinfo"))
    devices = {
        line.split()[2] for line in output.splitlines() if line.split()[3] in ("/empty", "/null")
    }
    assert len(devices) == 1


def test_readonly_root(plan: Plan) -> None:
    made = plan("touch /x; touch /tmp/y; touch /dev/z && echo dev")
    made["rootfs"]["readonly"] = True
    _, output = run(made)
    assert output.count("Read-only file system") == 2
    assert output.endswith("dev\n")


# ---- binds ----


def test_a_bind_with_its_attributes(plan: Plan, volume: Path) -> None:
    added = rootfs_defaults.bind(
        str(volume), "/new/place", "ro", "nosuid", "nodev", "noexec", "noatime"
    )
    made = plan("cat /new/place/file; cat /proc/self/mountinfo", mounts=with_mounts(added))
    _, output = run(made)
    assert output.startswith("content")
    assert mounted(output)["/new/place"][1] == "ro,nosuid,nodev,noexec,noatime"


def test_a_file_is_bound_over_a_file_that_is_missing(plan: Plan, volume: Path) -> None:
    added = [
        rootfs_defaults.bind(str(volume / "file"), "/etc/hosts"),
        rootfs_defaults.bind(str(volume / "file"), "/deep/er/file"),
    ]
    made = plan(
        "cat /etc/hosts /deep/er/file; echo changed > /etc/hosts", mounts=with_mounts(*added)
    )
    assert run(made)[1] == "contentcontent"
    assert (volume / "file").read_text() == "changed\n"


def test_a_link_on_the_node_is_followed_there(plan: Plan, volume: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(volume)
    made = plan("cat /v/file", mounts=with_mounts(rootfs_defaults.bind(str(link), "/v")))
    assert run(made)[1] == "content"


def test_links_in_the_image_stay_in_the_image(
    plan: Plan, volume: Path, layer: Path, tmp_path: Path
) -> None:
    upper = tmp_path / "container" / "upper"
    upper.mkdir(parents=True)
    (upper / "var").symlink_to("/missing/var")
    (upper / "absolute").symlink_to("/tmp")
    (upper / "climbing").symlink_to("../../../../tmp/climbed")
    added = [
        rootfs_defaults.bind(str(volume), f"/{name}/{name}")
        for name in ("var", "absolute", "climbing")
    ]
    script = "cat /missing/var/var/file /tmp/absolute/file /tmp/climbed/climbing/file"
    assert run(plan(script, mounts=with_mounts(*added)))[1] == "content" * 3
    assert not Path("/tmp/climbed").exists()
    assert not Path("/missing").exists()


def test_a_missing_host_path_is_made(plan: Plan, tmp_path: Path) -> None:
    """The node's root owns it, 0755, and its parents that are missing as well, whatever the umask."""
    absent = tmp_path.joinpath("a", *["b"] * 1500, "c")
    added = rootfs_defaults.bind(str(absent), "/data")
    added["absent"] = "make"
    assert run(plan("echo x > /data/x", mounts=with_mounts(added)))[0] == 0
    assert (absent / "x").read_text() == "x\n"
    for path in (absent, absent.parent, absent.parent.parent):
        status = path.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o755, 0, 0)
    files.remove_tree(str(tmp_path / "a"))


def test_a_missing_host_path_that_the_configuration_lists_is_not_made(
    plan: Plan, tmp_path: Path
) -> None:
    added = rootfs_defaults.bind(str(tmp_path / "absent"), "/data")
    added["absent"] = "reject"
    with start(plan("true", mounts=with_mounts(added))) as process:
        assert process.message["error"] == "NotFound"
        assert "absent_mount_sources_to_reject" in process.message["text"]
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("below", ["", "/deep"])
def test_nothing_is_made_where_a_link_to_nothing_leads(
    plan: Plan, tmp_path: Path, below: str
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    added = rootfs_defaults.bind(f"{tmp_path}/link{below}", "/data")
    added["absent"] = "make"
    with start(plan("true", mounts=with_mounts(added))) as process:
        assert process.message["error"] == "NotFound"
    assert not (tmp_path / "absent").exists()


def test_a_missing_host_path_below_a_file(plan: Plan, volume: Path) -> None:
    added = rootfs_defaults.bind(str(volume / "file" / "deep"), "/data")
    added["absent"] = "make"
    with start(plan("true", mounts=with_mounts(added))) as process:
        assert process.message["error"] == "FailedPrecondition"
        assert f'host path "{volume}/file/deep" for /data: Not a dir' in process.message["text"]


def test_a_missing_host_path_is_named(plan: Plan) -> None:
    with start(
        plan("true", mounts=with_mounts(rootfs_defaults.bind("/no/such", "/data")))
    ) as process:
        assert process.message == {
            "error": "NotFound",
            "text": 'host path "/no/such" for /data: No such file or directory',
        }


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        (
            "",
            "/etc/passwd",
            "what is mounted is a directory, and what the container has there is none",
        ),
        (
            "file",
            "/etc",
            "what is mounted is none, and what the container has there is a directory",
        ),
        ("", "/etc/passwd/deep/er", "Not a directory"),
        ("file", "/etc/passwd/deep", "Not a directory"),
        ("", "/loop/deep", "Too many levels of symbolic links"),
        ("file", "/loop", "Too many levels of symbolic links"),
        ("", "/sealed/deep", "Read-only file system"),
        ("", f"/{'x' * 256}", "File name too long"),
    ],
)
def test_a_mount_on_something_of_another_kind_is_an_error_that_names_the_step(
    plan: Plan, volume: Path, tmp_path: Path, source: str, target: str, reason: str
) -> None:
    upper = tmp_path / "container" / "upper"
    upper.mkdir(parents=True)
    (upper / "loop").symlink_to("loop")
    path = str(volume / source)
    added = [rootfs_defaults.bind(str(volume), "/sealed", "ro"), rootfs_defaults.bind(path, target)]
    with start(plan("true", mounts=with_mounts(*added))) as process:
        text = f"mount {path} on {target}: {reason}"
        assert process.message == {"error": "FailedPrecondition", "text": text}


def test_later_mounts_land_inside_earlier_ones(plan: Plan, volume: Path) -> None:
    inner = volume / "inner"
    inner.mkdir()
    (inner / "deep").touch()
    added = [
        rootfs_defaults.filesystem("/a", "tmpfs", "nodev", size="64k"),
        rootfs_defaults.bind(str(inner), "/a/b/c"),
    ]
    assert run(plan("ls /a/b/c", mounts=with_mounts(*added)))[1] == "deep\n"


def test_a_kernel_file_system_is_not_mounted_through_a_link(plan: Plan, tmp_path: Path) -> None:
    upper = tmp_path / "container" / "upper"
    upper.mkdir(parents=True)
    (upper / "proc").symlink_to("/tmp")
    with start(plan("true")) as process:
        assert "proc on /proc" in process.message["text"]


def test_file_systems_that_the_kernel_refuses_are_explained(plan: Plan) -> None:
    bad = rootfs_defaults.filesystem("/t", "tmpfs", "", size="nonsense")
    with start(plan("true", mounts=with_mounts(bad))) as process:
        assert "mount tmpfs on /t" in process.message["text"]
        assert "size" in process.message["text"]


def test_recursive_read_only(plan: Plan, shared: Path) -> None:
    below = shared / "below"
    below.mkdir()
    syscalls.mount("none", str(below), "tmpfs", 0)
    try:
        for recursive, expected in ((False, "written\n"), (True, "refused\n")):
            added = rootfs_defaults.bind(str(shared), "/v", "ro", recursive=recursive)
            script = (
                "touch /v/x 2>&- && echo no; touch /v/below/x 2>&- && echo written || echo refused"
            )
            assert run(plan(script, mounts=with_mounts(added)))[1] == expected
    finally:
        syscalls.umount2(str(below), syscalls.MNT_DETACH)


# ---- propagation ----


def propagation_test(plan: Plan, shared: Path, propagation: Any) -> tuple[bool, bool]:
    """Whether a later mount of the node is seen in the container, and one of the container on the node."""
    for name in ("node", "container"):
        (shared / name).mkdir()
    mask = capabilities.mask(DEFAULT_CAPABILITIES) | capabilities.SYS_ADMIN
    sets = dict.fromkeys(("bounding", "permitted", "effective"), mask)
    made = plan(
        "read x; mount -t tmpfs none /v/container; ls /v/node",
        mounts=with_mounts(rootfs_defaults.bind(str(shared), "/v", propagation=propagation)),
        process={"capabilities": {**sets, "inheritable": 0, "ambient": 0}},
    )
    reader, writer = os.pipe()
    with start(made, stdin=reader) as process:
        process.go()
        syscalls.mount("none", str(shared / "node"), "tmpfs", 0)
        (shared / "node" / "seen").touch()
        os.close(writer)
        output = process.output()
    os.close(reader)
    table = mounted(Path("/proc/self/mountinfo").read_text())
    points = [point for point in table if point.startswith(f"{shared}/")]
    for point in points:
        syscalls.umount2(point, syscalls.MNT_DETACH)
    return "seen" in output, str(shared / "container") in points


@pytest.mark.parametrize(
    ("propagation", "seen", "back"),
    [("private", False, False), ("slave", True, False), ("shared", True, True)],
)
def test_propagation(plan: Plan, shared: Path, propagation: str, seen: bool, back: bool) -> None:
    assert propagation_test(plan, shared, propagation) == (seen, back)


@pytest.mark.parametrize("propagation", ["slave", "shared"])
def test_propagation_from_a_private_mount_is_refused(
    plan: Plan, shared: Path, propagation: Any
) -> None:
    syscalls.mount("", str(shared), "", syscalls.MS_PRIVATE)
    added = rootfs_defaults.bind(str(shared), "/v", propagation=propagation)
    with start(plan("true", mounts=with_mounts(added))) as process:
        assert process.message["error"] == "InvalidArgument"
        assert f'propagation "{propagation}" of /v' in process.message["text"]
        assert str(shared) in process.message["text"]


# ---- images ----


def test_image_volumes(plan: Plan, tmp_path: Path) -> None:
    layers = []
    for number in range(3):
        path = tmp_path / f"layer-{number}"
        (path / "sub").mkdir(parents=True)
        (path / "which").write_text(f"{number}\n")
        (path / "sub" / f"only-{number}").touch()
        layers.append(path)
    added = [
        image("/one", layers[:1]),
        image("/all", layers),
        image("/sub", layers, "sub"),
        image("/file", layers[1:], "which"),
    ]
    script = "cat /one/which /all/which /file; ls /sub; touch /one/x /all/x /sub/x"
    _, output = run(plan(script, mounts=with_mounts(*added)))
    assert output.startswith("0\n0\n1\nonly-0\nonly-1\nonly-2\n")
    assert output.count("Read-only file system") == 3


def test_a_missing_sub_path_is_named(plan: Plan, layer: Path) -> None:
    added = image("/v", [layer], "no/such")
    with start(plan("true", mounts=with_mounts(added))) as process:
        assert process.message["error"] == "NotFound"
        assert 'path "no/such" of the image' in process.message["text"]


def test_a_sub_path_stays_in_the_image(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "hostile"
    path.mkdir()
    (path / "out").symlink_to("/etc/shadow")
    added = image("/v", [path], "out")
    with start(plan("true", mounts=with_mounts(added))) as process:
        assert process.message["error"] == "NotFound"


# ---- layers ----


def test_many_layers(plan: Plan, layer: Path, tmp_path: Path) -> None:
    layers = []
    for number in range(100):
        path = tmp_path / "layers" / f"{number}-{'long' * 30}"
        path.mkdir(parents=True)
        (path / f"file-{number}").touch()
        layers.append(str(path))
    made = plan("ls -d /file-0 /file-99")
    made["rootfs"]["lower"] = [*layers, str(layer)]
    assert run(made)[1] == "/file-0\n/file-99\n"


def test_an_image_without_layers(plan: Plan, layer: Path) -> None:
    made = plan(
        ["/image/bin/ls", "/"], mounts=with_mounts(image("/image", [layer]), image("/none", []))
    )
    made["rootfs"]["lower"] = []
    assert run(made)[1].split() == ["dev", "image", "none", "proc", "sys"]


def test_a_missing_layer_is_named(plan: Plan) -> None:
    made = plan("true")
    made["rootfs"]["lower"] = ["/no/layer"]
    with start(made) as process:
        assert "/no/layer" in process.message["text"]


def test_what_is_written_stays_in_the_upper_directory(
    plan: Plan, tmp_path: Path, layer: Path
) -> None:
    run(plan("echo new > /etc/passwd; rm -f /etc/group; echo x > /made"))
    upper = tmp_path / "container" / "upper"
    assert (upper / "made").read_text() == "x\n"
    assert "root:x:0" in (layer / "etc" / "passwd").read_text()
    assert not Path("/made").exists()
