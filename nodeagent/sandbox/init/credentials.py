"""Labels, limits, ids and capabilities of the calling process, as a `ProcessPlan` describes them.

The functions stand in the order in which they have to be called.
"""

import errno
import os
import resource
from base64 import b64decode

from nodeagent.errors import SHORTAGES, FailedPrecondition, InvalidArgument, Unsupported
from nodeagent.linux import capabilities, seccomp, syscalls
from nodeagent.sandbox.spec import Capabilities, Identity, ProcessPlan, Rlimit

# ---- files of procfs, while /proc is still the node's ----


def write_labels(plan: ProcessPlan) -> None:
    """Write the labels that take effect with the next execve."""
    if plan["apparmor"]:
        _write_label("AppArmor profile", plan["apparmor"], "attr/apparmor/exec", "exec ")
    if plan["selinux"]:
        _write_label("SELinux label", plan["selinux"], "attr/exec", "")
        # The label of the session keyring, which the program could not use otherwise.
        _write_label("SELinux label", plan["selinux"], "attr/keycreate", "")


def _write_label(kind: str, label: str, name: str, verb: str) -> None:
    try:
        _write_own(name, verb + label)
    except OSError as error:
        # The file is there: ENOENT is the answer of AppArmor to the name of a profile that it does not have.
        if error.errno == errno.ENOENT and os.path.exists(f"/proc/self/{name}"):
            raise FailedPrecondition(f'{kind} "{label}": not loaded') from error
        if error.errno in SHORTAGES:
            raise
        raise Unsupported(f'{kind} "{label}": {error.strerror}') from error


def set_oom_score(plan: ProcessPlan) -> list[str]:
    """Set oom_score_adj; returns warnings: going below what the parent has takes CAP_SYS_RESOURCE."""
    score = plan["oom_score_adj"]
    if score is None:
        return []
    try:
        _write_own("oom_score_adj", str(score))
    except PermissionError:
        return [f"oom_score_adj {score}: not permitted"]
    return []


def _write_own(name: str, text: str) -> None:
    path = f"/proc/self/{name}"
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        if syscalls.statfs_type(file) != syscalls.PROC_SUPER_MAGIC:
            raise OSError(errno.EXDEV, "not a file of procfs", path)
        os.write(file, text.encode())
    finally:
        os.close(file)


# ---- limits ----


def set_limits(limits: list[Rlimit]) -> list[str]:
    """Set resource limits; returns warnings for hard limits that are not raised for lack of CAP_SYS_RESOURCE."""
    return [warning for limit in limits for warning in _set_limit(limit)]


def _set_limit(limit: Rlimit) -> list[str]:
    number = getattr(resource, f"RLIMIT_{limit['resource']}", None)
    if number is None:
        raise InvalidArgument(f"resource limit {limit['resource']!r}: unknown")
    try:
        resource.setrlimit(number, (limit["soft"], limit["hard"]))
        return []
    except (
        ValueError
    ):  # what Python raises for EPERM: the hard limit was to be raised (setrlimit(2))
        hard = resource.getrlimit(number)[1]
        resource.setrlimit(number, (_lower(limit["soft"], hard), hard))
        return [
            f"limit {limit['resource']}: not raised above {hard}, the agent's own; a higher one takes CAP_SYS_RESOURCE"
        ]


def _lower(one: int, other: int) -> int:
    """The lower of two limits, of which -1 is infinite."""
    return min(one, other) if -1 not in (one, other) else max(one, other)


# ---- ids and capabilities ----


def enter_user_namespace(descriptor: int, owned: int) -> None:
    """Join a user namespace, with new namespaces of the kinds `owned` that belong to it.

    The new mount namespace has a copy of the mounts, in which none can be undone or changed that the node's root made
    (mount_namespaces(7), "Restrictions on mount namespaces"). All capabilities are of the user namespace from here on.
    """
    syscalls.setns(descriptor, syscalls.CLONE_NEWUSER)
    if owned:
        syscalls.unshare(owned)


def join_new_keyring() -> None:
    """Join a new session keyring, where the kernel has keyrings: the inherited one is the supervisor's."""
    try:
        syscalls.join_session_keyring()
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise


def become(plan: ProcessPlan, identity: Identity) -> list[str]:
    """Take on the ids and capabilities; returns warnings.

    SYS_ADMIN stays permitted and effective where `confine` needs it: for a filter without no_new_privs (seccomp(2)).
    """
    wanted = plan["capabilities"]
    _, held, _ = syscalls.capget()
    # First, because it takes CAP_SETPCAP, which a change of user takes from the effective set (capabilities(7)).
    capabilities.drop_bounding(wanted["bounding"])
    # Without it the permitted set is cleared when the last user id becomes another one than 0.
    syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 1)
    # Groups before the user: without uid 0 CAP_SETGID is not effective any more.
    os.setgroups(identity["groups"])
    os.setresgid(identity["gid"], identity["gid"], identity["gid"])
    os.setresuid(identity["uid"], identity["uid"], identity["uid"])
    # A change of ids sets this back to the node's fs.suid_dumpable.
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    _set_capabilities(wanted, held, extra=_borrowed(plan))
    # Last of the sets: an ambient capability has to be permitted and inheritable already (prctl(2), PR_CAP_AMBIENT).
    capabilities.raise_ambient(wanted["ambient"] & held)
    if plan["no_new_privs"]:
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    missing = wanted["bounding"] & ~held
    return (
        [f"capability {name}: not available" for name in capabilities.names(missing)]
        if missing
        else []
    )


def confine(plan: ProcessPlan) -> None:
    """Filter all further system calls.

    What `become` left permitted goes with execve, which computes the program's capabilities from the other sets.
    """
    if plan["seccomp"]:
        seccomp.install(b64decode(plan["seccomp"]), plan["seccomp_flags"])


def confine_visibly(plan: ProcessPlan) -> None:
    """Confine a process that is seen before its execve: nothing is left that the program will not have.

    `seccomp.successor.CALLS` are all that is called with the filter from here on.
    """
    wanted = plan["capabilities"]
    _, held, _ = syscalls.capget()
    confine(plan)
    if _borrowed(
        plan
    ):  # SYS_ADMIN was needed to install the filter: it can only be given up with it in force
        _set_capabilities(wanted, held, extra=0)


def _borrowed(plan: ProcessPlan) -> int:
    needed = plan["seccomp"] and not plan["no_new_privs"]
    return capabilities.SYS_ADMIN & ~plan["capabilities"]["effective"] if needed else 0


def _set_capabilities(wanted: Capabilities, held: int, extra: int) -> None:
    syscalls.capset(
        effective=wanted["effective"] & held | extra,
        permitted=wanted["permitted"] & held | extra,
        inheritable=wanted["inheritable"] & held,
    )
