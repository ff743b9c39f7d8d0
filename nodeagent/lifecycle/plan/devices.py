"""The device nodes of a container, and the rules of its cgroup that belong to them.

The nodes are read from the node's /dev when the container is planned; a directory stands for all devices below it.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nodeagent.cgroups.devices import DEFAULT_RULES, Rule
from nodeagent.errors import InvalidArgument, NotFound
from nodeagent.requests import ContainerConfig, DeviceConfig
from nodeagent.sandbox import rootfs_defaults
from nodeagent.sandbox.spec import Device

# Paths of the node's /dev that every container has of its own.
_OWN = frozenset(("/dev/pts", "/dev/shm", "/dev/mqueue", "/dev/fd", "/dev/console", "/dev/ptmx"))
_USUAL_MODE = 0o666


class ContainerDevices(NamedTuple):
    """Devices of a container. rules: what the cgroup allows; None, for a privileged container, is everything."""

    nodes: list[Device]
    rules: list[Rule] | None


def container_devices(config: ContainerConfig, asked: Sequence[list[Device]]) -> ContainerDevices:
    """The default devices, the requested ones, and all of the node's for a privileged container.

    asked: for each device of the config, what `named` returned.
    """
    by_path = {device["path"]: device for device in rootfs_defaults.DEFAULT_DEVICES}
    if config.privileged:
        by_path |= {device["path"]: device for device in _below("/dev", "/dev")}
    rules = list(DEFAULT_RULES)
    for wanted, found in zip(config.devices, asked, strict=True):
        for device in found:
            by_path[device["path"]] = device
            rules.append(Rule(device["type"], device["major"], device["minor"], wanted.permissions))
    return ContainerDevices(list(by_path.values()), None if config.privileged else rules)


def named(wanted: DeviceConfig) -> list[Device]:
    """The requested device, or all devices in the directory. May hang with its file system.

    Raises NotFound and InvalidArgument.
    """
    if wanted.type:
        return [_numbered(wanted)]
    try:
        host_path = os.path.realpath(wanted.host_path)
        if os.path.isdir(host_path):
            return list(_below(host_path, wanted.container_path))
        device = _device(host_path, wanted.container_path)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f'device "{wanted.host_path}": not on this node') from None
    if device is None:
        raise InvalidArgument(f'device "{wanted.host_path}": not a device')
    for key in ("mode", "uid", "gid"):
        if (value := getattr(wanted, key)) is not None:
            device[key] = value
            device["of_node"] = device["of_node"] and key == "mode"
    return [device]


def _numbered(wanted: DeviceConfig) -> Device:
    """A device by its numbers alone; it need not exist on the node."""
    return Device(
        path=wanted.container_path,
        type="b" if wanted.type == "b" else "c",
        major=wanted.major,
        minor=wanted.minor,
        mode=_USUAL_MODE if wanted.mode is None else wanted.mode,
        uid=wanted.uid or 0,
        gid=wanted.gid or 0,
        of_node=wanted.uid is None and wanted.gid is None,
    )


def _below(directory: str, container_path: str) -> Iterator[Device]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.path in _OWN or entry.is_symlink():
                continue
            inside = f"{container_path}/{entry.name}"
            if entry.is_dir():
                yield from _below(entry.path, inside)
            elif (device := _device(entry.path, inside)) is not None:
                yield device


def _device(host_path: str, container_path: str) -> Device | None:
    status = os.lstat(host_path)
    if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        return Device(
            path=container_path,
            type="c" if stat.S_ISCHR(status.st_mode) else "b",
            major=os.major(status.st_rdev),
            minor=os.minor(status.st_rdev),
            mode=stat.S_IMODE(status.st_mode),
            uid=status.st_uid,
            gid=status.st_gid,
            of_node=True,
        )
    return None
