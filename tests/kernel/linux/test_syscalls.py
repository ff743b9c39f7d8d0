"""System calls against a real kernel."""

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from nodeagent.linux import mounts, syscalls


def in_child(function: Callable[[], None], flags: int = 0) -> int:
    """The exit code of a child: 0 when `function` returns."""
    pid, pidfd = syscalls.clone3(flags)
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)
    assert result is not None
    return result.si_status


def test_clone3_makes_namespaces() -> None:
    def child() -> None:
        assert os.getpid() == 1
        syscalls.sethostname("na-test")
        assert socket.gethostname() == "na-test"

    name = socket.gethostname()
    assert in_child(child, syscalls.CLONE_NEWPID | syscalls.CLONE_NEWUTS) == 0
    assert socket.gethostname() == name


def test_clone3_names_a_bad_cgroup() -> None:
    with pytest.raises(OSError, match="clone3"):
        syscalls.clone3(cgroup=os.open("/", os.O_PATH))


def test_pidfds() -> None:
    pid, pidfd = syscalls.clone3()
    if pid == 0:
        signal.pause()
        os._exit(0)
    syscalls.pidfd_send_signal(pidfd, signal.SIGTERM)
    result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    assert result is not None
    assert result.si_status == signal.SIGTERM
    assert not os.get_inheritable(pidfd)
    os.close(pidfd)


def test_errors_name_call_and_object(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="openat2: No such file or directory: '/no/such'"):
        syscalls.openat2(syscalls.AT_FDCWD, "/no/such", os.O_PATH, resolve=0)
    with pytest.raises(OSError, match=f"umount2: Invalid argument: '{tmp_path}'"):
        syscalls.umount2(str(tmp_path), 0)
    with pytest.raises(OSError, match="fsopen: No such device: 'nosuchfs'"):
        syscalls.fsopen("nosuchfs")


def test_bytes_in_paths(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(name)
    os.close(syscalls.openat2(syscalls.AT_FDCWD, os.fsdecode(name), os.O_PATH, resolve=0))


def test_resolve_rules(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/")
    directory = os.open(tmp_path, os.O_PATH)
    with pytest.raises(OSError, match="symbolic links"):
        syscalls.openat2(directory, "link", os.O_PATH, resolve=syscalls.RESOLVE_NO_SYMLINKS)
    with pytest.raises(OSError, match="cross-device"):
        syscalls.openat2(directory, "..", os.O_PATH, resolve=syscalls.RESOLVE_BENEATH)
    with pytest.raises(OSError, match="cross-device"):
        syscalls.openat2(syscalls.AT_FDCWD, "/proc", os.O_PATH, resolve=syscalls.RESOLVE_NO_XDEV)
    os.close(directory)


def test_file_systems_and_mounts_of_descriptors() -> None:
    proc, root = (os.open(path, os.O_PATH) for path in ("/proc", "/"))
    assert syscalls.statfs_type(proc) == syscalls.PROC_SUPER_MAGIC
    assert syscalls.statfs_type(root) != syscalls.PROC_SUPER_MAGIC
    table = Path("/proc/self/mountinfo").read_text().splitlines()
    points = {int(line.split()[0]): line.split()[4] for line in table}
    assert points[syscalls.statx_mount_id(proc)] == "/proc"
    assert points[syscalls.statx_mount_id(root)] == "/"
    os.close(proc)
    os.close(root)


def test_close_range() -> None:
    def child() -> None:
        syscalls.close_range(3)
        assert os.listdir("/proc/self/fd") == ["0", "1", "2", "3"]

    assert in_child(child) == 0


def test_names_and_keyrings() -> None:
    def child() -> None:
        syscalls.set_name("a-name-that-is-long")
        assert Path("/proc/self/comm").read_text() == "a-name-that-is-\n"
        syscalls.join_session_keyring()

    assert in_child(child) == 0


def test_capset() -> None:
    def child() -> None:
        syscalls.capset(effective=1 << 39, permitted=1 << 39 | 1, inheritable=1)
        assert syscalls.capget() == (1 << 39, 1 << 39 | 1, 1)

    assert in_child(child) == 0


# ---- mounts ----


def in_mount_namespace(function: Callable[[], None]) -> None:
    def child() -> None:
        mounts.isolate()
        function()

    assert in_child(child, syscalls.CLONE_NEWNS) == 0


def table() -> dict[str, str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {line.split()[4]: line for line in lines}


def test_a_detached_file_system_is_attached(tmp_path: Path) -> None:
    def child() -> None:
        mount = mounts.make_filesystem(
            "tmpfs", {"size": "64k", "mode": "711"}, ["noexec", "noatime"]
        )
        assert str(tmp_path) not in table()
        syscalls.move_mount(mount, syscalls.AT_FDCWD, str(tmp_path))
        line = table()[str(tmp_path)]
        assert " rw,noexec,noatime - tmpfs tmpfs rw,size=64k,mode=711" in line
        mounts.set_attributes(mount, ["ro", "nosuid"])
        assert " ro,nosuid,noexec,noatime " in table()[str(tmp_path)]
        mounts.set_attributes(mount, ["strictatime"])
        assert " ro,nosuid,noexec - " in table()[str(tmp_path)]

    in_mount_namespace(child)


def test_propagation(tmp_path: Path) -> None:
    def child() -> None:
        one, other = tmp_path / "one", tmp_path / "other"
        one.mkdir()
        other.mkdir()
        mount = mounts.make_filesystem("tmpfs")
        syscalls.move_mount(mount, syscalls.AT_FDCWD, str(one))
        for name in ("private", "shared"):
            mounts.set_propagation(mount, name)
            assert mounts.propagation_of(mount) == name
        clone = mounts.clone_tree(mount)
        mounts.set_propagation(clone, "slave")
        syscalls.move_mount(clone, syscalls.AT_FDCWD, str(other))
        assert mounts.propagation_of(clone) == "slave"

    in_mount_namespace(child)


def test_unknown_attributes_are_named() -> None:
    with pytest.raises(ValueError, match="unknown mount attribute 'rw'"):
        mounts.attribute_mask(["rw"])


def test_a_file_system_that_is_refused_is_explained() -> None:
    with pytest.raises(OSError, match=r"nosuchoption.*: 'tmpfs'"):
        mounts.make_filesystem("tmpfs", {"nosuchoption": "1"})
