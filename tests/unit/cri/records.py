"""Records as tests want them."""

from typing import Any

from nodeagent.records import Container, Image, ImageConfig, Sandbox
from nodeagent.requests import ContainerConfig, Resources, SandboxConfig


def sandbox(
    sandbox_id: str = "s" * 64, *, config: dict[str, Any] | None = None, **fields: Any
) -> Sandbox:
    values: dict[str, Any] = {"name": "web", "uid": "u", "namespace": "default"} | (config or {})
    defaults: dict[str, Any] = {
        "cgroup_parent": "/pods/web",
        "boot_id": "b",
        "created_at": 10,
        "ready_at": 20,
    }
    return Sandbox(id=sandbox_id, config=SandboxConfig(**values), **(defaults | fields))


def container(
    container_id: str = "c" * 64, *, config: dict[str, Any] | None = None, **fields: Any
) -> Container:
    values: dict[str, Any] = {"name": "main", "image": "sha256:i"} | (config or {})
    defaults: dict[str, Any] = {
        "sandbox_id": "s" * 64,
        "image_id": "sha256:i",
        "image_ref": "busybox@sha256:m",
        "image_name": "busybox",
        "cgroup_path": "/pods/web/main",
        "log_path": "/var/log/pods/web/main/0.log",
        "resources": Resources(),
        "stop_signal": 15,
        "created_at": 30,
    }
    return Container(id=container_id, config=ContainerConfig(**values), **(defaults | fields))


def image(image_id: str = "sha256:i", user: str = "", **fields: Any) -> Image:
    defaults: dict[str, Any] = {
        "repo_tags": ("docker.io/library/busybox:latest",),
        "repo_digests": ("docker.io/library/busybox@sha256:m",),
        "manifest": "sha256:m",
        "layers": ("sha256:l",),
        "size_bytes": 1234,
        "config": ImageConfig(user=user),
        "pulled_at": 5,
    }
    return Image(id=image_id, **(defaults | fields))
