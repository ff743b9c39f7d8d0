"""The mounts of a container: the defaults, the pod's files, and what the caller adds or replaces. Pure.

Parents come before what is mounted in them; of two mounts on one path the caller's is taken.
"""

import functools
import posixpath
from collections.abc import Callable, Sequence
from pathlib import Path

from nodeagent.errors import InvalidArgument
from nodeagent.records import ContainerConfig, IdMapping, MountConfig, Sandbox
from nodeagent.sandbox import rootfs
from nodeagent.sandbox.spec import IdMap, Mount

MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
# Of each processor that counts how often it was too hot: when other tenants of the node work, and when they do not.
THERMAL_COUNTERS = "devices/system/cpu/cpu[0-9]*/thermal_throttle"
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

Hierarchies = dict[str, list[str]]


@functools.cache
def masked_paths(sysfs: Path = Path("/sys")) -> tuple[str, ...]:
    """What is masked where the caller names nothing: the same in every container of a node."""
    counters = sorted(path.relative_to(sysfs) for path in sysfs.glob(THERMAL_COUNTERS))
    return (*MASKED_PATHS, *(f"/sys/{path}" for path in counters))


def container_mounts(
    sandbox: Sandbox,
    config: ContainerConfig,
    shared: Path,
    hierarchies: Hierarchies,
    image_layers: Callable[[str], Sequence[Path]],
) -> list[Mount]:
    """shared: where hosts, hostname, resolv.conf and shm of the pod are.

    image_layers: the layer directories of an image volume, uppermost first; raises NotFound.
    """
    by_target: dict[str, Mount] = {}
    defaults = rootfs.default_mounts(config.privileged, hierarchies)
    for mount in (*defaults, *_pod_mounts(sandbox, config, shared)):
        by_target[mount["target"]] = mount
    asked: set[str] = set()
    for wanted in config.mounts:
        mount = _mount(wanted, image_layers)
        target = mount["target"]
        if target in asked:
            raise InvalidArgument(f'mounts: "{target}" is mounted twice')
        asked.add(target)
        by_target[target] = mount
    return sorted(by_target.values(), key=lambda mount: _depth(mount["target"]))


def _pod_mounts(sandbox: Sandbox, config: ContainerConfig, shared: Path) -> list[Mount]:
    """hosts, hostname, resolv.conf and /dev/shm, which all containers of a pod share."""
    attributes = ["ro"] if config.readonly_rootfs else []
    files = [
        rootfs.bind(str(shared / name), f"/etc/{name}", *attributes)
        for name in ("hosts", "hostname", "resolv.conf")
    ]
    on_node = sandbox.config.namespaces.ipc == "node"
    shm = "/dev/shm" if on_node else str(shared / "shm")
    return [*files, rootfs.bind(shm, "/dev/shm", "nosuid", "nodev", "noexec")]


def _mount(wanted: MountConfig, image_layers: Callable[[str], Sequence[Path]]) -> Mount:
    attributes = [*wanted.options]
    if wanted.readonly or wanted.image:
        attributes.append("ro")
    mount = rootfs.bind(
        wanted.host_path,
        posixpath.normpath(wanted.container_path),
        *attributes,
        propagation=wanted.propagation,
        recursive=wanted.recursive_read_only,
    )
    if wanted.image:
        mount["kind"] = "image"
        mount["lower"] = [str(layer) for layer in image_layers(wanted.image)]
        mount["sub_path"] = wanted.image_sub_path
    if wanted.uids or wanted.gids:
        mount["uid_map"] = [id_map(mapping) for mapping in wanted.uids]
        mount["gid_map"] = [id_map(mapping) for mapping in wanted.gids]
    return mount


def id_map(mapping: IdMapping) -> IdMap:
    return IdMap(inside=mapping.inside, outside=mapping.outside, length=mapping.length)


def _depth(target: str) -> int:
    return 0 if target == "/" else target.count("/")
