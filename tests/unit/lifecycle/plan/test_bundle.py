"""What hooks read of the container that they are run for."""

import json
from pathlib import Path
from typing import Any, cast

import pytest

from nodeagent.errors import Unsupported
from nodeagent.lifecycle.plan import bundle
from nodeagent.requests import ContainerConfig, HookConfig
from nodeagent.sandbox.rootfs_defaults import bind, filesystem
from nodeagent.sandbox.spec import ContainerPlan

HOOKS = (
    HookConfig(stage="createContainer", path="/a", args=("a", "1"), env=("A=b",), source="f"),
    HookConfig(stage="poststop", path="/b", timeout_s=5, source="f"),
    HookConfig(stage="poststop", path="/c", timeout_s=5000, source="f"),
)


def plan() -> ContainerPlan:
    masks = dict.fromkeys(("bounding", "effective", "inheritable", "permitted", "ambient"), 1)
    process: dict[str, Any] = {
        "env": ["PATH=/bin"],
        "cwd": "/",
        "user": {"uid": 1000, "gid": None, "groups": [44], "username": ""},
        "capabilities": masks,
        "no_new_privs": True,
        "apparmor": "",
        "selinux": "",
        "oom_score_adj": None,
        "uid_map": [{"inside": 0, "outside": 100, "length": 10}],
    }
    made: dict[str, Any] = {
        "id": "c",
        "argv": ["sh"],
        "process": process,
        "rootfs": {"readonly": True},
        "mounts": [
            filesystem("/proc", "proc", "nosuid"),
            filesystem("/tmp", "tmpfs", "", mode="755"),
            bind("/lib/gpu", "/gpu", "ro", "nodev"),
        ],
        "devices": [],
        "masked_paths": [],
        "readonly_paths": [],
        "pid": "container",
        "cgroup_namespace": True,
        "tty": False,
    }
    return cast(ContainerPlan, made)


def test_a_bundle_says_what_the_plan_says() -> None:
    config = ContainerConfig(name="c", image="i", hooks=HOOKS, annotations={"a": "b"})
    hooks = bundle.hooks(config, plan(), Path("/state/pods/p"), 60)
    assert hooks["bundle"] == "/state/pods/p/containers/c/bundle"
    told = json.loads(hooks["config"])
    assert told["root"] == {"path": "/state/pods/p/containers/c/rootfs", "readonly": True}
    assert told["process"]["user"] == {"uid": 1000, "gid": 0, "additionalGids": [44]}
    assert told["process"]["args"] == ["sh"]
    assert told["process"]["env"] == ["PATH=/bin"]
    assert told["process"]["capabilities"]["bounding"] == ["CAP_CHOWN"]
    assert told["annotations"] == {"a": "b"}
    assert [mount["options"] for mount in told["mounts"]] == [
        ["nosuid"],
        ["mode=755"],
        ["rbind", "rprivate", "ro", "nodev"],
    ]
    assert told["linux"]["uidMappings"] == [{"containerID": 0, "hostID": 100, "size": 10}]
    assert {"type": "user"} in told["linux"]["namespaces"]
    assert told["hooks"]["createContainer"] == [
        {"path": "/a", "args": ["a", "1"], "env": ["A=b"], "timeout": 60}
    ]


def test_a_bundle_says_the_label_of_the_files() -> None:
    made = plan()
    config = ContainerConfig(name="c", image="i", hooks=HOOKS)
    told = json.loads(bundle.hooks(config, made, Path("/state/pods/p"), 60)["config"])
    assert "mountLabel" not in told["linux"]
    made["rootfs"]["label"] = "u:r:t:s0"
    told = json.loads(bundle.hooks(config, made, Path("/state/pods/p"), 60)["config"])
    assert told["linux"]["mountLabel"] == "u:r:t:s0"


def test_the_time_of_a_hook_is_bounded() -> None:
    config = ContainerConfig(name="c", image="i", hooks=HOOKS)
    stages = bundle.hooks(config, plan(), Path("/state/pods/p"), 60)["stages"]
    assert [hook["timeout_ms"] for hook in stages["createContainer"]] == [60_000]
    assert [hook["timeout_ms"] for hook in stages["poststop"]] == [5_000, 60_000]


def test_a_supervisor_that_knows_of_no_hooks(tmp_path: Path) -> None:
    made = plan()
    bundle.require(made)
    config = ContainerConfig(name="c", image="i", hooks=HOOKS)
    made["hooks"] = bundle.hooks(config, made, tmp_path, 60)
    with pytest.raises(Unsupported, match="recreate the pod"):
        bundle.require(made)
    Path(made["hooks"]["bundle"]).mkdir(parents=True)
    bundle.require(made)
