"""The process of a container: the image's config and the request's, merged. Pure.

Every rule that an image's config and a container's config share is decided here, once, at creation.
"""

import re
import signal

from nodeagent.errors import InvalidArgument
from nodeagent.linux import capabilities
from nodeagent.records import ImageConfig
from nodeagent.requests import CapabilityChange, ContainerConfig
from nodeagent.sandbox.spec import DEFAULT_PATH, Capabilities, UserRequest

DEFAULT_CAPABILITIES = (
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
)

_SIGNAL_NUMBER = re.compile("[0-9]{1,3}")


def arguments(config: ContainerConfig, image: ImageConfig) -> list[str]:
    """The arguments: command replaces the image's entrypoint and, with it, its cmd; args replaces the cmd."""
    entrypoint = config.command or image.entrypoint
    args = config.args or (() if config.command else image.cmd)
    if not entrypoint and not args:
        raise InvalidArgument(
            f'container "{config.name}": neither it nor image "{config.image}" names a command'
        )
    return [*entrypoint, *args]


def environment(config: ContainerConfig, image: ImageConfig, hostname: str) -> list[str]:
    """``NAME=value`` in the order of first mention; the request overrides the image, and the image our defaults.

    An entry of an image that is a name alone removes the variable, as containerd reads it. One without a name is
    refused, when a container is made and not when the image is pulled, as runtimes below containerd do.
    """
    merged = {"PATH": DEFAULT_PATH, "HOSTNAME": hostname}
    if config.tty:
        merged["TERM"] = "xterm"
    for entry in image.env:
        name, sets, value = entry.partition("=")
        if not sets:
            merged.pop(name, None)
        elif name:
            merged[name] = value
        else:
            raise InvalidArgument(
                f'image "{config.image}": its Env has "{entry}", which sets a variable without a name; '
                "build the image without it"
            )
    for name, raw in config.envs:
        merged[name] = raw.decode("utf-8", "surrogateescape")
    return [f"{name}={value}" for name, value in merged.items()]


def user(config: ContainerConfig, image: ImageConfig) -> UserRequest:
    """The request's user, else the image's ``user[:group]``, names or numbers, else root."""
    request = UserRequest(
        uid=config.run_as_user,
        username=config.run_as_username,
        gid=config.run_as_group,
        groupname="",
        groups=list(config.supplemental_groups),
        merge_groups=config.groups_policy == "merge",
    )
    if config.run_as_user is not None or config.run_as_username:
        return request
    name, _, group = image.user.partition(":")
    request["uid"] = int(name) if name.isdecimal() else None
    request["username"] = "" if name.isdecimal() else name
    if config.run_as_group is None:
        request["gid"] = int(group) if group.isdecimal() else None
        request["groupname"] = "" if group.isdecimal() else group
    return request


def stop_signal(config: ContainerConfig, image: ImageConfig) -> int:
    """The request's stop signal, else the image's STOPSIGNAL (name or number), else SIGTERM."""
    if config.stop_signal:
        return config.stop_signal
    text = image.stop_signal.upper().removeprefix("SIG")
    if not text:
        return signal.SIGTERM
    if _SIGNAL_NUMBER.fullmatch(text) and 1 <= int(text) <= signal.SIGRTMAX:
        return int(text)
    if text.startswith(("RTMIN+", "RTMAX-")) and _SIGNAL_NUMBER.fullmatch(text[6:]):
        offset = int(text[6:])
        number = signal.SIGRTMIN + offset if text[3] == "I" else signal.SIGRTMAX - offset
        if signal.SIGRTMIN <= number <= signal.SIGRTMAX:
            return number
    try:
        return signal.Signals[f"SIG{text}"]
    except KeyError:
        raise InvalidArgument(
            f'image "{config.image}": stop signal "{image.stop_signal}" is unknown'
        ) from None


def capability_sets(change: CapabilityChange, *, privileged: bool) -> Capabilities:
    """The five sets: ALL first, then single additions, then drops; ambient additions are in all of them.

    A capability that the agent does not have itself stays in them: the container is made without it, as runc makes it,
    and with a warning. Charts ask for more than their programs need on any one node.
    """
    if privileged:
        return _sets(capabilities.known(), ambient=0)
    everything = capabilities.known()
    effective = everything if "ALL" in change.add else capabilities.mask(DEFAULT_CAPABILITIES)
    if "ALL" in change.drop:
        effective = 0
    ambient = _mask(change.add_ambient) | (everything if "ALL" in change.add_ambient else 0)
    added = _mask(change.add) | _mask(change.add_ambient)
    effective = (effective | added | ambient) & ~_mask(change.drop)
    return _sets(effective, ambient=ambient & effective)


def _mask(names: tuple[str, ...]) -> int:
    try:
        return capabilities.mask(name for name in names if name != "ALL")
    except ValueError as error:
        raise InvalidArgument(f"capabilities: {error}") from None


def _sets(mask: int, *, ambient: int) -> Capabilities:
    return Capabilities(
        bounding=mask, permitted=mask, effective=mask, inheritable=ambient, ambient=ambient
    )
