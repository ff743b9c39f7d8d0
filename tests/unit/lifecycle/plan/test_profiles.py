"""Confinement is given as it was asked for, or refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from zipfile import ZipFile

import pytest

from nodeagent.errors import FailedPrecondition, InvalidArgument, Unsupported
from nodeagent.lifecycle.plan import apparmor
from nodeagent.lifecycle.plan import selinux as selinux_
from nodeagent.lifecycle.plan.profiles import Profiles
from nodeagent.lifecycle.plan.selinux import NO_LABELS, Labels
from nodeagent.requests import ContainerConfig, Profile, SELinux
from tests.conformance.apparmor import put_in_path
from tests.support.images import DEBIAN, PROJECT

PROFILES = Profiles("")
DEFAULT = Profile(kind="default")
LABEL = SELinux(user="system_u", role="system_r", type="container_t", level="s0:c1")


def config(**fields: object) -> ContainerConfig:
    return ContainerConfig(name="main", image="image", **fields)  # type: ignore[arg-type]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A kernel with AppArmor, a node without its parser; the list of the kernel's profiles."""
    enabled, listed = tmp_path / "enabled", tmp_path / "profiles"
    enabled.write_text("Y\n")
    listed.write_text("mine (enforce)\n")
    monkeypatch.setattr(apparmor, "ENABLED", enabled)
    monkeypatch.setattr(apparmor, "PROFILES", listed)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return listed


def load_default(listed: Path) -> None:
    listed.write_text(f"{apparmor.NAME} (enforce)\n")


def install_parser(folder: Path, script: str) -> None:
    program = folder / "bin/apparmor_parser"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


@pytest.fixture
def selinux(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A kernel with SELinux; the file of the policy that has the labels of containers."""
    contexts = tmp_path / "mine/contexts/lxc_contexts"
    contexts.parent.mkdir(parents=True)
    (tmp_path / "config").write_text("# by hand\nSELINUX=enforcing\nSELINUXTYPE=mine\n")
    contexts.write_text(
        'process = "system_u:system_r:container_t:s0"\n'
        'file = "system_u:object_r:container_file_t:s0"\n'
    )
    monkeypatch.setattr(selinux_, "ENFORCE", tmp_path)
    monkeypatch.setattr(selinux_, "POLICIES", tmp_path)
    monkeypatch.setattr(selinux_, "CONTAINERS", tmp_path / "contexts")
    return contexts


async def test_apparmor(loaded: Path) -> None:
    mine = Profile(kind="localhost", ref="mine")
    assert await PROFILES.apparmor(config(apparmor=mine)) == "mine"
    assert await PROFILES.apparmor(config(apparmor=mine, privileged=True)) == "mine"
    assert await PROFILES.apparmor(config(apparmor=Profile(kind="unconfined"))) == ""
    assert await PROFILES.apparmor(config()) == ""
    load_default(loaded)
    assert await PROFILES.apparmor(config()) == apparmor.NAME
    assert await PROFILES.apparmor(config(apparmor=DEFAULT)) == apparmor.NAME
    for asked in (None, DEFAULT):
        assert await PROFILES.apparmor(config(apparmor=asked, privileged=True)) == ""


async def test_the_default_profile_is_loaded_when_it_is_not_there(loaded: Path) -> None:
    install_parser(loaded.parent, f'echo "{apparmor.NAME} (enforce)" > {loaded}')
    assert await PROFILES.apparmor(config()) == apparmor.NAME


@pytest.mark.parametrize("asked", [None, DEFAULT])
async def test_nobody_runs_without_the_default_profile_where_loading_fails(
    loaded: Path, asked: Profile | None
) -> None:
    install_parser(loaded.parent, "echo no such feature >&2; exit 1")
    with pytest.raises(FailedPrecondition, match="no such feature"):
        await PROFILES.apparmor(config(apparmor=asked))


@pytest.mark.parametrize("profile", [DEFAULT, Profile(kind="localhost", ref="other")])
async def test_apparmor_that_is_asked_for_but_not_there(loaded: Path, profile: Profile) -> None:
    with pytest.raises(FailedPrecondition, match="not loaded"):
        await PROFILES.apparmor(config(apparmor=profile))
    apparmor.ENABLED.write_text("N\n")
    with pytest.raises(Unsupported, match="no AppArmor"):
        await PROFILES.apparmor(config(apparmor=profile))
    assert await PROFILES.apparmor(config()) == ""


def test_the_default_profile_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the real parser, against the features that the package comes with; nothing is loaded."""
    if not DEBIAN.joinpath("apparmor").exists():
        pytest.skip("the parser is not unpacked: `make test-setup` does so")
    monkeypatch.setenv("PATH", os.environ["PATH"])
    put_in_path(tmp_path / "bin")
    command = ["apparmor_parser", "--skip-kernel-load", "--skip-cache", "--stdout"]
    done = subprocess.run(command, input=apparmor.text().encode(), stdout=PIPE, check=True)
    assert apparmor.NAME.encode() in done.stdout


def test_a_wheel_has_the_default_profile(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flit_core.wheel", "--outdir", str(tmp_path), str(PROJECT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.iterdir()
    assert f"nodeagent/lifecycle/plan/{apparmor.NAME}.apparmor" in ZipFile(wheel).namelist()


@pytest.mark.usefixtures("selinux")
def test_selinux() -> None:
    assert PROFILES.selinux(config(selinux=LABEL)).process == "system_u:system_r:container_t:s0:c1"
    assert PROFILES.selinux(config()) == NO_LABELS
    assert PROFILES.selinux(config(selinux=LABEL, privileged=True)) == NO_LABELS


@pytest.mark.parametrize(
    ("asked", "process", "files"),
    [
        (SELinux(type="spc_t"), "system_u:system_r:spc_t:s0", "system_u:object_r:{}:s0"),
        (
            SELinux(level="s0:c1,c2"),
            "system_u:system_r:container_t:s0:c1,c2",
            "system_u:object_r:{}:s0:c1,c2",
        ),
        (SELinux(user="u", role="r", type="t"), "u:r:t:s0", "u:object_r:{}:s0"),
        (
            SELinux(role="r", level="s0-s1:c0.c9"),
            "system_u:r:container_t:s0-s1:c0.c9",
            "system_u:object_r:{}:s0-s1:c0.c9",
        ),
    ],
)
@pytest.mark.usefixtures("selinux")
def test_parts_of_a_label_that_are_left_out_are_the_policy_s(
    asked: SELinux, process: str, files: str
) -> None:
    """Charts give a type (Cilium), the kubelet's conformance pods a level.

    The files of a container have the type that the policy has for them, and the level of its processes.
    """
    labels = PROFILES.selinux(config(selinux=asked))
    assert labels == Labels(process, files.format("container_file_t"))


def test_the_policy_of_containers_has_a_file_of_its_own(selinux: Path) -> None:
    selinux_.CONTAINERS.write_text(
        'process = "system_u:system_r:other_t:s0"\nfile = "system_u:object_r:other_file_t:s0"\n'
    )
    labels = PROFILES.selinux(config(selinux=SELinux(level="s0:c1")))
    assert labels == Labels(
        "system_u:system_r:other_t:s0:c1", "system_u:object_r:other_file_t:s0:c1"
    )


@pytest.mark.parametrize(
    "asked",
    [
        SELinux(level='s0",lowerdir="/'),
        SELinux(type="t t"),
        SELinux(level="s0\\"),
        SELinux(type="t,u"),
        SELinux(user="ü"),
    ],
)
@pytest.mark.usefixtures("selinux")
def test_what_is_no_label_is_refused(asked: SELinux) -> None:
    """It becomes an option of mounts, and shall end where the label does."""
    with pytest.raises(InvalidArgument, match="is not an SELinux label"):
        PROFILES.selinux(config(selinux=asked))


def test_a_policy_without_levels(selinux: Path) -> None:
    selinux.write_text(
        "process = system_u:system_r:container_t\nfile = system_u:object_r:container_file_t\n"
    )
    labels = PROFILES.selinux(config(selinux=SELinux(type="spc_t")))
    assert labels == Labels("system_u:system_r:spc_t", "system_u:object_r:container_file_t")


@pytest.mark.parametrize("text", [None, "", 'process = ""\n', 'process = "a:b"\n'])
def test_a_policy_without_a_label_of_containers(selinux: Path, text: str | None) -> None:
    if text is None:
        selinux.unlink()
    else:
        selinux.write_text(text)
    with pytest.raises(FailedPrecondition, match="lxc_contexts has no label of containers"):
        PROFILES.selinux(config(selinux=SELinux(type="spc_t")))
    labels = PROFILES.selinux(config(selinux=LABEL))
    assert labels == Labels("system_u:system_r:container_t:s0:c1", "")


def test_selinux_that_is_not_there_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(selinux_, "ENFORCE", tmp_path / "absent")
    caplog.set_level("INFO")
    profiles = Profiles("")
    assert profiles.selinux(config()) == NO_LABELS
    assert not caplog.messages
    for _ in range(2):
        assert profiles.selinux(config(selinux=LABEL)) == NO_LABELS
    [said] = caplog.messages
    assert "no SELinux" in said


def test_a_default_seccomp_profile_is_checked_also_for_what_capabilities_open(
    tmp_path: Path,
) -> None:
    Profiles("").check_default()
    file = tmp_path / "profile.json"
    entry = {"names": ["read"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}}
    file.write_text(json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [entry]}))
    Profiles(str(file)).check_default()
    entry["action"] = "SCMP_ACT_NONSENSE"
    file.write_text(json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [entry]}))
    with pytest.raises(
        InvalidArgument,
        match=rf'seccomp\.default_profile: seccomp profile "{file}": .*NONSENSE.*; correct the file',
    ):
        Profiles(str(file)).check_default()
    with pytest.raises(InvalidArgument, match=r"seccomp\.default_profile: .*mem"):  # EIO of read(2)
        Profiles("/proc/self/mem").check_default()
