"""Container Device Interface: what a qualified device name adds to a container (CDI specification 1.0).

Specs are JSON files in the spec directories, read when a container asks for a device; a later directory wins. What a
spec asks for that this agent has no way to do, hooks above all, is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from nodeagent import files
from nodeagent.errors import InvalidArgument, NotFound, Unsupported
from nodeagent.records import ContainerConfig, DeviceConfig, MountConfig

log = logging.getLogger(__name__)

DIRECTORIES = (Path("/etc/cdi"), Path("/var/run/cdi"))
MAX_SPEC_BYTES = 4 << 20

_OPTIONS = {"noexec", "nodev", "nosuid"}
_IGNORED_OPTIONS = {"bind", "rbind", "rprivate", "private", "rw"}


Id = Annotated[int, Meta(ge=0, le=(1 << 32) - 2)]


class DeviceNode(msgspec.Struct, frozen=True, rename="camel"):
    """hostPath is `path` where it is absent; type and numbers are read from the node itself."""

    path: str
    host_path: str = ""
    permissions: str = "rwm"
    file_mode: Annotated[int, Meta(ge=0, le=0o7777)] | None = None
    uid: Id | None = None
    gid: Id | None = None


class Mount(msgspec.Struct, frozen=True, rename="camel"):
    host_path: str
    container_path: str
    options: tuple[str, ...] = ()
    type: str = ""


class Edits(msgspec.Struct, frozen=True, rename="camel"):
    """hooks, intelRdt and netDevices are read to be refused, never to be skipped."""

    env: tuple[str, ...] = ()
    device_nodes: tuple[DeviceNode, ...] = ()
    mounts: tuple[Mount, ...] = ()
    hooks: tuple[Any, ...] = ()
    additional_gids: tuple[Id, ...] = msgspec.field(name="additionalGids", default=())
    intel_rdt: Any = None
    net_devices: tuple[Any, ...] = ()


class Device(msgspec.Struct, frozen=True, rename="camel"):
    name: str
    container_edits: Edits = Edits()


class Spec(msgspec.Struct, frozen=True, rename="camel"):
    kind: str
    devices: tuple[Device, ...]
    container_edits: Edits = Edits()


def inject(config: ContainerConfig, directories: Sequence[Path] = DIRECTORIES) -> ContainerConfig:
    """The config with what its CDI devices add. Raises NotFound for a device that no spec has."""
    if not config.cdi_devices:
        return config
    specs = list(_specs(directories))
    used: dict[str, Spec] = {}
    for name in config.cdi_devices:
        spec, device = _find(specs, name)
        config = _apply(config, device.container_edits, name)
        used.setdefault(spec.kind, spec)
    for spec in used.values():
        config = _apply(config, spec.container_edits, spec.kind)
    return config


def _specs(directories: Iterable[Path]) -> Iterable[Spec]:
    for directory in directories:
        for path in sorted(directory.glob("*.json")):
            try:
                yield _read(path)
            except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                log.warning("CDI spec %s: %s", path, error)


def _read(path: Path) -> Spec:
    return msgspec.json.decode(files.read_bounded(str(path), MAX_SPEC_BYTES), type=Spec)


def _find(specs: Sequence[Spec], name: str) -> tuple[Spec, Device]:
    kind, _, device_name = name.partition("=")
    for spec in reversed(specs):
        for device in spec.devices:
            if (spec.kind, device.name) == (kind, device_name):
                return spec, device
    raise NotFound(
        f'CDI device "{name}": no JSON spec in {", ".join(map(str, DIRECTORIES))} has it'
    )


def _apply(config: ContainerConfig, edits: Edits, name: str) -> ContainerConfig:
    if edits.hooks:
        raise Unsupported(f'CDI device "{name}": its spec has hooks, which this agent does not run')
    if edits.intel_rdt:
        raise Unsupported(f'CDI device "{name}": its spec asks for intelRdt')
    if edits.net_devices:
        raise Unsupported(f'CDI device "{name}": its spec moves network devices')
    return msgspec.structs.replace(
        config,
        envs=(*config.envs, *(_env(entry) for entry in edits.env)),
        devices=(*config.devices, *(_device(node) for node in edits.device_nodes)),
        mounts=(*config.mounts, *(_mount(mount, name) for mount in edits.mounts)),
        supplemental_groups=(*config.supplemental_groups, *edits.additional_gids),
    )


def _env(entry: str) -> tuple[str, bytes]:
    name, _, value = entry.partition("=")
    return name, value.encode()


def _device(node: DeviceNode) -> DeviceConfig:
    return DeviceConfig(
        container_path=node.path,
        host_path=node.host_path or node.path,
        permissions=node.permissions,
        mode=node.file_mode,
        uid=node.uid,
        gid=node.gid,
    )


def _mount(mount: Mount, name: str) -> MountConfig:
    if mount.type not in ("", "bind"):
        raise Unsupported(f'CDI device "{name}": a mount of type "{mount.type}"')
    unknown = set(mount.options) - _IGNORED_OPTIONS - _OPTIONS - {"ro"}
    if unknown:
        raise InvalidArgument(f'CDI device "{name}": unknown mount options {sorted(unknown)}')
    return MountConfig(
        container_path=mount.container_path,
        host_path=mount.host_path,
        readonly="ro" in mount.options,
        options=tuple(option for option in mount.options if option in _OPTIONS),
        must_exist=True,
    )
