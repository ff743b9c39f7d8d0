"""Translation of what security contexts of pods and containers have in common: identity, profiles, SELinux labels."""

import logging
from collections.abc import Sequence

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri import validate
from nodeagent.linux import capabilities
from nodeagent.linux.userns import MAX_ID
from nodeagent.requests import CapabilityChange, GroupsPolicy, Profile, ProfileKind, SELinux

log = logging.getLogger(__name__)

SecurityContext = pb.LinuxSandboxSecurityContext | pb.LinuxContainerSecurityContext

_MAX_GROUPS = 65_536  # NGROUPS_MAX
_LOCALHOST = "localhost/"

_KINDS: dict[int, ProfileKind] = {
    pb.SecurityProfile.RuntimeDefault: "default",
    pb.SecurityProfile.Unconfined: "unconfined",
    pb.SecurityProfile.Localhost: "localhost",
    pb.SecurityProfile.OCI: "oci",
}
_BASES: dict[int, ProfileKind] = {
    pb.SecurityProfileBase.RuntimeDefault: "default",
    pb.SecurityProfileBase.Localhost: "localhost",
}
_POLICIES: dict[int, GroupsPolicy] = {pb.Merge: "merge", pb.Strict: "strict"}
_CAPABILITIES = frozenset((*capabilities.NAMES, "ALL"))


# --- identity -------------------------------------------------------------------------------------------------------


def user_id(context: SecurityContext, field: str) -> int | None:
    if not context.HasField("run_as_user"):
        return None
    return _id(context.run_as_user.value, f"{field}.run_as_user")


def group_id(context: SecurityContext, field: str, *, has_user: bool) -> int | None:
    if not context.HasField("run_as_group"):
        return None
    if not has_user:
        validate.refuse(f"{field}.run_as_group", "needs a user as well")
    return _id(context.run_as_group.value, f"{field}.run_as_group")


def groups(context: SecurityContext, field: str) -> tuple[int, ...]:
    field = f"{field}.supplemental_groups"
    values = validate.bounded(context.supplemental_groups, field, _MAX_GROUPS)
    return tuple(_id(value, f"{field}[{index}]") for index, value in enumerate(values))


def groups_policy(context: SecurityContext, field: str) -> GroupsPolicy:
    policy = context.supplemental_groups_policy
    return validate.word(policy, _POLICIES, f"{field}.supplemental_groups_policy")


def _id(value: int, field: str) -> int:
    return validate.number(value, field, 0, MAX_ID)


# --- profiles -------------------------------------------------------------------------------------------------------


def seccomp(context: SecurityContext, field: str) -> Profile | None:
    """The seccomp profile; None, which is unconfined, where the caller says nothing."""
    if context.HasField("seccomp"):
        profile = _profile(context.seccomp, f"{field}.seccomp")
        if profile.kind == "oci":
            return profile
        return _with_path(profile, f"{field}.seccomp.localhost_ref")
    field = f"{field}.seccomp_profile_path"
    named = _by_name(context.seccomp_profile_path, field)
    return _with_path(named, field) if named else None


def _with_path(profile: Profile, field: str) -> Profile:
    if profile.kind != "localhost":
        return profile
    return Profile(kind="localhost", ref=validate.path(profile.ref, field))


def apparmor(context: SecurityContext, field: str) -> Profile | None:
    """The AppArmor profile; None where the caller says nothing."""
    if context.HasField("apparmor"):
        profile = _profile(context.apparmor, f"{field}.apparmor")
        if profile.kind == "oci":
            validate.refuse(f"{field}.apparmor.profile_type", "OCI is for seccomp")
        return Profile(kind=profile.kind, ref=profile.ref.removeprefix(_LOCALHOST))
    if isinstance(context, pb.LinuxContainerSecurityContext):
        return _by_name(context.apparmor_profile, f"{field}.apparmor_profile")
    return None


def _profile(message: pb.SecurityProfile, field: str) -> Profile:
    kind = validate.word(message.profile_type, _KINDS, f"{field}.profile_type")
    ref = validate.text(message.localhost_ref, f"{field}.localhost_ref")
    if bool(ref) != (kind == "localhost"):
        validate.refuse(f"{field}.localhost_ref", "is needed with Localhost, and only then")
    artifact = validate.text(message.oci_ref, f"{field}.oci_ref")
    if bool(artifact) != (kind == "oci"):
        validate.refuse(f"{field}.oci_ref", "is needed with OCI, and only then")
    if kind != "oci":
        if message.HasField("base_profile"):
            validate.refuse(f"{field}.base_profile", "is for OCI")
        return Profile(kind=kind, ref=ref)
    return Profile(
        kind=kind, ref=artifact, base=_base(message.base_profile, f"{field}.base_profile")
    )


def _base(message: pb.SecurityProfileBase, field: str) -> str:
    """The path of a seccomp JSON, or "" for the default profile, which an absent message means too."""
    kind = validate.word(message.type, _BASES, f"{field}.type")
    if bool(message.localhost_ref) != (kind == "localhost"):
        validate.refuse(f"{field}.localhost_ref", "is needed with Localhost, and only then")
    return validate.optional_path(message.localhost_ref, f"{field}.localhost_ref")


def _by_name(value: str, field: str) -> Profile | None:
    """A profile in the deprecated form: one string."""
    if not value:
        return None
    if value in ("runtime/default", "docker/default"):
        return Profile(kind="default")
    if value == "unconfined":
        return Profile(kind="unconfined")
    ref = value.removeprefix(_LOCALHOST)
    if ref == value or not ref:
        validate.refuse(field, f'"{value}" is not runtime/default, unconfined or localhost/…')
    return Profile(kind="localhost", ref=validate.text(ref, field))


# --- labels and capabilities ----------------------------------------------------------------------------------------


def selinux(context: SecurityContext, field: str) -> SELinux | None:
    options = context.selinux_options
    parts = {
        part: validate.text(getattr(options, part), f"{field}.selinux_options.{part}")
        for part in ("user", "role", "type", "level")
    }
    for part in ("user", "role", "type"):
        if ":" in parts[part]:
            validate.refuse(f"{field}.selinux_options.{part}", "has a colon in it")
    return SELinux(**parts) if any(parts.values()) else None


def capability_change(message: pb.Capability, field: str) -> CapabilityChange:
    return CapabilityChange(
        add=_capabilities(message.add_capabilities, f"{field}.add_capabilities"),
        drop=_capabilities(message.drop_capabilities, f"{field}.drop_capabilities"),
        add_ambient=_capabilities(
            message.add_ambient_capabilities, f"{field}.add_ambient_capabilities"
        ),
    )


def _capabilities(values: Sequence[str], field: str) -> tuple[str, ...]:
    """The known ones of these names. Others are ignored, as other runtimes do: a later kernel may have them."""
    validate.bounded(values, field)
    names = {value.upper().removeprefix("CAP_"): value for value in values}
    for unknown in names.keys() - _CAPABILITIES:
        log.warning("%s: %s is not a known capability; ignored", field, ascii(names[unknown]))
    return tuple(name for name in names if name in _CAPABILITIES)
