"""Container Device Interface: what a qualified device name adds to a container (CDI specification 1.1).

Devices are named by the request's CDI_devices and by annotations of the container, ``cdi.k8s.io/KEY: NAME[,NAME…]``;
one that is named twice is injected once. A device of a later directory overrides the same one of an earlier directory;
twice in one directory it is a conflict and refused. A specification's own edits come before its devices'.

Hooks are taken from specifications only, which are files of the node's root, and only those whose program is listed in
the configuration; `nodeagent.sandbox.init.hooks` runs them.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

from msgspec.structs import replace

from nodeagent.errors import FailedPrecondition, InvalidArgument, NotFound, Unsupported
from nodeagent.lifecycle.plan.cdi_specs import (
    QUALIFIED,
    Device,
    DeviceNode,
    Edits,
    Hook,
    Mount,
    Spec,
    Specs,
    changed_by_others,
)
from nodeagent.requests import ContainerConfig, DeviceConfig, HookConfig, MountConfig
from nodeagent.words import Propagation

ANNOTATION_PREFIX = "cdi.k8s.io/"
MAX_HOOKS = 256  # of a container
SETTING = "cdi.hook_programs"

_RUNC_DEVICE_MODE = 0o666  # of a device whose specification has no fileMode
_OPTIONS = {"noexec", "nodev", "nosuid", "nosymfollow", "relatime", "noatime", "strictatime"}
_PROPAGATIONS: dict[str, Propagation] = {
    f"{recursive}{name}": name for recursive in ("", "r") for name in get_args(Propagation)
}
_READONLY = {"ro", "rro"}
_WITHOUT_MEANING = {"bind", "rbind", "rw", "suid", "dev", "exec", "defaults"}


class Cdi:
    """The devices of the node's specifications. hook_programs: paths of the programs that hooks may execute."""

    def __init__(self, directories: Sequence[Path], hook_programs: Sequence[str]) -> None:
        self._specs = Specs(directories)
        self._programs = frozenset(hook_programs)

    @property
    def directories(self) -> tuple[Path, ...]:
        """The directories of the specifications."""
        return self._specs.directories

    def is_asked_for(self, config: ContainerConfig) -> bool:
        """Whether there is anything to inject; reads no file."""
        return bool(config.cdi_devices) or any(
            key.startswith(ANNOTATION_PREFIX) for key in config.annotations
        )

    def inject(self, config: ContainerConfig, *, userns: bool = False) -> ContainerConfig:
        """The config with what its CDI devices add. userns: the pod has a user namespace. Reads files.

        Raises NotFound for a device that no specification has, and FailedPrecondition, InvalidArgument or Unsupported
        for one that cannot be injected; the text names the file and the reason.
        """
        names = asked_for(config)
        if not names:
            return config
        directories = self._specs.read()
        used: set[Path] = set()
        for name in names:
            spec, device = self._find(directories, name)
            if spec.path not in used:
                used.add(spec.path)
                config = self._apply(config, spec.edits, spec.kind, spec, userns=userns)
            config = self._apply(config, device.edits, name, spec, userns=userns)
        if len(config.hooks) > MAX_HOOKS:
            raise InvalidArgument(
                f"CDI devices {', '.join(names)}: {len(config.hooks)} hooks; there can be {MAX_HOOKS}"
            )
        return config

    def _find(self, directories: Sequence[Sequence[Spec]], name: str) -> tuple[Spec, Device]:
        kind, _, device_name = name.partition("=")
        for specs in reversed(directories):
            found = [spec for spec in specs if spec.kind == kind and device_name in spec.devices]
            if len(found) > 1:
                paths = " and ".join(str(spec.path) for spec in found)
                raise FailedPrecondition(
                    f'CDI device "{name}": defined in {paths}; remove it from all but one'
                )
            if found:
                spec, device = found[0], found[0].devices[device_name]
                if fault := spec.fault or device.fault:
                    raise FailedPrecondition(f'CDI device "{name}": {spec.path}: {fault}')
                return spec, device
        broken = self._specs.unreadable()[:4]
        places = ", ".join(map(str, self._specs.directories))
        also = f"; not read: {'; '.join(broken)}" if broken else ""
        raise NotFound(f'CDI device "{name}": no specification in {places} has it{also}')

    def _apply(
        self, config: ContainerConfig, edits: Edits, name: str, spec: Spec, *, userns: bool
    ) -> ContainerConfig:
        what = f'CDI device "{name}": {spec.path}'
        if edits.net_devices:
            names = ", ".join(device.host_interface_name for device in edits.net_devices)
            raise Unsupported(
                f"{what}: netDevices: {names}: network devices of the node cannot be moved into a pod"
            )
        if edits.intel_rdt:
            self._specs.say(spec.path, f"{what}: intelRdt is not supported and is ignored")
        if edits.hooks and (fault := changed_by_others(spec.path)):
            raise FailedPrecondition(f"{what}: hook {edits.hooks[0].hook_name}: {fault}")
        return replace(
            config,
            envs=(*config.envs, *(_env(entry) for entry in edits.env)),
            devices=(
                *config.devices,
                *(_device(node, config, what, userns=userns) for node in edits.device_nodes),
            ),
            mounts=(*config.mounts, *(self._mount(mount, what, spec) for mount in edits.mounts)),
            hooks=(*config.hooks, *(self._hook(hook, what, spec) for hook in edits.hooks)),
            supplemental_groups=(
                *config.supplemental_groups,
                *(gid for gid in edits.additional_gids if gid),
            ),
        )

    def _mount(self, mount: Mount, what: str, spec: Spec) -> MountConfig:
        if mount.type not in ("", "bind", "rbind"):
            raise Unsupported(
                f'{what}: mount at "{mount.container_path}": type "{mount.type}" is not supported, only bind is'
            )
        target = _inside(mount.container_path)
        if target == "/":
            raise FailedPrecondition(
                f'{what}: mount of "{mount.host_path}" at "/": nothing can be mounted over the root'
            )
        known = {*_OPTIONS, *_PROPAGATIONS, *_READONLY, *_WITHOUT_MEANING}
        if unknown := sorted(set(mount.options) - known):
            self._specs.say(spec.path, f"{what}: mount options {', '.join(unknown)} are ignored")
        asked = [option for option in mount.options if option in _PROPAGATIONS]
        return MountConfig(
            container_path=target,
            host_path=mount.host_path,
            readonly=not _READONLY.isdisjoint(mount.options),
            recursive_read_only="rro" in mount.options,
            propagation=_PROPAGATIONS[asked[-1]] if asked else "private",
            options=tuple(option for option in mount.options if option in _OPTIONS),
            must_exist=True,
        )

    def _hook(self, hook: Hook, what: str, spec: Spec) -> HookConfig:
        if hook.path not in self._programs:
            raise FailedPrecondition(
                f'{what}: hook {hook.hook_name}: "{hook.path}" is not one of the programs that hooks may execute; '
                f"if you trust it, add it to {SETTING} in the configuration"
            )
        return HookConfig(
            stage=hook.hook_name,
            path=hook.path,
            args=hook.args or (hook.path,),
            env=hook.env,
            timeout_s=hook.timeout or 0,
            source=str(spec.path),
        )


def asked_for(config: ContainerConfig) -> tuple[str, ...]:
    """The qualified names of the devices, each once: those of CDI_devices, then those of the annotations.

    Raises InvalidArgument for a malformed name in an annotation.
    """
    return tuple(dict.fromkeys((*config.cdi_devices, *_annotated(config.annotations))))


def _annotated(annotations: Mapping[str, str]) -> Iterator[str]:
    for key, value in annotations.items():
        if key.startswith(ANNOTATION_PREFIX):
            for name in value.split(","):
                if not QUALIFIED.fullmatch(name):
                    raise InvalidArgument(
                        f'config.annotations["{key}"]: "{name}" is not vendor/class=device'
                    )
                yield name


def _env(entry: str) -> tuple[str, bytes]:
    name, _, value = entry.partition("=")
    return name, value.encode()


def _inside(path: str) -> str:
    return posixpath.normpath("/" + path.lstrip("/"))  # which keeps two slashes at the front


def _device(node: DeviceNode, config: ContainerConfig, what: str, *, userns: bool) -> DeviceConfig:
    """The device of a specification, with the defaults of runc.

    A device without a fileMode is open to all, and without an owner it is the container's user's. In a user namespace,
    where runc mounts the node's own device, mode and owner stay the node's.
    """
    if node.type == "p":
        raise Unsupported(f'{what}: device node "{node.path}": a FIFO is not supported')
    mode, uid, gid = node.file_mode, node.uid, node.gid
    if not userns:
        mode = _RUNC_DEVICE_MODE if mode is None else mode
        uid = config.run_as_user if uid is None else uid
        gid = config.run_as_group if gid is None else gid
    numbered = node.type and node.major
    return DeviceConfig(
        container_path=_inside(node.path),
        host_path=node.host_path or node.path,
        permissions=node.permissions or "rwm",
        mode=mode,
        uid=uid,
        gid=gid,
        type=("b" if node.type == "b" else "c") if numbered else "",
        major=node.major if numbered else 0,
        minor=node.minor if numbered else 0,
    )
