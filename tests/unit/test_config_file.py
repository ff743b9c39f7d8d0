"""The configuration: sources, their order, and errors that name file, line and key."""

import re
from pathlib import Path

import pytest

from nodeagent import config, config_file
from nodeagent.errors import InvalidArgument


def write(directory: Path, text: str, name: str = "config.toml") -> Path:
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def refusal(path: Path, overrides: config_file.Document | None = None) -> str:
    with pytest.raises(InvalidArgument) as error:
        config_file.load(path, overrides or {})
    return str(error.value)


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert config_file.load(write(tmp_path, ""), {}) == config.Config()


def test_a_missing_file_is_an_error_only_if_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError):
        config_file.load(tmp_path / "absent.toml", {})
    monkeypatch.setattr(config_file, "DEFAULT_PATH", tmp_path / "absent.toml")
    assert config_file.load(None, {}) == config.Config()


def test_later_sources_win_key_by_key(tmp_path: Path) -> None:
    path = write(tmp_path, 'slots = 1\nroot = "/a"\n[network]\nmtu = 1400\nmasquerade = false\n')
    write(tmp_path, "[network]\nmtu = 1300\n", "config.d/20.toml")
    write(tmp_path, "slots = 2\n[network]\nmtu = 1200\n", "config.d/10.toml")
    write(tmp_path, "slots = 9\n", "config.d/30.conf")
    loaded = config_file.load(path, {"root": "/b", "network": {"bridge": "br7"}})
    assert (loaded.slots, loaded.root) == (2, "/b")
    assert loaded.network == config.Network(mtu=1300, masquerade=False, bridge="br7")


@pytest.mark.parametrize(
    ("text", "line", "key", "problem"),
    [
        ("slots = 1\n\n# x\ncolour = 3\n", 4, "colour", "unknown key"),
        ('[network]\nbridge = "b"\nmtu = "big"\n', 3, "network.mtu", "expected int, got str"),
        ("[network]\n\nmtu = -1\n", 3, "network.mtu", "expected int >= 0"),
        ("network.mtu = -1\n", 1, "network.mtu", "expected int >= 0"),
        ("\n[network]\ncolour = 1\n", 3, "network.colour", "unknown key"),
        ("slots = 1\n[palette]\nx = 1\n", 2, "palette", "unknown key"),
        ('[images]\npinned = [\n "a",\n 3,\n]\n', 2, "images.pinned", "expected str, got int"),
        ('root = "relative"\n', 1, "root", "must be an absolute path"),
        ('listen = "tcp://1.2.3.4:5"\n', 1, "listen", "must be unix:///path"),
        (f'listen = "unix:///{"x" * 200}"\n', 1, "listen", "at most 107 bytes"),
        ('metrics = "localhost:1"\n', 1, "metrics", "numeric address"),
        ('[cgroup]\ndriver = "docker"\n', 2, "cgroup.driver", "invalid enum value"),
        ('[network]\nsubnet4 = "10.0.0.1/8"\n', 2, "network.subnet4", "host bits"),
        ('[network]\nsubnet4 = "fd00::/64"\n', 2, "network.subnet4", "IPv4 network"),
        ('[rlimits]\nnofile = "9:8"\n', 2, "rlimits.nofile", "above the hard one"),
        ('[rlimits]\nnofile = "many"\n', 2, "rlimits.nofile", "soft:hard"),
        ('[rlimits]\nnofile = "unlimited:8"\n', 2, "rlimits.nofile", "above the hard one"),
        ('[streaming]\naddress = "0.0.0.0:1"\n', 2, "streaming.address", "beyond loopback"),
        ('[streaming]\ntls_cert = "/c"\n', 1, "streaming.tls_key", "go together"),
        ('[streaming]\nclient_ca = "/c"\n', 2, "streaming.client_ca", "needs tls_cert"),
        ('handlers = ["a b"]\n', 1, "handlers", "letters"),
    ],
)
def test_errors_name_file_line_and_key(
    tmp_path: Path, text: str, line: int, key: str, problem: str
) -> None:
    path = write(tmp_path, text)
    message = refusal(path)
    where = f"{path}:{line}: " if key != "streaming.tls_key" else "default: "
    assert message.startswith(f"{where}{key}: ")
    assert problem in message


def test_the_file_that_set_the_key_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, 'state = "/run/x"\n')
    drop_in = write(tmp_path, '\nstate = "run"\n', "config.d/1.toml")
    assert refusal(path).startswith(f"{drop_in}:2: state: ")


def test_the_command_line_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    assert refusal(path, {"root": "x"}) == "command line: root: must be an absolute path"
    assert refusal(path, {"slots": "x"}).startswith("command line: slots: expected int")


def test_broken_toml_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "slots = 1\nroot = \n")
    assert re.search(rf"{path}: not TOML: .*line 2", refusal(path))


@pytest.mark.parametrize("value", ["[" * 20_000, "9" * 5_000])
def test_toml_that_is_too_much_is_refused(tmp_path: Path, value: str) -> None:
    assert "not TOML" in refusal(write(tmp_path, f"slots = {value}"))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"root = '\xff'")
    assert "not TOML" in refusal(path)


def test_dumps_is_read_back_to_the_same(tmp_path: Path) -> None:
    changed = config.Config(
        root='/odd "name"\\\x7f\n',
        handlers=("kata", "test-handler"),
        network=config.Network(subnet6="fd00::/64", masquerade=False),
    )
    assert config_file.load(write(tmp_path, config_file.dumps(changed)), {}) == changed
