"""Where an agent has what it has, and an earlier version's place."""

import fcntl
import os
import stat
import threading
from pathlib import Path

import pytest

from nodeagent.config import DEFAULT_STATE, Config
from nodeagent.errors import AlreadyExists
from nodeagent.lifecycle import places, private_mount
from nodeagent.lifecycle.places import Places


@pytest.fixture
def earlier(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What an earlier version left: its mount, and the lock that nobody holds any more."""
    earlier = tmp_path / "earlier"
    (earlier / "pods").mkdir(parents=True)
    (earlier / "lock").touch()
    monkeypatch.setattr(places, "EARLIER", earlier)
    monkeypatch.setattr(private_mount, "is_there", lambda path: path == earlier / "pods")
    return earlier


def found(state: str = DEFAULT_STATE) -> Path:
    return Places.of(Config(state=state)).home


def test_the_default_is_nobody_else_s() -> None:
    """Calico and old versions of Istio mount /var/run/nodeagent, which is /run/nodeagent, into their pods."""
    config = Config()
    assert config.state == DEFAULT_STATE == "/run/nodeagent-cri"
    assert config.listen == "unix:///run/nodeagent-cri/nodeagent.sock"


def test_pods_of_an_earlier_version_stay_where_they_are(earlier: Path) -> None:
    found = Places.of(Config())
    assert (found.home, found.pods, found.is_earlier) == (earlier, earlier / "pods", True)
    assert str(found.state) == DEFAULT_STATE


def test_a_place_of_others_is_left_alone(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calico or another running agent makes it; and whoever names a directory gets that."""
    assert found(state="/run/other") == Path("/run/other")
    with (earlier / "lock").open("w") as agent:
        fcntl.flock(agent, fcntl.LOCK_EX)
        assert str(found()) == DEFAULT_STATE
    monkeypatch.setattr(private_mount, "is_there", lambda _: False)
    (earlier / "pods/planted").mkdir()
    assert str(found()) == DEFAULT_STATE


def test_an_earlier_place_is_held_by_one_agent(earlier: Path, tmp_path: Path) -> None:
    def of(name: str) -> Places:
        root, state = tmp_path / name / "lib", tmp_path / name / "run"
        return Places(instance=name, root=root, state=state, home=earlier)

    refused = pytest.raises(AlreadyExists, match="earlier: another agent")
    with of("one").owned(), refused, of("two").owned():
        pass
    with of("two").owned():
        pass


def test_what_is_planted_in_the_place_of_the_lock_is_not_waited_for(earlier: Path) -> None:
    """By a pod of an earlier version that has the directory as a volume."""
    (earlier / "lock").unlink()
    os.mkfifo(earlier / "lock")
    waiting = threading.Thread(target=found, daemon=True)
    waiting.start()
    waiting.join(10)
    assert not waiting.is_alive()
    assert found() == earlier


def test_links_that_are_planted_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs").chmod(0o755)
    (tmp_path / "earlier/pods").mkdir(parents=True)
    (tmp_path / "earlier/pods/planted").symlink_to(tmp_path / "theirs")
    own = Places(
        instance="own",
        root=tmp_path / "lib",
        state=tmp_path / "run",
        home=tmp_path / "earlier",
    )
    with own.owned():
        own.make()
    assert stat.S_IMODE((tmp_path / "theirs").stat().st_mode) == 0o755
    (tmp_path / "earlier/lock").unlink()
    (tmp_path / "earlier/lock").symlink_to(tmp_path / "theirs/made")
    with pytest.raises(OSError, match="symbolic links"), own.owned():
        pass
    assert not (tmp_path / "theirs/made").exists()
