"""Which seccomp, AppArmor and SELinux confinement a container gets; refused where the node cannot give it."""

from pathlib import Path

from nodeagent.errors import FailedPrecondition, NotFound, Unsupported
from nodeagent.records import ContainerConfig
from nodeagent.sandbox import seccomp_profile
from nodeagent.sandbox.seccomp_profile import Program

APPARMOR_PROFILES = Path("/sys/kernel/security/apparmor/profiles")
SELINUX = Path("/sys/fs/selinux/enforce")
MAX_PROFILE_BYTES = 1 << 20
UNCONFINED = Program(code=b"", flags=0)


class Profiles:
    """default: an OCI JSON file for RuntimeDefault, "" for the built-in profile."""

    def __init__(self, default: str) -> None:
        self._default = default

    def seccomp(self, config: ContainerConfig, capabilities: int) -> Program:
        """capabilities: the bounding set, which opens some calls. A privileged container is never filtered."""
        profile = config.seccomp
        if profile is None or profile.kind == "unconfined" or config.privileged:
            return UNCONFINED
        path = profile.ref or self._default
        if not path:
            return seccomp_profile.default(capabilities)
        return seccomp_profile.load(_read(Path(path)), capabilities)

    def apparmor(self, config: ContainerConfig) -> str:
        """The profile's name, or "" for none."""
        profile = config.apparmor
        if profile is None or profile.kind != "localhost" or config.privileged:
            return ""
        if not APPARMOR_PROFILES.exists():
            raise Unsupported(f'AppArmor profile "{profile.ref}": this kernel has no AppArmor')
        loaded = {line.rpartition(" (")[0] for line in APPARMOR_PROFILES.read_text().splitlines()}
        if profile.ref not in loaded:
            raise FailedPrecondition(f'AppArmor profile "{profile.ref}": not loaded')
        return profile.ref

    def selinux(self, config: ContainerConfig) -> str:
        """The process label, or "" for none."""
        options = config.selinux
        if options is None or config.privileged:
            return ""
        if not SELINUX.exists():
            raise Unsupported("selinux_options: this kernel has no SELinux")
        return f"{options.user}:{options.role}:{options.type}:{options.level}"


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PROFILE_BYTES + 1)
    except FileNotFoundError:
        raise NotFound(f'seccomp profile "{path}": not on this node') from None
    if len(data) > MAX_PROFILE_BYTES:
        raise FailedPrecondition(f'seccomp profile "{path}": larger than {MAX_PROFILE_BYTES} bytes')
    return data
