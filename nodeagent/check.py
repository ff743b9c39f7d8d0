"""`nodeagent check`: what the kernel and the machine offer, and what is lost where they do not."""

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from nodeagent.cgroups.manager import Cgroups
from nodeagent.config import Config
from nodeagent.errors import NodeAgentError
from nodeagent.lifecycle.places import Places
from nodeagent.lifecycle.plan import apparmor
from nodeagent.linux import immortal, syscalls
from nodeagent.net import nftables
from nodeagent.net.network import Network
from nodeagent.net.nftables import Table
from nodeagent.net.spoofing import SpoofFilter
from nodeagent.probes import HOST_PORTS, SYS_RESOURCE, has_seccomp, kernel_version, maps_ids, takes
from nodeagent.records import KINDS
from nodeagent.store import Store

OLDEST_KERNEL = (5, 15)
_SPOOF_PROTECTION = SpoofFilter(
    table=Table("nodeagent_check", nftables.NFPROTO_BRIDGE), link_prefix="nv"
)
V2_CONTROLLERS = ("cpu", "cpuset", "io", "memory", "pids")


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """A feature of the machine. needed: the agent does not work without it. loss: what is lost without it."""

    name: str
    present: bool
    needed: bool
    detail: str = ""
    loss: str = ""

    def __str__(self) -> str:
        answer = "yes" if self.present else "NO" if self.needed else "no"
        remark = self.detail if self.present else self.loss
        return f"{answer:4}{self.name:34}{remark}".rstrip()


async def features(config: Config) -> list[Feature]:
    """All features, needed ones first."""
    return [*_needed(), *_cgroups(), *_optional(config), await _subnets(config), _records(config)]


def _needed() -> list[Feature]:
    release = os.uname().release
    return [
        _feature("root", lambda: os.geteuid() == 0, "namespaces and mounts need it", needed=True),
        _feature(
            f"Linux {OLDEST_KERNEL[0]}.{OLDEST_KERNEL[1]} or newer",
            lambda: kernel_version(release) >= OLDEST_KERNEL,
            f"this is {release}",
            needed=True,
            detail=release,
        ),
        _feature("openat2, open_tree, mount_setattr", _has_mount_api, "no rootfs", needed=True),
        _feature("overlayfs", lambda: _has_filesystem("overlay"), "no rootfs", needed=True),
    ]


def _cgroups() -> list[Feature]:
    try:
        cgroups = Cgroups.open(driver="cgroupfs", default_parent="/nodeagent")
    except NodeAgentError as error:
        return [Feature(name="cgroups", present=False, needed=True, loss=str(error))]
    kind = Feature(name="cgroups", present=True, needed=True, detail=cgroups.hierarchy)
    aliases = {"io": {"io", "blkio"}}
    names = (*V2_CONTROLLERS, "hugetlb")
    return [kind, *_delegation(cgroups)] + [
        Feature(
            name=f"cgroup controller {name}",
            present=bool(aliases.get(name, {name}) & cgroups.controllers),
            needed=False,
            loss=f"limits and statistics of {name}",
        )
        for name in names
    ]


def _delegation(cgroups: Cgroups) -> list[Feature]:
    """The check of nsdelegate, on v2 only: v1 cannot keep a container that mounts its groups from its limits."""
    if cgroups.hierarchy != "v2":
        return []
    (mount,) = cgroups.mounts()
    return [
        Feature(
            name="cgroup2 with nsdelegate",
            present="nsdelegate" in mount.options.split(","),
            needed=False,
            loss="containers that mount their own cgroup can lift its limits, up to their pod's;"
            " none gets groups to manage (cgroup_mount_mode)",
        )
    ]


def _optional(config: Config) -> list[Feature]:
    return [
        _feature("seccomp filters", has_seccomp, "containers run unconfined or not at all"),
        _feature(
            "user namespaces, idmapped mounts",
            lambda: maps_ids(Path(config.root)),
            "pods with a user namespace",
        ),
        _feature("nf_tables", lambda: takes(HOST_PORTS), "host ports and masquerade"),
        _feature(
            "nf_tables on bridges",
            lambda: takes(_SPOOF_PROTECTION),
            "protection against spoofing by pods",
        ),
        _feature("AppArmor", apparmor.is_enabled, "AppArmor profiles"),
        _feature(
            "AppArmor default profile",
            apparmor.has_default,
            f"containers that name no profile run without one; it is loaded by {apparmor.PARSER}",
            detail=apparmor.NAME,
        ),
        _feature("SELinux", lambda: Path("/sys/fs/selinux/enforce").exists(), "SELinux labels"),
        _feature(
            "immortal objects of Python",
            immortal.is_supported,
            "a pod takes about 1 MiB of memory more; Python 3.12 and 3.13 have them",
        ),
        _feature(
            "pressure stall information",
            lambda: Path("/proc/pressure/cpu").exists(),
            "PSI in statistics",
        ),
        _feature(
            "CAP_SYS_RESOURCE",
            lambda: bool(syscalls.capget()[1] & SYS_RESOURCE),
            "a lower oom_score_adj, and limits above the agent's own",
        ),
        _feature(
            "registry hosts",
            lambda: Path(config.certs_dir).is_dir(),
            f"{config.certs_dir} does not exist: every registry is asked directly, over HTTPS",
            detail=config.certs_dir,
        ),
    ]


async def _subnets(config: Config) -> Feature:
    """The check of the subnets of pods, by the present routes and what the agent has chosen before."""
    places = Places.of(config)
    try:
        with closing(Store.copy_of(places.database, places.journal)) as store:
            overlaps = await Network.overlaps(
                config=config.network, store=store, instance=places.instance
            )
    except (NodeAgentError, OSError) as error:
        overlaps = [str(error)]
    return Feature(
        name="subnets of pods apart from routes",
        present=not overlaps,
        needed=False,
        loss=f"{'; '.join(overlaps)}: pods or the node do not reach what is there",
    )


def _records(config: Config) -> Feature:
    """The check of the database, by reading it; `nodeagent check --data` verifies files as well."""
    try:
        places = Places.of(config)
        with closing(Store.copy_of(places.database, places.journal)) as store:
            unreadable = []
            for kind in KINDS:
                store.all(kind)
                unreadable += [f'{kind.__name__} "{key}"' for key in store.unreadable(kind)]
    except (NodeAgentError, OSError) as error:
        return Feature(name="records", present=False, needed=True, loss=str(error))
    return Feature(
        name="records",
        present=not unreadable,
        needed=False,
        loss=f"{', '.join(sorted(unreadable))} cannot be read: what runs of them cannot be reached",
    )


def _feature(
    name: str, probe: Callable[[], bool], loss: str, *, needed: bool = False, detail: str = ""
) -> Feature:
    try:
        present = probe()
    except OSError as error:
        present, loss = False, f"{loss} ({error.strerror})"
    return Feature(name=name, present=present, needed=needed, detail=detail, loss=loss)


def _has_mount_api() -> bool:
    root = syscalls.openat2(syscalls.AT_FDCWD, "/", os.O_PATH, resolve=0)
    try:
        tree = syscalls.open_tree(root, "", syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH)
        try:
            syscalls.mount_setattr(
                tree, "", syscalls.AT_EMPTY_PATH, attr_set=syscalls.MOUNT_ATTR_NOSUID
            )
        finally:
            os.close(tree)
    finally:
        os.close(root)
    return True


def _has_filesystem(name: str) -> bool:
    context = syscalls.fsopen(name)
    os.close(context)
    return True
