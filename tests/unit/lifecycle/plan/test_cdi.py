"""What CDI devices add to a container, and what is said of those that cannot be had."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nodeagent.errors import FailedPrecondition, InvalidArgument, NotFound, Unsupported
from nodeagent.lifecycle.plan import cdi_specs
from nodeagent.lifecycle.plan.cdi import Cdi, asked_for
from nodeagent.requests import ContainerConfig, DeviceConfig, HookConfig, MountConfig

HOOK = "/usr/bin/nvidia-cdi-hook"
SPEC: dict[str, Any] = {
    "cdiVersion": "0.6.0",
    "kind": "vendor.com/gpu",
    "devices": [
        {
            "name": "0",
            "containerEdits": {
                "deviceNodes": [{"path": "/dev/gpu0", "hostPath": "/dev/null", "fileMode": 432}],
                "env": ["GPU=0"],
            },
        },
        {"name": "broken", "containerEdits": {"deviceNodes": [{"path": "dev/gpu0"}]}},
        {"name": "group", "containerEdits": {"additionalGids": [1 << 70]}},
        {"name": "cache", "containerEdits": {"intelRdt": {"closID": "a"}, "env": ["A=b"]}},
        {"name": "nic", "containerEdits": {"netDevices": [{"hostInterfaceName": "eth1"}]}},
        {"name": "fifo", "containerEdits": {"deviceNodes": [{"path": "/dev/p", "type": "p"}]}},
        {"name": "twice"},
        {"name": "twice"},
    ],
    "containerEdits": {
        "mounts": [
            {"hostPath": "/lib/gpu", "containerPath": "/gpu", "options": ["ro", "nosuid", "bind"]}
        ],
        "additionalGids": [44, 0],
        "env": ["GPU=none", "ALL=1"],
    },
}
# In the shape that `nvidia-ctk cdi generate` writes.
GENERATED = f"""---
cdiVersion: 0.5.0
kind: nvidia.com/gpu
devices:
    - name: "0"
      containerEdits:
        deviceNodes:
            - path: /dev/nvidia0
              hostPath: /run/nvidia/driver/dev/nvidia0
            - path: /dev/dri/card1
              major: 226
              minor: 1
              type: c
              fileMode: 0660
              permissions: rw
              gid: 44
    - name: all
containerEdits:
    env:
        - NVIDIA_VISIBLE_DEVICES=void
    deviceNodes:
        - path: /dev/nvidiactl
    hooks:
        - hookName: createContainer
          path: {HOOK}
          args:
            - nvidia-cdi-hook
            - create-symlinks
            - --link
            - libcuda.so.1::/usr/lib/x86_64-linux-gnu/libcuda.so
          env:
            - NVIDIA_CTK_DEBUG=false
        - hookName: poststop
          path: {HOOK}
          timeout: 5
    mounts:
        - hostPath: /usr/lib/x86_64-linux-gnu/libcuda.so.550
          containerPath: /usr/lib/x86_64-linux-gnu/libcuda.so.550
          options:
            - ro
            - nosuid
            - nodev
            - rbind
            - rprivate
"""


def config(*names: str, **fields: Any) -> ContainerConfig:
    return ContainerConfig(name="c", image="i", cdi_devices=names, **fields)


def cdi(*directories: Path, programs: tuple[str, ...] = (HOOK,)) -> Cdi:
    return Cdi(directories, programs)


@pytest.fixture(autouse=True)
def _files_of_root_alone() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "gpu.json").write_text(json.dumps(SPEC))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "bytes.json").write_bytes(b'{"kind":"\xff"}')
    (tmp_path / "deep.json").write_bytes(b'{"x":' + b"[" * 200_000)
    (tmp_path / "below").mkdir()
    return tmp_path


def test_edits_of_the_device_and_of_its_spec(directory: Path) -> None:
    made = cdi(directory).inject(config("vendor.com/gpu=0"))
    assert made.devices == (
        DeviceConfig(
            container_path="/dev/gpu0", host_path="/dev/null", permissions="rwm", mode=0o660
        ),
    )
    assert dict(made.envs) == {"GPU": b"0", "ALL": b"1"}  # the device's own is the later one
    assert made.mounts == (
        MountConfig(
            container_path="/gpu",
            host_path="/lib/gpu",
            readonly=True,
            options=("nosuid",),
            must_exist=True,
        ),
    )
    assert made.supplemental_groups == (44,)


def test_edits_of_a_spec_are_those_of_all_its_devices_once(tmp_path: Path) -> None:
    (tmp_path / "nvidia.yaml").write_text(GENERATED)
    made = cdi(tmp_path).inject(config("nvidia.com/gpu=0", "nvidia.com/gpu=all"))
    assert [device.container_path for device in made.devices] == [
        "/dev/nvidiactl",
        "/dev/nvidia0",
        "/dev/dri/card1",
    ]


def test_as_nvidias_toolkit_writes_it(tmp_path: Path) -> None:
    (tmp_path / "nvidia.yaml").write_text(GENERATED)
    made = cdi(tmp_path).inject(config("nvidia.com/gpu=0", run_as_user=1000, run_as_group=7))
    control, node, card = made.devices
    assert (control.host_path, control.mode, control.uid, control.gid) == (
        "/dev/nvidiactl",
        0o666,
        1000,
        7,
    )
    assert node.host_path == "/run/nvidia/driver/dev/nvidia0"
    assert card == DeviceConfig(
        container_path="/dev/dri/card1",
        host_path="/dev/dri/card1",
        permissions="rw",
        mode=0o660,
        uid=1000,
        gid=44,
        type="c",
        major=226,
        minor=1,
    )
    create, stop = made.hooks
    assert create == HookConfig(
        stage="createContainer",
        path=HOOK,
        args=(
            "nvidia-cdi-hook",
            "create-symlinks",
            "--link",
            "libcuda.so.1::/usr/lib/x86_64-linux-gnu/libcuda.so",
        ),
        env=("NVIDIA_CTK_DEBUG=false",),
        source=str(tmp_path / "nvidia.yaml"),
    )
    assert (stop.stage, stop.args, stop.timeout_s) == ("poststop", (HOOK,), 5)
    assert made.mounts[0].options == ("nosuid", "nodev")
    assert made.mounts[0].readonly


def test_in_a_user_namespace_mode_and_owner_stay_the_nodes(tmp_path: Path) -> None:
    (tmp_path / "nvidia.yaml").write_text(GENERATED)
    made = cdi(tmp_path).inject(config("nvidia.com/gpu=all", run_as_user=1000), userns=True)
    assert (made.devices[0].mode, made.devices[0].uid) == (None, None)


@pytest.mark.parametrize("version", sorted(cdi_specs.VERSIONS))
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_versions(tmp_path: Path, version: str, suffix: str) -> None:
    (tmp_path / f"gpu.{suffix}").write_text(json.dumps(SPEC | {"cdiVersion": version}))
    assert cdi(tmp_path).inject(config("vendor.com/gpu=0")).devices


@pytest.mark.parametrize("version", ["1.2.0", "", 1, None, "\ud800"])
def test_a_version_that_is_not_known(tmp_path: Path, version: object) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps(SPEC | {"cdiVersion": version}))
    with pytest.raises(FailedPrecondition, match=r"gpu\.json: cdiVersion .*1\.1\.0"):
        cdi(tmp_path).inject(config("vendor.com/gpu=0"))


def test_what_is_null_is_absent(tmp_path: Path) -> None:
    """Go writes an empty list so."""
    spec = SPEC | {
        "devices": [{"name": "0", "containerEdits": {"env": None, "mounts": None}}],
        "containerEdits": None,
    }
    (tmp_path / "gpu.json").write_text(json.dumps(spec))
    assert cdi(tmp_path).inject(config("vendor.com/gpu=0")) == config("vendor.com/gpu=0")


# ---- names, annotations and directories ----


def test_annotations_name_devices_as_well() -> None:
    annotations = {
        "cdi.k8s.io/plugin_0": "v.com/gpu=1,v.com/gpu=0",
        "cdi.k8s.io/other": "v.com/nic=a",
        "example.com/cdi.k8s.io": "no",
    }
    asked = config("v.com/gpu=0", annotations=annotations)
    assert asked_for(asked) == ("v.com/gpu=0", "v.com/gpu=1", "v.com/nic=a")
    assert Cdi([], []).is_asked_for(config(annotations=annotations))
    assert not Cdi([], []).is_asked_for(config(annotations={"a": "b"}))


@pytest.mark.parametrize("value", ["", "v.com/gpu", "v.com/gpu=0,", "v.com/gpu=0 ", "=", "1/a=b"])
def test_an_annotation_that_names_no_device(value: str) -> None:
    with pytest.raises(InvalidArgument, match=r'config\.annotations\["cdi\.k8s\.io/a"\]'):
        asked_for(config(annotations={"cdi.k8s.io/a": value}))


def test_the_later_directory_wins(tmp_path: Path) -> None:
    for number, name in enumerate(("etc", "run")):
        (tmp_path / name).mkdir()
        device = {"name": "0", "containerEdits": {"env": [f"FROM={number}"]}}
        spec = SPEC | {"devices": [device], "containerEdits": {}}
        (tmp_path / name / "gpu.json").write_text(json.dumps(spec))
    made = cdi(tmp_path / "etc", tmp_path / "absent", tmp_path / "run").inject(
        config("vendor.com/gpu=0")
    )
    assert made.envs == (("FROM", b"1"),)


def test_a_device_twice_in_one_directory_is_a_conflict(directory: Path) -> None:
    (directory / "also.yaml").write_text(json.dumps(SPEC))
    with pytest.raises(FailedPrecondition, match=r"also\.yaml and .*gpu\.json; remove it"):
        cdi(directory).inject(config("vendor.com/gpu=0"))


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    injecting = cdi(tmp_path)
    with pytest.raises(NotFound):
        injecting.inject(config("vendor.com/gpu=0"))
    path = tmp_path / "gpu.json"
    for name in ("0", "1"):
        path.write_text(json.dumps(SPEC | {"devices": [{"name": name}]}))
        os.utime(path, ns=(0, int(name)))
        assert injecting.inject(config(f"vendor.com/gpu={name}")).mounts


# ---- what is wrong concerns only what asks for it ----


@pytest.mark.parametrize("call", ["listdir", "open"])
def test_a_lack_of_descriptors_is_not_a_lack_of_devices(
    directory: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    injector = cdi(directory)

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="Too many open files"):
            injector.inject(config("vendor.com/gpu=0"))
    assert injector.inject(config("vendor.com/gpu=0")).devices


def test_a_file_that_could_not_be_read_is_read_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it is the same."""
    injector = cdi(directory)

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(NotFound, match=r"not read: .*Input/output error"):
            injector.inject(config("vendor.com/gpu=0"))
    assert injector.inject(config("vendor.com/gpu=0")).devices


def test_unknown_device(directory: Path) -> None:
    """The files that could not be read may have had it."""
    with pytest.raises(NotFound, match=r"vendor\.com/gpu=1.*not read: .*broken\.json: "):
        cdi(directory).inject(config("vendor.com/gpu=1"))


@pytest.mark.parametrize(
    ("device", "error", "text"),
    [
        ("nic", Unsupported, "netDevices: eth1: network devices of the node cannot"),
        ("fifo", Unsupported, "FIFO"),
        ("broken", FailedPrecondition, r"gpu\.json: .*Expected `str` matching.*deviceNodes\[0\]"),
        ("group", FailedPrecondition, r"gpu\.json: .*additionalGids\[0\]"),
        ("twice", FailedPrecondition, "is defined twice"),
    ],
)
def test_a_device_that_cannot_be_had(
    directory: Path, device: str, error: type[Exception], text: str
) -> None:
    injecting = cdi(directory)
    with pytest.raises(error, match=text):
        injecting.inject(config(f"vendor.com/gpu={device}"))
    injecting.inject(config("vendor.com/gpu=0"))


def test_warnings_are_said_once(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    injecting = cdi(directory)
    for _ in range(3):
        injecting.inject(config("vendor.com/gpu=cache"))
    texts = caplog.messages
    assert len(texts) == len(set(texts))
    assert sum("intelRdt is not supported and is ignored" in text for text in texts) == 1
    for name in ("broken.json", "bytes.json", "deep.json"):
        assert sum(name in text for text in texts) == 1


def test_what_was_said_goes_with_its_file(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Drivers of dynamic resource allocation write a file for each claim: an agent's memory is not for all of them."""
    specs = cdi_specs.Specs([directory])
    for _ in range(2):
        (directory / "claim.json").write_text("{")
        specs.read()
        (directory / "claim.json").unlink()
        specs.read()
    assert sum("claim.json" in text for text in caplog.messages) == 2
    assert sum("broken.json" in text for text in caplog.messages) == 1
    assert directory / "claim.json" not in specs._said


def test_no_more_is_said_of_a_file_than_can_be_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = SPEC | {"devices": [{"name": f"-{number}"} for number in range(1000)]}
    (tmp_path / "gpu.json").write_text(json.dumps(spec))
    specs = cdi_specs.Specs([tmp_path])
    specs.read()
    assert len(caplog.messages) == cdi_specs.MAX_SAID + 1
    assert caplog.messages[-1].endswith("gpu.json: has more faults, which are not logged")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &x [1]\nkind: v.com/gpu", "anchors or aliases"),
        ("a: *x", "anchors or aliases"),
        ("a: " + "[" * 100_000, "nesting depth|nested deeper"),
        ("a: " + "[" * 40 + "]" * 40, "nested deeper"),
        ("a: !!python/object/apply:os.system [true]", "is not vendor/class|constructor"),
        ("a: !!bool foo", "is not YAML: KeyError"),
        ("a: !!timestamp foo", "is not YAML: AttributeError"),
        ("a: !!int ''", "is not YAML: IndexError"),
        ("a: [", "expected"),
        ("- a", "is not an object"),
        ("kind: gpu", "is not vendor/class"),
        ("kind: v.com/gpu\ndevices: 1", "is not a list"),
        ("#" * ((1 << 20) + 1), "larger|bytes"),
    ],
)
def test_files_of_which_nothing_can_be_made(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    (tmp_path / "good.json").write_text(json.dumps(SPEC))
    injecting = cdi(tmp_path)
    with pytest.raises(NotFound, match=rf"bad\.yaml: .*({reason})"):
        injecting.inject(config("v.com/gpu=0"))
    assert injecting.inject(config("vendor.com/gpu=0")).devices


def test_hooks_run_listed_programs_only(tmp_path: Path) -> None:
    (tmp_path / "nvidia.yaml").write_text(GENERATED)
    text = rf'nvidia\.yaml: hook createContainer: "{HOOK}" .* cdi\.hook_programs'
    with pytest.raises(FailedPrecondition, match=text):
        cdi(tmp_path, programs=("/usr/bin/other",)).inject(config("nvidia.com/gpu=0"))


def test_without_devices_nothing_is_read(tmp_path: Path) -> None:
    assert cdi(tmp_path / "absent").inject(config()) == config()


@pytest.mark.parametrize(
    ("options", "readonly", "recursive", "propagation", "attributes"),
    [
        (["ro", "nosuid", "nodev", "rbind", "rprivate"], True, False, "private", "nosuid nodev"),
        (["rro", "rbind"], True, True, "private", ""),
        (["rw", "rslave", "noatime"], False, False, "slave", "noatime"),
        (["rshared", "noexec"], False, False, "shared", "noexec"),
    ],
)
def test_options_of_mounts(
    tmp_path: Path,
    options: list[str],
    readonly: bool,
    recursive: bool,
    propagation: str,
    attributes: str,
) -> None:
    mount = {"hostPath": "/a", "containerPath": "//b/../c", "options": options, "type": "bind"}
    edits = {"mounts": [mount]}
    spec = SPEC | {"devices": [{"name": "0", "containerEdits": edits}], "containerEdits": {}}
    (tmp_path / "gpu.json").write_text(json.dumps(spec))
    [made] = cdi(tmp_path).inject(config("vendor.com/gpu=0")).mounts
    assert made.container_path == "/c"
    assert (made.readonly, made.recursive_read_only) == (readonly, recursive)
    assert (made.propagation, made.options) == (propagation, tuple(attributes.split()))


@pytest.mark.parametrize(
    ("mount", "error", "text"),
    [
        ({"hostPath": "/a", "containerPath": "/"}, FailedPrecondition, 'at "/"'),
        ({"hostPath": "a", "containerPath": "/b"}, FailedPrecondition, r"mounts\[0\]\.hostPath"),
        ({"hostPath": "t", "containerPath": "/b", "type": "tmpfs"}, FailedPrecondition, "hostPath"),
        ({"hostPath": "/t", "containerPath": "/b", "type": "tmpfs"}, Unsupported, '"tmpfs"'),
    ],
)
def test_mounts_that_cannot_be_had(
    tmp_path: Path, mount: dict[str, Any], error: type[Exception], text: str
) -> None:
    spec = SPEC | {"devices": [{"name": "0", "containerEdits": {"mounts": [mount]}}]}
    (tmp_path / "gpu.json").write_text(json.dumps(spec))
    with pytest.raises(error, match=text):
        cdi(tmp_path).inject(config("vendor.com/gpu=0"))


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_hooks_of_a_file_that_others_can_change(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "nvidia.yaml"
    path.write_text(GENERATED)
    injecting = cdi(tmp_path)
    injecting.inject(config("nvidia.com/gpu=0"))
    path.chmod(mode)
    with pytest.raises(FailedPrecondition, match=rf"can be changed by others .*mode {mode:o}"):
        injecting.inject(config("nvidia.com/gpu=0"))


@pytest.mark.parametrize("where", ["etc", "etc/cdi", "run", "run/cdi"])
def test_hooks_of_a_file_that_others_can_replace(tmp_path: Path, where: str) -> None:
    """In its own directory or, where it is a link, in that of the link."""
    for directory in ("etc/cdi", "run/cdi"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "etc/cdi/nvidia.yaml").write_text(GENERATED)
    (tmp_path / "run/cdi/nvidia.yaml").symlink_to(tmp_path / "etc/cdi/nvidia.yaml")
    asked, injecting = config("nvidia.com/gpu=0"), cdi(tmp_path / "run/cdi")
    injecting.inject(asked)
    (tmp_path / where).chmod(0o1777)  # where nobody replaces what is another's
    injecting.inject(asked)
    (tmp_path / where).chmod(0o775)
    with pytest.raises(FailedPrecondition, match=rf"{where} can be changed by others .*mode 775"):
        injecting.inject(asked)
    (tmp_path / where).chmod(0o755)
    injecting.inject(asked)
