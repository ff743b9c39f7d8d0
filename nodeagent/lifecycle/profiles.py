"""Which seccomp, AppArmor and SELinux confinement a container gets; refused where the node cannot give it."""

from pathlib import Path

from nodeagent.errors import FailedPrecondition, Unsupported
from nodeagent.lifecycle import apparmor
from nodeagent.records import ContainerConfig, Profile
from nodeagent.sandbox import seccomp_profile
from nodeagent.sandbox.seccomp_profile import Filter

SELINUX = Path("/sys/fs/selinux/enforce")
UNCONFINED = Filter(program=b"", flags=0)


class Profiles:
    """default: an OCI JSON file for RuntimeDefault, "" for the built-in profile."""

    def __init__(self, default: str) -> None:
        self._default = default

    def seccomp(self, config: ContainerConfig, capabilities: int) -> Filter:
        """capabilities: the bounding set, which opens some calls. A privileged container is never filtered."""
        profile = config.seccomp
        if profile is None or profile.kind == "unconfined" or config.privileged:
            return UNCONFINED
        path = profile.ref or self._default
        if path:
            return seccomp_profile.from_file(path, capabilities)
        return seccomp_profile.runtime_default(capabilities)

    def apparmor(self, config: ContainerConfig) -> str:
        """The profile's name, or "" for none. Without a wish it is the default one, where there is that."""
        profile = config.apparmor or Profile(kind="default")
        if profile.kind == "unconfined" or config.privileged:
            return ""
        if profile.kind == "default":
            return apparmor.NAME if apparmor.is_loaded(apparmor.NAME) else ""
        if not apparmor.is_enabled():
            raise Unsupported(f'AppArmor profile "{profile.ref}": this kernel has no AppArmor')
        if not apparmor.is_loaded(profile.ref):
            raise FailedPrecondition(f'AppArmor profile "{profile.ref}": not loaded on this node')
        return profile.ref

    def selinux(self, config: ContainerConfig) -> str:
        """The process label, or "" for none."""
        options = config.selinux
        if options is None or config.privileged:
            return ""
        if not SELINUX.exists():
            raise Unsupported("selinux_options: this kernel has no SELinux")
        return f"{options.user}:{options.role}:{options.type}:{options.level}"
