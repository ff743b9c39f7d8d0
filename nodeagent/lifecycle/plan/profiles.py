"""The choice of a container's seccomp, AppArmor and SELinux confinement.

Filters and profiles are refused where the node cannot provide them; labels are ignored where it has no SELinux.
"""

import asyncio

from nodeagent.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SecurityProfileInvalid,
    Unsupported,
)
from nodeagent.lifecycle.plan import apparmor
from nodeagent.lifecycle.plan.selinux import NO_LABELS, Labels, Policy
from nodeagent.linux import capabilities
from nodeagent.requests import ContainerConfig, Profile
from nodeagent.sandbox.seccomp import artifact as seccomp_artifact
from nodeagent.sandbox.seccomp import profile as seccomp_profile
from nodeagent.sandbox.seccomp.profile import Filter

UNCONFINED = Filter(program=b"", flags=0)
# The conditional parts of a profile are compiled only for processes that have, or do not have, a capability.
_EXTREMES = (0, capabilities.mask(capabilities.NAMES))


class Profiles:
    """The profiles of this node. default: an OCI JSON file for RuntimeDefault, "" for the built-in profile."""

    def __init__(self, default: str) -> None:
        self._default = default
        self._policy = Policy()

    def check_default(self) -> None:
        """Raise InvalidArgument, which names the setting, for a default that no container could be started with."""
        if not self._default:
            return
        try:
            for held in _EXTREMES:
                seccomp_profile.from_file(self._default, held)
        except (InvalidArgument, NotFound, Unsupported, OSError) as error:
            raise InvalidArgument(
                f"seccomp.default_profile: {error}; correct the file, or leave the setting empty for the built-in"
                " profile"
            ) from error

    def local(self, path: str, capabilities: int) -> Filter:
        """The seccomp profile in a file of the node, at which it blocks; "" is the default one.

        capabilities: the bounding set, which opens some calls.
        """
        path = path or self._default
        if path:
            return seccomp_profile.from_file(path, capabilities)
        return seccomp_profile.runtime_default(capabilities)

    async def apparmor(self, config: ContainerConfig) -> str:
        """The profile's name, or "" for none. Loads the default one where it has been unloaded."""
        asked = config.apparmor
        if asked is not None and asked.kind == "localhost":
            return _loaded_apparmor(asked.ref)
        if config.privileged or (asked is not None and asked.kind == "unconfined"):
            return ""
        return await _default_apparmor(required=asked is not None)

    def selinux(self, config: ContainerConfig) -> Labels:
        """The labels of a container's processes and files; NO_LABELS where it is privileged, or asks for none."""
        if config.selinux is None or config.privileged:
            return NO_LABELS
        return self._policy.labels(config.selinux)


def filtering(config: ContainerConfig) -> Profile | None:
    """The seccomp profile of a container; None for one that is not filtered, as a privileged one never is."""
    profile = config.seccomp
    if profile is None or profile.kind == "unconfined" or config.privileged:
        return None
    return profile


async def with_artifact(name: str, text: bytes, capabilities: int, base: Filter) -> Filter:
    """A filter that allows only what both the base and the text of the artifact `name` allow."""
    try:
        return await asyncio.wrap_future(seccomp_artifact.compiled(text, capabilities, base))
    except (InvalidArgument, Unsupported) as error:
        raise type(error)(f'seccomp profile "{name}": {error}') from error


async def check_artifact(text: bytes) -> None:
    """Raise SecurityProfileInvalid for a seccomp profile that this node could not apply to a container."""
    try:
        for held in _EXTREMES:
            await asyncio.wrap_future(seccomp_artifact.compiled(text, held))
    except (InvalidArgument, Unsupported) as error:
        raise SecurityProfileInvalid(str(error)) from error


def _loaded_apparmor(name: str) -> str:
    if not apparmor.is_enabled():
        raise Unsupported(f'AppArmor profile "{name}": this kernel has no AppArmor')
    if not apparmor.is_loaded(name):
        raise FailedPrecondition(
            f'AppArmor profile "{name}": not loaded on this node; load it with apparmor_parser'
        )
    return name


async def _default_apparmor(*, required: bool) -> str:
    """The default profile; "" without AppArmor or its parser, unless it is required.

    Where the parser is there, a failure to load the profile is an error, and never a container without one.
    """
    if not apparmor.is_enabled():
        if required:
            raise Unsupported("AppArmor profile RuntimeDefault: this kernel has no AppArmor")
        return ""
    if not apparmor.is_loaded(apparmor.NAME):
        if not required and not apparmor.has_parser():
            return ""
        await asyncio.to_thread(apparmor.ensure_default)
    return apparmor.NAME
