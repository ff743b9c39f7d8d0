"""Identities from passwd and group files, well-formed and hostile."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.errors import InvalidArgument, NotFound
from nodeagent.linux import confined
from nodeagent.sandbox.init import users
from nodeagent.sandbox.spec import Identity, UserRequest

PASSWD = b"""root:x:0:0:root:/root:/bin/sh
daemon:x:1:1::/usr/sbin:/usr/sbin/nologin
app:x:1000:1001:App:/home/app:/bin/sh
nohome:x:1002:1002:::
short:x:1003:1003
"""
GROUP = b"""root:x:0:root
app:x:1001:
video:x:44:daemon,app
wheel:x:10:app,root
nobody
"""


def request(
    *,
    uid: int | None = None,
    username: str = "",
    gid: int | None = None,
    groupname: str = "",
    groups: tuple[int, ...] = (),
    merge: bool = True,
) -> UserRequest:
    return {
        "uid": uid,
        "username": username,
        "gid": gid,
        "groupname": groupname,
        "groups": list(groups),
        "merge_groups": merge,
    }


@pytest.mark.parametrize(
    ("asked", "uid", "gid", "groups", "home"),
    [
        (request(), 0, 0, [0, 10], "/root"),
        (request(uid=0, merge=False), 0, 0, [0], "/root"),
        (request(uid=1000), 1000, 1001, [10, 44, 1001], "/home/app"),
        (request(username="app"), 1000, 1001, [10, 44, 1001], "/home/app"),
        (request(uid=1000, merge=False, groups=(7,)), 1000, 1001, [7, 1001], "/home/app"),
        (request(uid=1000, gid=5), 1000, 5, [5, 10, 44], "/home/app"),
        (request(uid=1000, groupname="video"), 1000, 44, [10, 44], "/home/app"),
        (request(uid=4242, groups=(9, 9, 8)), 4242, 0, [0, 8, 9], "/"),
        (request(username="nohome"), 1002, 1002, [1002], "/"),
        (request(username="short"), 1003, 1003, [1003], "/"),
    ],
)
def test_identity(asked: UserRequest, uid: int, gid: int, groups: list[int], home: str) -> None:
    identity = users.identify(asked, PASSWD, GROUP)
    assert identity == {"uid": uid, "gid": gid, "groups": groups, "home": home}


def test_a_user_without_an_entry_is_in_no_group_of_the_image() -> None:
    nameless = b"empty:x:5:,,\n"
    assert users.identify(request(uid=7), b"", nameless)["groups"] == [0]


def test_names_that_are_absent_are_named() -> None:
    with pytest.raises(NotFound, match='user "ghost": not in /etc/passwd'):
        users.identify(request(username="ghost"), PASSWD, GROUP)
    with pytest.raises(NotFound, match='group "ghost": not in /etc/group'):
        users.identify(request(groupname="ghost"), PASSWD, GROUP)


def test_the_first_entry_wins() -> None:
    passwd = b"a:x:5:6::/a:\na:x:7:8::/b:\nb:x:5:9::/c:\n"
    assert users.identify(request(username="a", merge=False), passwd, b"")["uid"] == 5
    assert users.identify(request(uid=5, merge=False), passwd, b"")["gid"] == 6


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"#comment",
        b":x:0:0:::",
        b"name",
        b"name:x",
        b"name:x:-1:0",
        b"name:x:4294967295:0",
        b"name:x:99999999999999999999:0",
        b"name:x:\xd9\xa1:0",
        b"name:x: 1:0",
        b"na\0me:x:1:1",
        b"+@netgroup::::::",
        b"n" * 70_000 + b":x:1:1",
    ],
)
def test_garbage_is_skipped(line: bytes) -> None:
    found = list(users.parse_passwd(line + b"\nlast:x:3:4::/:\r\n"))
    assert found == [users.User(b"last", 3, 4, "/")]


@given(st.binary(max_size=2000), st.binary(max_size=2000))
def test_any_bytes_give_an_identity_in_range(passwd: bytes, group: bytes) -> None:
    for user in users.parse_passwd(passwd):
        assert 0 <= user.uid < 2**32 - 1
    identity = users.identify(request(uid=12), passwd, group)
    assert identity["uid"] == 12
    assert all(0 <= gid < 2**32 - 1 for gid in identity["groups"])


@given(
    st.lists(
        st.tuples(
            st.text("abc:,x0123456789\n", max_size=8),
            st.integers(-5, 2**33),
            st.integers(-5, 2**33),
        ),
        max_size=20,
    )
)
def test_lines_that_nearly_make_sense(entries: list[tuple[str, int, int]]) -> None:
    text = "\n".join(f"{name}:x:{uid}:{gid}::/:" for name, uid, gid in entries).encode()
    for user in users.parse_passwd(text):
        assert user.name
        assert 0 <= user.uid <= 2**32 - 2
        assert 0 <= user.gid <= 2**32 - 2


@pytest.mark.parametrize("changes", [{"uid": 2**32 - 1}, {"gid": 2**32 - 1}, {"groups": [2**32]}])
def test_no_number_means_who_one_is_already(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="more than"):
        users.identify({**request(uid=7), **changes}, PASSWD, GROUP)  # type: ignore[typeddict-item]


def test_more_groups_than_the_kernel_takes_are_refused() -> None:
    group = b"".join(b"g%d:x:%d:root\n" % (n, n) for n in range(65_600))
    with pytest.raises(InvalidArgument, match="65600 groups"):
        users.identify(request(), PASSWD, group)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "etc").mkdir(parents=True)
    return tmp_path / "root"


def resolve(root: Path, asked: UserRequest) -> Identity:
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY)
    own = confined.own_descriptors()
    try:
        return users.resolve(directory, own, asked)
    finally:
        os.close(own)
        os.close(directory)


def test_files_of_the_root_are_read(root: Path) -> None:
    (root / "etc" / "passwd").write_bytes(PASSWD)
    (root / "etc" / "group").write_bytes(GROUP)
    assert resolve(root, request(username="app"))["groups"] == [10, 44, 1001]


def test_absent_files_are_empty(root: Path) -> None:
    assert resolve(root, request(uid=5)) == {"uid": 5, "gid": 0, "groups": [0], "home": "/"}
    (root / "etc").rmdir()
    (root / "etc").write_bytes(b"no directory")
    assert resolve(root, request(uid=5))["gid"] == 0


def test_links_lead_inside_the_root_only(root: Path) -> None:
    secret = root.parent / "secret"
    secret.write_bytes(b"leak:x:77:77::/:\n")
    (root / "etc" / "passwd").symlink_to(f"../../../../../{secret}")
    with pytest.raises(NotFound):
        resolve(root, request(username="leak"))
    (root / "etc" / "passwd").unlink()
    (root / "etc" / "passwd").symlink_to("/etc/real")
    (root / "etc" / "real").write_bytes(PASSWD)
    assert resolve(root, request(username="app"))["uid"] == 1000


def test_a_fifo_is_refused_without_blocking(root: Path) -> None:
    os.mkfifo(root / "etc" / "passwd")
    with pytest.raises(InvalidArgument, match="/etc/passwd of the image: not a regular file"):
        resolve(root, request())


def test_links_that_lead_nowhere_are_the_images_fault(root: Path) -> None:
    passwd = root / "etc" / "passwd"
    for link in ("/etc/passwd", "x" * 300):
        passwd.symlink_to(link)
        with pytest.raises(InvalidArgument, match="/etc/passwd of the image: "):
            resolve(root, request(username="app"))
        passwd.unlink()


@pytest.mark.parametrize(
    "code",
    [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.EACCES],
    ids=errno.errorcode.get,
)
@pytest.mark.parametrize("call", ["open_path", "open_again"])
def test_the_nodes_trouble_is_not_the_images_fault(
    root: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    (root / "etc" / "passwd").write_bytes(PASSWD)

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code), "/etc/passwd")

    with monkeypatch.context() as patch:
        patch.setattr(confined, call, fail)
        with pytest.raises(OSError, match="/etc/passwd") as caught:
            resolve(root, request(username="app"))
    assert caught.value.errno == code


def test_a_directory_is_refused(root: Path) -> None:
    (root / "etc" / "passwd").mkdir()
    with pytest.raises(InvalidArgument, match="not a regular file"):
        resolve(root, request())


def test_a_huge_file_is_refused_unread(root: Path) -> None:
    with (root / "etc" / "group").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InvalidArgument, match="/etc/group of the image: larger than"):
        resolve(root, request())
