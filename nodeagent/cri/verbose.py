"""The `info` of verbose statuses: JSON texts, for `crictl inspect` and for people."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from nodeagent.config import Config
from nodeagent.lifecycle.node import NodeStatus
from nodeagent.lifecycle.usage.stats import LogUsage
from nodeagent.records import Container, Image, Sandbox
from nodeagent.requests import ContainerConfig
from nodeagent.tasks import Failure


def container_info(
    container: Container, plan: dict[str, Any], log: LogUsage | None
) -> dict[str, str]:
    """The `info` of a container.

    plan: what its supervisor executed. log: None where no supervisor answers any more.
    """
    lost = log and {"droppedLines": log.dropped_lines, "heldBackMs": log.held_back_ms}
    return {
        "info": _json(
            {
                "sandboxID": container.sandbox_id,
                "pid": container.pid,
                "cgroupPath": container.cgroup_path,
                "config": _container_config(container.config),
                "plan": plan,
                "log": lost,
            }
        )
    }


def sandbox_info(sandbox: Sandbox, details: dict[str, Any]) -> dict[str, str]:
    """The `info` of a pod, with its supervisor and its directory."""
    return {
        "info": _json(
            {
                "runtimeHandler": sandbox.runtime_handler,
                "cgroupParent": sandbox.cgroup_parent,
                "addresses": sandbox.addresses,
                "config": sandbox.config,
                **details,
            }
        )
    }


def image_info(image: Image) -> dict[str, str]:
    return {"info": _json(image)}


def node_info(
    config: Config, version: str, status: NodeStatus, failures: Mapping[str, Failure]
) -> dict[str, str]:
    """The verbose Status: configuration, version, problems of the network, pods that do not answer, failed tasks.

    stateDir: critest looks for its file system, to know whether it can be idmapped.
    failures: of background tasks; those that have none are left out.
    """
    settings = {"stateDir": f"{config.root}/containers", **msgspec.to_builtins(config)}
    failed = {name: _failure(failure) for name, failure in failures.items() if failure.count}
    return {
        "config": _json(settings),
        "version": version,
        "network": _json({"problems": status.network_problems}),
        "podsNotAnswering": _json(status.not_answering),
        "backgroundTaskFailures": _json(failed),
    }


def _failure(failure: Failure) -> dict[str, Any]:
    last = datetime.fromtimestamp(failure.last_at_ns / 1e9, UTC)
    return {
        "failures": failure.count,
        "lastError": failure.last_error,
        "lastFailedAt": last.isoformat(timespec="seconds"),
    }


def _container_config(config: ContainerConfig) -> dict[str, Any]:
    """The config with variables as text: their values are bytes of any kind, JSON has only text."""
    plain: dict[str, Any] = msgspec.to_builtins(config)
    plain["envs"] = [f"{name}={value.decode(errors='replace')}" for name, value in config.envs]
    return plain


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
