"""The mounts of a container, and the one place that decides their order. Pure, apart from a line in the log.

1. The volumes of the image, 2. the defaults, 3. what the request asks for, with the pod's own files in /etc. In each of
these, parents come before what is mounted in them. A request's mount goes over the rest, and nothing of ours is mounted
at or below it: it may be a tree of the node, which others use, and which may be shared with the node.
"""

import functools
import json
import logging
import posixpath
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from nodeagent.errors import InvalidArgument
from nodeagent.records import Sandbox
from nodeagent.requests import ContainerConfig, IdMapping, MountConfig
from nodeagent.sandbox import rootfs_defaults
from nodeagent.sandbox.spec import IdMap, Mount, Volume

log = logging.getLogger(__name__)

MAX_VOLUMES = 256  # of an image: each is a mount

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
# Counters of each processor that was too hot: they tell when other tenants of the node work, and when they do not.
THERMAL_COUNTERS = "devices/system/cpu/cpu[0-9]*/thermal_throttle"
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

Hierarchies = dict[str, list[str]]


@functools.cache
def masked_paths(sysfs: Path = Path("/sys")) -> tuple[str, ...]:
    """The paths that are masked by default: the same in every container of a node."""
    counters = sorted(path.relative_to(sysfs) for path in sysfs.glob(THERMAL_COUNTERS))
    return (*MASKED_PATHS, *(f"/sys/{path}" for path in counters))


def container_mounts(
    sandbox: Sandbox,
    config: ContainerConfig,
    shared: Path,
    hierarchies: Hierarchies,
    image_layers: Callable[[str], Sequence[Path]],
    *,
    rejected: Collection[str] = (),
) -> list[Mount]:
    """The mounts of a container, in the order in which they are made.

    shared: where hosts, hostname, resolv.conf and shm of the pod are.
    image_layers: the layer directories of an image volume, uppermost first; raises NotFound.
    rejected: host paths that are not made where they are absent.
    """
    asked = _asked_for(config, image_layers, rejected)
    defaults = rootfs_defaults.default_mounts(config.privileged, hierarchies)
    defaults.append(_shared_memory(sandbox, shared))
    return [
        *outside_of(defaults, asked),
        *sorted(
            [*_pod_files(config, shared, asked), *asked.values()],
            key=lambda mount: _depth(mount["target"]),
        ),
    ]


def _asked_for(
    config: ContainerConfig,
    image_layers: Callable[[str], Sequence[Path]],
    rejected: Collection[str],
) -> dict[str, Mount]:
    """The requested mounts by target; of two for one path the later is taken, as other runtimes do."""
    asked: dict[str, Mount] = {}
    for wanted in config.mounts:
        mount = _mount(wanted, image_layers)
        if mount["kind"] == "bind" and not wanted.must_exist:
            mount["absent"] = "reject" if mount["source"] in rejected else "make"
        if asked.pop(mount["target"], None) is not None:
            log.warning(
                'container "%s": %s is mounted twice; the later mount is taken',
                config.name,
                json.dumps(mount["target"]),  # which may have a newline in it
            )
        asked[mount["target"]] = mount
    return asked


def outside_of(mounts: Iterable[Mount], targets: Iterable[str]) -> list[Mount]:
    """The mounts that are neither at nor below one of the targets."""
    places = tuple([f"{target}/" for target in targets])
    return [mount for mount in mounts if not f"{mount['target']}/".startswith(places)]


def _shared_memory(sandbox: Sandbox, shared: Path) -> Mount:
    """/dev/shm, which all containers of a pod share."""
    on_node = sandbox.config.namespaces.ipc == "node"
    source = "/dev/shm" if on_node else str(shared / "shm")
    return rootfs_defaults.bind(source, "/dev/shm", "nosuid", "nodev", "noexec")


def _pod_files(config: ContainerConfig, shared: Path, asked: dict[str, Mount]) -> Iterator[Mount]:
    """hosts, hostname and resolv.conf, which all containers of a pod share.

    They belong to the pod's request (its name, its DNS), so that a volume at /etc does not hide them. One that is
    shared with the node does: they would appear in the node's tree.
    """
    if "/etc" in asked and asked["/etc"]["propagation"] == "shared":
        return
    attributes = ["ro"] if config.readonly_rootfs else []
    for name in ("hosts", "hostname", "resolv.conf"):
        if (target := f"/etc/{name}") not in asked:
            yield rootfs_defaults.bind(str(shared / name), target, *attributes)


def image_volumes(names: Iterable[str], directory: Path, mounts: Sequence[Mount]) -> list[Volume]:
    """A directory of the container's own, in `directory`, for each VOLUME that nothing else is mounted over.

    A VOLUME "/" has no meaning and is left out; one at or below any mount, such as /proc, is covered.
    """
    covered = tuple(f"{mount['target']}/" for mount in mounts)
    targets = sorted({posixpath.normpath(f"/{name.strip('/')}") for name in names} - {"/"})
    if len(targets) > MAX_VOLUMES:
        raise InvalidArgument(f"image: {len(targets)} volumes; there can be {MAX_VOLUMES}")
    return [
        Volume(source=str(directory / "volumes" / str(number)), target=target)
        for number, target in enumerate(sorted(targets, key=_depth))
        if not f"{target}/".startswith(covered)
    ]


def _mount(wanted: MountConfig, image_layers: Callable[[str], Sequence[Path]]) -> Mount:
    attributes = [*wanted.options]
    if wanted.readonly or wanted.image:
        attributes.append("ro")
    mount = rootfs_defaults.bind(
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
    return target.count("/")
