"""The bundle of a container that has hooks: ``config.json`` of the OCI runtime specification, as hooks read it.

It describes to hooks what the plan describes to a supervisor, as far as the two have it in common. Nothing is executed
by it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nodeagent.errors import Unsupported
from nodeagent.linux import capabilities
from nodeagent.requests import ContainerConfig, HookConfig
from nodeagent.sandbox import paths
from nodeagent.sandbox.bundle import OCI_VERSION, ROOTFS
from nodeagent.sandbox.spec import ContainerPlan, Hook, Hooks, Mount

_NAMESPACES = ("mount", "network", "ipc", "uts")


def hooks(config: ContainerConfig, plan: ContainerPlan, pod: Path, limit_seconds: int) -> Hooks:
    """The hooks of a container whose plan is otherwise complete.

    pod: its directory; limit_seconds: the longest time of each hook.
    """
    stages: dict[Any, list[Hook]] = {}
    for hook in config.hooks:
        stages.setdefault(hook.stage, []).append(_hook(hook, limit_seconds))
    directory = paths.container(str(pod), plan["id"])
    made = Hooks(
        bundle=f"{directory}/bundle",
        config="",
        annotations=dict(config.annotations),
        stages=stages,
    )
    made["config"] = json.dumps(_oci_config(plan, made, f"{directory}/{ROOTFS}"))
    return made


def require(plan: ContainerPlan) -> None:
    """Require the bundle of a created container. Raises Unsupported where its supervisor does not know of hooks."""
    # A supervisor of an earlier version ignores the key "hooks" of a plan, and makes no bundle.
    if "hooks" in plan and not Path(plan["hooks"]["bundle"]).exists():
        raise Unsupported(
            f'container "{plan["id"]}": its CDI devices have hooks, which the supervisor of its pod, of an earlier '
            "version, cannot run; kill the launcher, so that the agent starts one of its own version, and recreate the "
            "pod"
        )


def _hook(hook: HookConfig, limit_seconds: int) -> Hook:
    return Hook(
        path=hook.path,
        args=list(hook.args),
        env=list(hook.env),
        timeout_ms=min(hook.timeout_s or limit_seconds, limit_seconds) * 1000,
        source=hook.source,
    )


def _oci_config(plan: ContainerPlan, told: Hooks, root: str) -> dict[str, Any]:
    mappings = plan["process"].get("uid_map"), plan["process"].get("gid_map")
    kinds = [*_NAMESPACES, *(["pid"] if plan["pid"] != "node" else [])]
    kinds += ["cgroup"] if plan["cgroup_namespace"] else []
    kinds += ["user"] if mappings[0] else []
    return {
        "ociVersion": OCI_VERSION,
        "root": {
            "path": root,
            "readonly": plan["rootfs"]["readonly"],
        },
        "process": _process(plan),
        "mounts": [_mount(mount) for mount in plan["mounts"]],
        "hooks": {
            stage: [_oci_hook(hook) for hook in hooks] for stage, hooks in told["stages"].items()
        },
        "annotations": told["annotations"],
        "linux": {
            "namespaces": [{"type": kind} for kind in kinds],
            "devices": [
                {
                    "path": device["path"],
                    "type": device["type"],
                    "major": device["major"],
                    "minor": device["minor"],
                    "fileMode": device["mode"],
                    "uid": device["uid"],
                    "gid": device["gid"],
                }
                for device in plan["devices"]
            ],
            **({"uidMappings": _mappings(mappings[0])} if mappings[0] else {}),
            **({"gidMappings": _mappings(mappings[1])} if mappings[1] else {}),
            "maskedPaths": plan["masked_paths"],
            "readonlyPaths": plan["readonly_paths"],
            **({"mountLabel": label} if (label := plan["rootfs"].get("label")) else {}),
        },
    }


def _process(plan: ContainerPlan) -> dict[str, Any]:
    """The process, with its user by number where the request has one: names are resolved in the image, later."""
    process = plan["process"]
    user, caps = process["user"], process["capabilities"]
    return {
        "terminal": plan["tty"],
        "user": {
            "uid": user["uid"] or 0,
            "gid": user["gid"] or 0,
            "additionalGids": user["groups"],
            **({"username": user["username"]} if user["username"] else {}),
        },
        "args": plan["argv"],
        "env": process["env"],
        "cwd": process["cwd"],
        "capabilities": {
            kind: [f"CAP_{name}" for name in capabilities.names(caps[kind])]
            for kind in ("bounding", "effective", "inheritable", "permitted", "ambient")
        },
        "noNewPrivileges": process["no_new_privs"],
        **({"apparmorProfile": process["apparmor"]} if process["apparmor"] else {}),
        **({"selinuxLabel": process["selinux"]} if process["selinux"] else {}),
        **({"oomScoreAdj": process["oom_score_adj"]} if process["oom_score_adj"] else {}),
    }


def _mount(mount: Mount) -> dict[str, Any]:
    is_filesystem = mount["kind"] == "fs"
    data = [f"{key}={value}" if value else key for key, value in mount["data"].items()]
    options = [*([] if is_filesystem else ["rbind", f"r{mount['propagation']}"]), *data]
    return {
        "destination": mount["target"],
        "type": mount["source"] if is_filesystem else "bind",
        "source": mount["source"],
        "options": [*options, *mount["attributes"]],
    }


def _oci_hook(hook: Hook) -> dict[str, Any]:
    return {
        "path": hook["path"],
        "args": hook["args"],
        "env": hook["env"],
        "timeout": hook["timeout_ms"] // 1000,
    }


def _mappings(lines: Any) -> list[Mapping[str, int]]:
    return [
        {"containerID": line["inside"], "hostID": line["outside"], "size": line["length"]}
        for line in lines
    ]
