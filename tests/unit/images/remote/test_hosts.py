"""hosts.toml: where a registry's images come from."""

import errno
import logging
import os
from pathlib import Path

import pytest

from nodeagent.errors import InvalidArgument
from nodeagent.images.remote.hosts import hosts_of, normal_name


def write(directory: Path, name: str, text: str) -> Path:
    file = directory / name / "hosts.toml"
    file.parent.mkdir()
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("domain", "root"),
    [
        ("docker.io", "https://registry-1.docker.io/v2"),
        ("quay.io", "https://quay.io/v2"),
        ("quay.io:80", "https://quay.io:80/v2"),
        ("localhost:5000", "http://localhost:5000/v2"),
        ("127.0.0.1:5000", "http://127.0.0.1:5000/v2"),
        ("[::1]:5000", "http://[::1]:5000/v2"),
        ("localhost:443", "https://localhost:443/v2"),
        ("localhost", "https://localhost/v2"),
        ("127.0.0.1.example.com:5000", "https://127.0.0.1.example.com:5000/v2"),
        ("localhost.example.com:5000", "https://localhost.example.com:5000/v2"),
    ],
)
def test_without_a_file(tmp_path: Path, domain: str, root: str) -> None:
    (host,) = hosts_of(domain, tmp_path / "none")
    assert (host.root, host.mirror, host.resolve, host.pull) == (root, False, True, True)


def test_everything(tmp_path: Path) -> None:
    write(
        tmp_path,
        "docker.io",
        """
server = "https://registry-1.docker.io"
ca = "/etc/ca.pem"

[host."https://one.example:8443/docker"]
capabilities = ["pull"]
ca = ["one.pem", "/two.pem"]
client = [["c.pem", "k.pem"], "both.pem"]
skip_verify = true
dial_timeout = "1m1.5s"
proxy = "http://proxy:3128"
[host."https://one.example:8443/docker".header]
x-one = "a"
x-two = ["b", "c"]

[host."http://two.example/api/"]
override_path = true
client = "pair.pem"
""",
    )
    one, two, server = hosts_of("docker.io", tmp_path)
    base = tmp_path / "docker.io"
    assert one.root == "https://one.example:8443/docker/v2"
    assert (one.pull, one.resolve, one.mirror) == (True, False, True)
    assert one.ca == (base / "one.pem", Path("/two.pem"))
    assert one.client == ((base / "c.pem", base / "k.pem"), (base / "both.pem", None))
    assert (one.skip_verify, one.dial_seconds) == (True, 61.5)
    assert one.headers == (("x-one", "a"), ("x-two", "b"), ("x-two", "c"))
    assert one.proxy == "http://proxy:3128"
    assert (two.root, two.client) == ("http://two.example/api", ((base / "pair.pem", None),))
    assert (two.pull, two.resolve) == (True, True)
    assert (server.root, server.mirror) == ("https://registry-1.docker.io/v2", False)
    assert server.ca == (Path("/etc/ca.pem"),)


@pytest.mark.parametrize("name", ["host.example_5000_", "host.example:5000", "_default"])
def test_names_of_the_directory(tmp_path: Path, name: str) -> None:
    write(tmp_path, name, '[host."http://mirror"]')
    hosts = hosts_of("host.example:5000", tmp_path)
    assert [host.root for host in hosts] == ["http://mirror/v2", "https://host.example:5000/v2"]


def test_the_most_special_directory_wins(tmp_path: Path) -> None:
    write(tmp_path, "_default", 'server = "http://default"')
    write(tmp_path, "a.b", 'server = "http://special"')
    (special,), (default,) = hosts_of("a.b", tmp_path), hosts_of("c.d", tmp_path)
    assert (special.root, special.mirror) == ("http://special/v2", False)
    assert (default.root, default.mirror) == ("http://default/v2", True)


def test_a_host_is_tried_once(tmp_path: Path) -> None:
    text = '[host."http://localhost:1"]\ndial_timeout = "1s"\n[host."http://other"]'
    write(tmp_path, "localhost:1", text)
    first, other = hosts_of("localhost:1", tmp_path)
    assert (first.root, first.dial_seconds) == ("http://localhost:1/v2", 1)
    assert other.root == "http://other/v2"


def test_a_changed_file_is_seen(tmp_path: Path) -> None:
    file = write(tmp_path, "a.b", 'server = "http://one"')
    hosts_of("a.b", tmp_path)
    file.write_text('server = "http://two"')
    assert hosts_of("a.b", tmp_path)[0].root == "http://two/v2"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("server = ?", "line 1"),
        ("server = 5", "server"),
        ('server = "ftp://a"', "server"),
        ('server = "https://user:pw@a"', "server"),
        ('server = "https://a:port"', "server"),
        ('capabilities = ["pul"]', "capabilities"),
        ('[host."http://m"]\nskip_verify = "yes"', r'host "http://m".*skip_verify'),
        ('[host."http://m"]\nca = 5', r'host "http://m".*ca'),
        ('[host."http://m"]\nclient = [["a"]]', r'host "http://m".*client'),
        ('[host."http://m"]\ndial_timeout = "5"', r'host "http://m".*dial_timeout'),
        ('[host."http://m"]\ndial_timeout = 5', r'host "http://m".*dial_timeout'),
        ('[host."http://m".header]\n"a b" = "c"', r'host "http://m".*header "a b"'),
        ('[host."http://m".header]\na = "c\\nd"', r'host "http://m".*header "a"'),
        ('[host."http://m"]\nproxy = "socks5://p"', r'host "http://m".*proxy'),
        ('[host."m?x"]', r'host "m\?x"'),
        ('[host."http://[::1]080+api/"]', r'host "http://\[::1\]080\+api/"'),
        ('[host."http://m\\\\n"]', r'host "http://m'),
        ('[host."http://é"]', r'host "http://é"'),
        ("a = " + "[" * 20_000, ""),
        ("a = " + "9" * 5_000, ""),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, key: str) -> None:
    write(tmp_path, "a.b", text)
    with pytest.raises(InvalidArgument, match=rf"a\.b/hosts\.toml: .*{key}"):
        hosts_of("a.b", tmp_path)


def test_a_file_that_cannot_be_read_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, "a.b", "")

    def read_text(_: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(OSError, match=rf"Input/output error: '{file}'"):
        hosts_of("a.b", tmp_path)


def test_keys_of_newer_versions_are_noted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = 'sever = "x"\n[host."http://m"]\ncapabilities = ["pull", "referrers"]\nserver = "y"'
    file = write(tmp_path, "a.b", text)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            first, _ = hosts_of("a.b", tmp_path)
    assert (first.pull, first.resolve) == (True, False)
    assert [record.getMessage() for record in caplog.records] == [
        f'{file}: unknown key "sever", ignored',
        f'{file}: host "http://m": unknown key "server", ignored',
    ]


@pytest.mark.parametrize("name", ["host.example_5000_", "host.example:5000"])
def test_certificates_without_a_file(tmp_path: Path, name: str) -> None:
    """Docker's layout, which containerd reads as well."""
    directory = tmp_path / name
    directory.mkdir()
    for file in ("ca.crt", "b.crt", "node.cert", "node.key", "lone.cert", "other.key", "readme"):
        (directory / file).touch()
    (host,) = hosts_of("host.example:5000", tmp_path)
    assert host.root == "https://host.example:5000/v2"
    assert host.ca == (directory / "b.crt", directory / "ca.crt")
    assert host.client == ((directory / "node.cert", directory / "node.key"),)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://Registry-1.docker.io/v2", "docker.io"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("docker.io", "docker.io"),
        ("https://a.b:443/v2", "a.b"),
        ("http://a.b:80", "a.b"),
        ("http://a.b:443", "a.b:443"),
        ("a.b:5000", "a.b:5000"),
        ("A.b:443", "a.b"),
    ],
)
def test_normal_name(url: str, name: str) -> None:
    assert normal_name(url) == name
