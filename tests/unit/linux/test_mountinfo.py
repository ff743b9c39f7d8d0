"""Lines of /proc/self/mountinfo (proc_pid_mountinfo(5))."""

from nodeagent.linux import mountinfo
from nodeagent.linux.mountinfo import Mount

TABLE = r"""22 1 0:1 / / rw - ext4 /dev/disk rw,errors=remount-ro
36 35 98:0 /mnt1 /mnt/a\040b\134c rw,noatime shared:9 master:1 - ext3 /dev/ro\040ot rw
"""


def test_each_line_is_a_mount() -> None:
    plain, shared = mountinfo.parse(TABLE)
    assert plain == Mount(22, "0:1", "/", "/", (), "ext4", "rw,errors=remount-ro")
    assert shared == Mount(
        36, "98:0", "/mnt1", r"/mnt/a b\c", ("shared:9", "master:1"), "ext3", "rw"
    )


def test_a_source_may_be_empty() -> None:
    [mount] = mountinfo.parse("37 22 0:5 / /mnt rw,relatime - tmpfs  rw,size=1k\n")
    assert (mount.kind, mount.options) == ("tmpfs", "rw,size=1k")


def test_only_a_newline_ends_a_line() -> None:
    [mount] = mountinfo.parse("37 22 0:5 / /a\rb\x0b\x0c\x1c\x85\u2028c rw - tmpfs none rw\n")
    assert mount.point == "/a\rb\x0b\x0c\x1c\x85\u2028c"
