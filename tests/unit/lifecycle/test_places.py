"""Where an agent has what it has, and an earlier version's place."""

import fcntl
from pathlib import Path

import pytest

from nodeagent.config import DEFAULT_STATE, Config
from nodeagent.errors import AlreadyExists
from nodeagent.lifecycle import places, privatemount
from nodeagent.lifecycle.places import Places


@pytest.fixture
def earlier(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What an earlier version left: its mount, and the lock that nobody holds any more."""
    earlier = tmp_path / "earlier"
    (earlier / "pods").mkdir(parents=True)
    (earlier / "lock").touch()
    monkeypatch.setattr(places, "EARLIER", earlier)
    monkeypatch.setattr(privatemount, "is_there", lambda path: path == earlier / "pods")
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
    """As Calico makes it, or another agent that runs; and who names a directory gets that."""
    assert found(state="/run/other") == Path("/run/other")
    with (earlier / "lock").open("w") as agent:
        fcntl.flock(agent, fcntl.LOCK_EX)
        assert str(found()) == DEFAULT_STATE
    monkeypatch.setattr(privatemount, "is_there", lambda _: False)
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
