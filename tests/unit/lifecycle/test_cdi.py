"""What CDI devices add to a container."""

import json
from pathlib import Path

import pytest

from nodeagent.errors import NotFound, Unsupported
from nodeagent.lifecycle.cdi import inject
from nodeagent.records import ContainerConfig, DeviceConfig, MountConfig

SPEC = {
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
        {"name": "hooked", "containerEdits": {"hooks": [{"hookName": "createContainer"}]}},
        {"name": "cache", "containerEdits": {"intelRdt": {"closID": "a"}}},
        {"name": "nic", "containerEdits": {"netDevices": [{"hostInterfaceName": "eth1"}]}},
    ],
    "containerEdits": {
        "mounts": [
            {"hostPath": "/lib/gpu", "containerPath": "/gpu", "options": ["ro", "nosuid", "bind"]}
        ],
        "additionalGids": [44],
    },
}


def config(*names: str) -> ContainerConfig:
    return ContainerConfig(name="c", image="i", cdi_devices=names)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "gpu.json").write_text(json.dumps(SPEC))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "bytes.json").write_bytes(b'{"kind":"\xff"}')
    (tmp_path / "deep.json").write_bytes(b'{"x":' + b"[" * 200_000)
    gids = {**SPEC, "kind": "vendor.com/gid", "containerEdits": {"additionalGids": [1 << 70]}}
    (tmp_path / "gid.json").write_text(json.dumps(gids))
    return tmp_path


def test_edits_of_the_device_and_of_its_spec(directory: Path) -> None:
    made = inject(config("vendor.com/gpu=0"), [directory])
    assert made.devices == (
        DeviceConfig(
            container_path="/dev/gpu0", host_path="/dev/null", permissions="rwm", mode=0o660
        ),
    )
    assert made.envs == (("GPU", b"0"),)
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


def test_unknown_device(directory: Path) -> None:
    with pytest.raises(NotFound, match=r"vendor\.com/gpu=1"):
        inject(config("vendor.com/gpu=1"), [directory])


@pytest.mark.parametrize(
    ("device", "text"),
    [("hooked", "hooks"), ("cache", "intelRdt"), ("nic", "moves network devices")],
)
def test_what_nobody_here_can_do_is_refused(directory: Path, device: str, text: str) -> None:
    with pytest.raises(Unsupported, match=text):
        inject(config(f"vendor.com/gpu={device}"), [directory])


def test_without_devices_nothing_is_read(tmp_path: Path) -> None:
    assert inject(config(), [tmp_path / "absent"]) == config()
