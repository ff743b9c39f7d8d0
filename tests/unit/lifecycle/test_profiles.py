"""Confinement is given as it was asked for, or refused."""

from pathlib import Path

import pytest

from nodeagent.errors import FailedPrecondition, InvalidArgument, Unsupported
from nodeagent.lifecycle import apparmor, profiles
from nodeagent.lifecycle.profiles import Profiles
from nodeagent.records import ContainerConfig, MountConfig, Profile, SELinux

PROFILES = Profiles("")
DEFAULT = Profile(kind="default")
LABEL = SELinux(user="system_u", role="system_r", type="container_t", level="s0:c1")


def config(**fields: object) -> ContainerConfig:
    return ContainerConfig(name="main", image="image", **fields)  # type: ignore[arg-type]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A kernel with AppArmor; the list of its profiles."""
    enabled, listed = tmp_path / "enabled", tmp_path / "profiles"
    enabled.write_text("Y\n")
    listed.write_text("mine (enforce)\n")
    monkeypatch.setattr(apparmor, "ENABLED", enabled)
    monkeypatch.setattr(apparmor, "PROFILES", listed)
    return listed


@pytest.fixture
def selinux(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(profiles, "SELINUX", tmp_path)


def test_apparmor(loaded: Path) -> None:
    assert PROFILES.apparmor(config(apparmor=Profile(kind="localhost", ref="mine"))) == "mine"
    assert PROFILES.apparmor(config(apparmor=Profile(kind="unconfined"))) == ""
    assert PROFILES.apparmor(config()) == ""
    loaded.write_text(f"{apparmor.NAME} (enforce)\n")
    assert PROFILES.apparmor(config()) == PROFILES.apparmor(config(apparmor=DEFAULT))
    assert PROFILES.apparmor(config(apparmor=DEFAULT, privileged=True)) == ""


@pytest.mark.parametrize("profile", [DEFAULT, Profile(kind="localhost", ref="other")])
def test_apparmor_that_is_asked_for_but_not_there(loaded: Path, profile: Profile) -> None:
    with pytest.raises(FailedPrecondition, match="not loaded"):
        PROFILES.apparmor(config(apparmor=profile))
    apparmor.ENABLED.write_text("N\n")
    with pytest.raises(Unsupported, match="no AppArmor"):
        PROFILES.apparmor(config(apparmor=profile))


@pytest.mark.usefixtures("selinux")
def test_selinux() -> None:
    assert PROFILES.selinux(config(selinux=LABEL)) == "system_u:system_r:container_t:s0:c1"
    assert PROFILES.selinux(config()) == ""
    with pytest.raises(InvalidArgument, match="lacks its user, role or type"):
        PROFILES.selinux(config(selinux=SELinux(level="s0:c1")))


@pytest.mark.usefixtures("selinux")
def test_volumes_that_a_label_would_need_are_not_labelled() -> None:
    mount = MountConfig(container_path="/data", host_path="/srv", selinux_relabel=True)
    assert PROFILES.selinux(config(mounts=(mount,))) == ""
    with pytest.raises(Unsupported, match='selinux_relabel of "/data"'):
        PROFILES.selinux(config(mounts=(mount,), selinux=LABEL))


def test_selinux_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(profiles, "SELINUX", tmp_path / "absent")
    with pytest.raises(Unsupported, match="no SELinux"):
        PROFILES.selinux(config(selinux=LABEL))
