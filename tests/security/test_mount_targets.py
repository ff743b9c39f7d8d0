"""Where mounts and devices land: never where a link of an image or of a volume leads, where that would matter."""

import ctypes
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from nodeagent.lifecycle.plan.mounts import outside_of
from nodeagent.linux import mountinfo, syscalls
from nodeagent.sandbox import rootfs_defaults
from nodeagent.sandbox.spec import Mount
from tests.kernel.sandbox.conftest import Plan
from tests.kernel.sandbox.containers import MASKED, READONLY, run, start, v1_hierarchies
from tests.kernel.sandbox.test_init_mounts import shared

__all__ = ["shared"]

DEFAULT = rootfs_defaults.default_mounts(False, v1_hierarchies())

# What lxcfs shows a container's own numbers with, and what runc accepts besides.
PROCFS_FILES = (
    "cpuinfo diskstats loadavg meminfo slabinfo stat swaps uptime sys/kernel/ns_last_pid"
    " sys/crypto/fips_enabled"
).split()


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    """The writable layer of the container: what the image's author chose."""
    path = tmp_path / "container" / "upper"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "volume"
    path.mkdir()
    (path / "file").write_text("content")
    return path


def with_mounts(*added: Mount) -> list[Mount]:
    """The mounts in a request's plan: defaults that are not at or below what it mounts, then that, parents first."""
    asked = [mount["target"] for mount in added]
    return [
        *outside_of(DEFAULT, asked),
        *sorted(added, key=lambda mount: mount["target"].count("/")),
    ]


def image(target: str, layer: Path, sub_path: str = "") -> Mount:
    made = rootfs_defaults.bind("", target)
    return cast(Mount, {**made, "kind": "image", "lower": [str(layer)], "sub_path": sub_path})


def refusal(made: Any) -> str:
    """The text of the InvalidArgument that a container is refused with."""
    with start(made) as process:
        assert process.message.get("error") == "InvalidArgument", process.message
        return str(process.message["text"])


# ---- /dev ----


@pytest.mark.parametrize("link", ["/v/d", "v/d", "/v/absent"])
@pytest.mark.parametrize("first", ["volume", "dev"])
def test_cve_2026_41579_dev_of_the_image_is_a_link(
    plan: Plan, upper: Path, volume: Path, link: str, first: str
) -> None:
    """Its devices, of mode 666 and the node's root, would be made in the volume."""
    (volume / "d").mkdir()
    (upper / "dev").symlink_to(link)
    added = [rootfs_defaults.bind(str(volume), "/v"), *DEFAULT]
    ordered = added if first == "volume" else with_mounts(added[0])
    text = refusal(plan("true", mounts=ordered))
    assert "tmpfs on /dev" in text
    assert "link" in text
    assert sorted(os.listdir(volume)) == ["d", "file"]
    assert os.listdir(volume / "d") == []


@pytest.mark.parametrize("name", ["proc", "sys", "dev"])
def test_a_volume_for_a_directory_of_the_kernel_that_the_image_has_as_a_link(
    plan: Plan, upper: Path, volume: Path, name: str
) -> None:
    (upper / name).symlink_to("/elsewhere")
    source = "/proc" if name == "proc" else str(volume)
    text = refusal(plan("true", mounts=with_mounts(rootfs_defaults.bind(source, f"/{name}"))))
    assert f"{source} on /{name}" in text
    assert not (upper / "elsewhere").exists()


def test_shm_in_a_dev_of_the_request_is_not_reached_through_a_link(
    plan: Plan, volume: Path
) -> None:
    """A volume that is mounted at /dev has a link at the place of what is mounted in it."""
    (volume / "shm").symlink_to("/etc")
    added = [rootfs_defaults.bind(str(volume), target) for target in ("/dev", "/dev/shm")]
    assert "on /dev/shm" in refusal(plan("true", mounts=with_mounts(*added)))


def test_what_is_mounted_in_dev(plan: Plan, volume: Path) -> None:
    """A kubelet and real manifests mount such things."""
    (volume / "pages").mkdir()
    added = [
        rootfs_defaults.bind(str(volume), "/dev/shm"),
        rootfs_defaults.bind(str(volume / "file"), "/dev/termination-log"),
        rootfs_defaults.bind(str(volume / "pages"), "/dev/hugepages"),
        rootfs_defaults.bind(str(volume), "/dev/deep/er"),
        rootfs_defaults.bind("/dev/zero", "/dev/null"),
        rootfs_defaults.bind("/dev/full", "/dev/fuse"),
        rootfs_defaults.bind(str(volume / "file"), "/dev/ptmx"),
        rootfs_defaults.bind(str(volume), "/dev/fd"),
    ]
    devices = [rootfs_defaults.character_device("/dev/fuse", 1, 7)]
    script = """
        cat /dev/shm/file /dev/termination-log /dev/deep/er/file /dev/ptmx /dev/fd/file; echo
        ls -d /dev/hugepages; stat -c '%n %t:%T' /dev/null /dev/fuse; readlink /dev/stdin
    """
    reader, writer = os.pipe()
    os.close(writer)
    _, output = run(plan(script, mounts=with_mounts(*added), devices=devices), stdin=reader)
    os.close(reader)
    assert output.splitlines() == [
        "content" * 5,
        "/dev/hugepages",
        "/dev/null 1:5",
        "/dev/fuse 1:7",
        "/proc/self/fd/0",
    ]
    assert sorted(os.listdir(volume)) == ["file", "pages"]


def test_the_dev_of_the_node(plan: Plan) -> None:
    """A driver that sees the node's devices come and go; its terminal is one of the node's, too."""
    script = "stat -c %t:%T /dev/kmsg /dev/null; tty; test -c $(tty) && echo there"
    added = [
        rootfs_defaults.bind("/dev", "/dev"),
        rootfs_defaults.bind("/sys", "/sys"),
        rootfs_defaults.bind(
            "/lib/modules" if os.path.isdir("/lib/modules") else "/lib", "/lib/modules"
        ),
    ]
    before = os.listdir("/dev")
    made = plan(script, mounts=with_mounts(*added), tty=True, privileged=True)
    with start(made) as process:
        process.go()
        *devices, terminal, there = process.output().split()
        assert devices == ["1:b", "1:3"]
        assert terminal.startswith("/dev/pts/")
        assert there == "there"
    assert os.listdir("/dev") == before


# ---- devices outside of /dev ----


@pytest.mark.parametrize("path", ["/v/device", "/link/device", "/v/link/device", "/v/new/device"])
def test_a_device_is_never_made_in_a_volume(
    plan: Plan, upper: Path, volume: Path, path: str
) -> None:
    (upper / "link").symlink_to("v")
    (volume / "link").symlink_to(".")
    devices = [rootfs_defaults.character_device(path, 1, 5)]
    made = plan(
        "true", mounts=with_mounts(rootfs_defaults.bind(str(volume), "/v")), devices=devices
    )
    assert f"device {path}" in refusal(made)
    assert sorted(os.listdir(volume)) == ["file", "link"]


def test_a_device_that_a_volume_brings_itself(plan: Plan, volume: Path) -> None:
    os.mknod(volume / "device", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    devices = [rootfs_defaults.character_device("/v/device", 1, 5)]
    added = rootfs_defaults.bind(str(volume), "/v")
    assert run(plan("true", mounts=with_mounts(added), devices=devices))[0] == 0


@pytest.mark.parametrize("path", ["/opt/deep/device", "/link/device"])
def test_a_device_in_the_image_s_own_file_system(plan: Plan, upper: Path, path: str) -> None:
    (upper / "link").symlink_to("/opt/absent")
    made = plan(f"stat -c %t:%T {path}", devices=[rootfs_defaults.character_device(path, 1, 5)])
    assert run(made) == (0, "1:5\n")


def test_what_the_image_has_in_the_place_of_a_device(plan: Plan, upper: Path) -> None:
    device = rootfs_defaults.character_device("/opt/device", 1, 5)
    (upper / "opt").mkdir()
    (upper / "opt" / "device").symlink_to("/dev/null")
    assert "device /opt/device" in refusal(plan("true", devices=[device]))
    (upper / "opt" / "device").unlink()
    for _ in range(2):  # the second start finds what the first has made
        assert run(plan("stat -c %t:%T /opt/device", devices=[device])) == (0, "1:5\n")


# ---- procfs ----


@pytest.mark.parametrize(
    "target",
    [
        "/proc/self/attr",
        "/proc/self/fd",
        "/proc/self",
        "/proc/1/task",
        "/proc/sys",
        "/proc/sys/kernel/core_pattern",
        "/proc/version",
    ],
)
@pytest.mark.parametrize("way", ["named", "link of the image", "link of a volume", "image"])
def test_nothing_is_mounted_in_procfs(
    plan: Plan, upper: Path, volume: Path, target: str, way: str
) -> None:
    """A14: whoever writes a label or a limit there would write it into a file of the pod's author."""
    (upper / "link").symlink_to(target)
    (volume / "link").symlink_to(f"../../..{target}")
    place = {"link of the image": "/link", "link of a volume": "/v/link"}.get(way, target)
    a_file = target.endswith(("pattern", "version"))
    sub_path = "file" if a_file else ""
    added = rootfs_defaults.bind(str(volume / sub_path), place)
    if way == "image":
        added = image(place, volume, sub_path)
    text = refusal(plan("true", mounts=with_mounts(rootfs_defaults.bind(str(volume), "/v"), added)))
    assert f"on {place}: " in text
    assert "procfs" in text


@pytest.mark.parametrize("name", PROCFS_FILES)
def test_numbers_of_a_container_are_its_own(
    plan: Plan, upper: Path, volume: Path, name: str
) -> None:
    """The files that lxcfs mounts are accepted, where they are named and not what a link leads to."""
    target = f"/proc/{name}"
    if not os.path.exists(target):
        pytest.skip(f"this kernel has no {target}")
    added = rootfs_defaults.bind(str(volume / "file"), target, "ro")
    assert run(plan(f"cat {target}", mounts=with_mounts(added))) == (0, "content")
    (upper / "link").symlink_to(target)
    added = rootfs_defaults.bind(str(volume / "file"), "/link")
    assert "procfs" in refusal(plan("true", mounts=with_mounts(added)))


@pytest.mark.parametrize("kind", ["volume", "image", "/proc/sys", "/sys"])
def test_only_a_procfs_is_mounted_at_proc(plan: Plan, volume: Path, kind: str) -> None:
    source = kind if kind.startswith("/") else str(volume)
    added = image("/proc", volume) if kind == "image" else rootfs_defaults.bind(source, "/proc")
    text = refusal(plan("true", mounts=with_mounts(added)))
    assert "on /proc: " in text
    assert "procfs" in text


def test_the_procfs_of_the_node(plan: Plan) -> None:
    """Monitoring agents have it at a place of their own, or as /proc; masks are where they belong."""
    added = [
        rootfs_defaults.bind("/proc", "/proc"),
        rootfs_defaults.bind("/proc", "/host/proc", "ro"),
    ]
    script = f"ls -d /proc/{os.getpid()} /host/proc/{os.getpid()}; cat /proc/keys; echo x > /proc/sys/vm/swappiness"
    _, output = run(plan(script, mounts=with_mounts(*added)))
    assert output.splitlines()[:2] == [f"/host/proc/{os.getpid()}", f"/proc/{os.getpid()}"]
    assert "Read-only" in output
    assert len(output.splitlines()) == 3


# ---- what is shared with the node ----


def below(path: Path) -> dict[str, str]:
    """What this mount namespace has mounted below a directory, and which peer group each belongs to."""
    return {
        mount.point.removeprefix(f"{path}/"): " ".join(mount.propagation)
        for mount in mountinfo.parse(mountinfo.table())
        if mount.point.startswith(f"{path}/")
    }


@pytest.mark.parametrize("target", ["/dev", "/sys", "/sys/fs", "/a", "/link"])
@pytest.mark.parametrize("inner", [False, True])
def test_the_node_gets_no_mount_of_the_runtime(
    plan: Plan, upper: Path, shared: Path, volume: Path, target: str, inner: bool
) -> None:
    """Bidirectional propagation is for what the container mounts itself: CSI drivers, calico's /sys/fs.

    inner: where there is a shared mount of the node in the volume, at the very place.
    """
    (upper / "link").symlink_to("/a")
    names = {"/sys": ("fs/cgroup", "firmware"), "/sys/fs": ("cgroup",)}.get(
        target, ("pts", "mqueue", "shm", "b", "kept")
    )
    for name in names:
        (shared / name).mkdir(parents=True)
        if inner:
            syscalls.mount("none", str(shared / name), "tmpfs", 0)
            for hierarchy in v1_hierarchies():
                (shared / name / hierarchy).mkdir(exist_ok=True)
    os.mknod(shared / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    added = [rootfs_defaults.bind(str(shared), target, propagation="shared")]
    added += [
        rootfs_defaults.bind(str(volume), f"/a/{name}") for name in names[3:4] if target != "/dev"
    ]
    added += [rootfs_defaults.bind(str(volume), "/dev/shm")] * (target == "/dev")
    added += [rootfs_defaults.bind(str(volume / "file"), f"{target}/log")] * (target != "/sys/fs")
    before = below(shared)
    sets = dict.fromkeys(("bounding", "permitted", "effective"), syscalls.capget()[1])
    script = f"cat {target}/log; mkdir {target}/new; mount -t tmpfs none {target}/new; echo done"
    made = plan(
        script,
        mounts=with_mounts(*added),
        masked_paths=[*MASKED, f"{target}/kept", f"{target}/null"],
        readonly_paths=[*READONLY, f"{target}/b"],
        process={"capabilities": {**sets, "inheritable": 0, "ambient": 0}},
    )
    with start(made) as process:
        assert "ready" in process.message, process.message
        assert below(shared) == before
        process.go()
        assert "done" in process.output()
    after = below(shared)
    assert set(after) - set(before) == {"new"}  # what the container has mounted is seen
    for name in sorted(after, reverse=True):
        syscalls.umount2(str(shared / name), syscalls.MNT_DETACH)


def test_a_default_is_never_mounted_in_a_tree_that_is_shared(plan: Plan, shared: Path) -> None:
    """Whatever the order of a plan is: this is what the init asserts."""
    (shared / "cgroup").mkdir()
    before = below(shared)
    own = rootfs_defaults.filesystem("/a/cgroup", "tmpfs", "")
    asked = rootfs_defaults.bind(str(shared), "/a", propagation="shared")
    with start(plan("true", mounts=[*DEFAULT, asked, own])) as process:
        assert process.message["error"] == "FailedPrecondition"
        assert "/a/cgroup: its place is in a tree that is shared" in process.message["text"]
    assert below(shared) == before


# ---- what is looked at before it is opened ----

IN_OPEN = 0x20


@contextmanager
def never_opened(path: Path) -> Iterator[None]:
    """Nobody opens this file, unless it is with O_PATH (inotify(7))."""
    libc = ctypes.CDLL(None, use_errno=True)
    watcher = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        assert libc.inotify_add_watch(watcher, os.fsencode(path), IN_OPEN) >= 0
        yield
        with pytest.raises(BlockingIOError):
            os.read(watcher, 4096)
    finally:
        os.close(watcher)


FOREIGN = {
    "fifo": stat.S_IFIFO,
    "character device": stat.S_IFCHR,
    "block device": stat.S_IFBLK,
    "socket": stat.S_IFSOCK,
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", ["passwd", "group"])
def test_user_files_that_are_none_are_never_opened(
    plan: Plan, volume: Path, kind: str, name: str
) -> None:
    os.mknod(volume / name, FOREIGN[kind] | 0o666, os.makedev(1, 5))
    with never_opened(volume / name):
        text = refusal(plan("true", mounts=with_mounts(rootfs_defaults.bind(str(volume), "/etc"))))
        assert f"/etc/{name} of the image: not a regular file" in text


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("tty", [False, True], ids=["null", "terminal"])
def test_devices_that_are_others_are_never_opened(
    plan: Plan, volume: Path, kind: str, tty: bool
) -> None:
    (volume / "pts").mkdir()
    name = "pts/ptmx" if tty else "null"
    os.mknod(volume / name, FOREIGN[kind] | 0o666, os.makedev(1, 5))
    own = [mount for mount in DEFAULT if not mount["target"].startswith("/dev")]
    made = plan("true", mounts=[*own, rootfs_defaults.bind(str(volume), "/dev")], tty=tty)
    with never_opened(volume / name), start(made) as process:
        assert process.message["error"] == "FailedPrecondition"
        assert f"/dev/{name}" in process.message["text"]
