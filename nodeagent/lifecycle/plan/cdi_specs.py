"""CDI specifications of the node, in JSON or YAML, read when a container asks for a device (CDI specification 1.1).

A file that cannot be read affects only its own devices, and a malformed device only itself; the fault is reported to
whoever asks for them. Files are cached until they change. They are written by programs of the node, yet bounded: what
is larger or deeper, or has YAML aliases, with which a few bytes can stand for gigabytes, is refused.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import threading
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta

from nodeagent import files
from nodeagent.errors import SHORTAGES
from nodeagent.words import HookStage

log = logging.getLogger(__name__)

MAX_SPEC_BYTES = 1 << 20
MAX_SPECS = 4096  # of a directory: drivers of dynamic resource allocation write one for each claim
MAX_DEPTH = 32
MAX_NAME = 255
MAX_SAID = 32  # warnings about a file, which can have a fault in each of its devices
MAX_TEXT = 1000

VERSIONS = frozenset(
    ("0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0")
)

# "Kind", "Device name" of the specification.
_PART = r"[A-Za-z](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?"
_DEVICE = r"[A-Za-z0-9](?:[A-Za-z0-9_.:-]*[A-Za-z0-9])?"
KIND = re.compile(rf"{_PART}/{_PART}")
DEVICE = re.compile(_DEVICE)
QUALIFIED = re.compile(rf"{_PART}/{_PART}={_DEVICE}")

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Id = Annotated[int, Meta(ge=0, le=(1 << 32) - 2)]
Number = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
# 131071 and 4095 are what execve(2) and mount(2) take; paths have no control characters.
Text = Annotated[str, Meta(max_length=131_071, pattern=r"\A[^\x00\ud800-\udfff]*\Z")]
AbsolutePath = Annotated[
    str, Meta(min_length=1, max_length=4095, pattern=r"\A/[^\x00-\x1f\x7f\ud800-\udfff]*\Z")
]
OptionalPath = Annotated[
    str, Meta(max_length=4095, pattern=r"\A(?:/[^\x00-\x1f\x7f\ud800-\udfff]*)?\Z")
]
Word = Annotated[str, Meta(max_length=255, pattern=r"\A[ -~]*\Z")]
Variable = Annotated[
    str, Meta(max_length=131_071, pattern=r"\A[^=\x00\ud800-\udfff]+=[^\x00\ud800-\udfff]*\Z")
]


class _Part(msgspec.Struct, frozen=True, rename="camel"):
    """A part of a specification; unknown fields, which a later version may add, are ignored."""


class DeviceNode(_Part, frozen=True, rename="camel"):
    """A device node. hostPath defaults to `path`; without a type or major number, the numbers are the node's."""

    path: AbsolutePath
    host_path: OptionalPath = ""
    type: Literal["", "b", "c", "u", "p"] = ""
    major: Annotated[int, Meta(ge=0, le=0xFFF)] = 0
    minor: Annotated[int, Meta(ge=0, le=0xFFFFF)] = 0
    permissions: Annotated[str, Meta(pattern=r"\A[rwm]{0,3}\Z")] = ""
    file_mode: Annotated[int, Meta(ge=0, le=0o7777)] | None = None
    uid: Id | None = None
    gid: Id | None = None


class Mount(_Part, frozen=True, rename="camel"):
    host_path: AbsolutePath
    container_path: AbsolutePath
    options: tuple[Word, ...] = ()
    type: Word = ""


class Hook(_Part, frozen=True, rename="camel"):
    """A hook of a specification. timeout: in seconds."""

    hook_name: HookStage
    path: AbsolutePath
    args: tuple[Text, ...] = ()
    env: tuple[Variable, ...] = ()
    timeout: Annotated[int, Meta(ge=1)] | None = None


class NetDevice(_Part, frozen=True, rename="camel"):
    """A network device of the node, and its name in the container; from version 1.1 on."""

    host_interface_name: Word
    name: Word = ""


class Edits(_Part, frozen=True, rename="camel"):
    env: tuple[Variable, ...] = ()
    device_nodes: tuple[DeviceNode, ...] = ()
    mounts: tuple[Mount, ...] = ()
    hooks: tuple[Hook, ...] = ()
    additional_gids: tuple[Id, ...] = msgspec.field(name="additionalGids", default=())
    intel_rdt: Any = None
    net_devices: tuple[NetDevice, ...] = ()


class Device(msgspec.Struct, frozen=True):
    """A device of a specification. fault: why it cannot be injected; the edits are empty then."""

    name: str
    edits: Edits = Edits()
    fault: str = ""


class Spec(msgspec.Struct, frozen=True):
    """A specification. fault: why none of its devices can be injected."""

    path: Path
    kind: str
    devices: dict[str, Device]
    edits: Edits = Edits()
    fault: str = ""


class _Known(msgspec.Struct, frozen=True):
    """A file as it was read. spec: None where it could not be parsed at all, because of the fault."""

    stamp: tuple[int, ...]
    spec: Spec | None
    fault: str = ""


class Specs:
    """The files of the directories. A later directory has priority over an earlier one."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self.directories = tuple(directories)
        self._lock = threading.Lock()
        self._known: dict[Path, _Known] = {}
        self._saying = threading.Lock()  # its own: the other one is held while files are read
        self._said: dict[Path, set[str]] = {}

    def read(self) -> list[list[Spec]]:
        """Read the specifications of each directory. May take a while: not for an event loop.

        Raises OSError where the node is too short of something to know what there is.
        """
        # Held while files are read, so that of several threads one reads, and the others find what has not changed.
        with self._lock:
            looks = {
                path: self._look(path) for each in self.directories for path in self._paths(each)
            }
            known = {path: look for path, look in looks.items() if look is not None}
            self._known = known
            self._forget_what_was_said(looks.keys() | set(self.directories))
        return [
            [k.spec for path, k in known.items() if path.parent == each and k.spec is not None]
            for each in self.directories
        ]

    def unreadable(self) -> list[str]:
        """The files that could not be parsed, with the reason: any device may have been in them."""
        return [f"{path}: {known.fault}" for path, known in self._known.items() if not known.spec]

    def say(self, path: Path, text: str) -> None:
        """Log a warning about a file once, however often it is met, for as long as the file exists."""
        text = text[:MAX_TEXT]
        with self._saying:
            said = self._said.setdefault(path, set())
            if text in said or len(said) > MAX_SAID:
                return
            said.add(text)
            last = len(said) > MAX_SAID
        log.warning("%s", f"CDI: {path}: has more faults, which are not logged" if last else text)

    def _forget_what_was_said(self, there: Collection[Path]) -> None:
        """Forget the warnings of removed files: drivers of dynamic resource allocation write one for each claim."""
        with self._saying:
            self._said = {path: said for path, said in self._said.items() if path in there}

    def _paths(self, directory: Path) -> Iterator[Path]:
        """The specification files of a directory, without those in directories below it."""
        try:
            names = sorted(os.listdir(directory))
        except OSError as error:
            if error.errno in SHORTAGES:
                raise
            return
        wanted = [n for n in names if n.endswith((".json", ".yaml")) and n.isprintable()]
        if len(wanted) > MAX_SPECS:
            self.say(
                directory,
                f"CDI: {directory}: has more than {MAX_SPECS} files; the rest is not read",
            )
        yield from (directory / name for name in wanted[:MAX_SPECS])

    def _look(self, path: Path) -> _Known | None:
        try:
            status = os.stat(path)
        except FileNotFoundError:  # removed in this moment, or a link to nothing
            return None
        except OSError as error:
            return self._fault(path, (), str(error.strerror))
        stamp = (
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )
        known = self._known.get(path)
        if known is not None and known.stamp == stamp:
            return known
        try:
            return self._known_of(path, stamp)
        except OSError as error:
            if error.errno in SHORTAGES:
                raise
            # Without the stamp: it may pass, and the file be the same.
            return self._fault(path, (), error.strerror or str(error))
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            return self._fault(path, stamp, " ".join(str(error).split())[:500])

    def _known_of(self, path: Path, stamp: tuple[int, ...]) -> _Known:
        spec = parse(path, files.read_bounded(str(path), MAX_SPEC_BYTES))
        for text in [spec.fault, *(device.fault for device in spec.devices.values())]:
            if text:
                self.say(path, f"CDI: {path}: {text}")
        return _Known(stamp, spec)

    def _fault(self, path: Path, stamp: tuple[int, ...], text: str) -> _Known:
        self.say(path, f"CDI: {path}: {text}")
        return _Known(stamp, None, text)


def changed_by_others(path: Path) -> str:
    """The reason not to trust a file whose writer would have programs run with the rights of root; "" for none.

    Whoever can write to a directory above it, or above the link that it is, can put another one in its place. So it
    is checked whenever hooks are taken from it: a change above a file leaves no trace in the file.
    """
    try:
        return _place_of_others(path)
    except (OSError, RuntimeError) as error:  # of links in a circle
        return f"cannot be examined: {error}"


def _place_of_others(path: Path) -> str:
    for place in dict.fromkeys((path.parent.resolve(), path.resolve())):
        for each in (place, *place.parents):
            status = each.stat()
            writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if each.is_dir() and status.st_mode & stat.S_ISVTX:
                writable = 0  # as /tmp: no user can replace another's files there (inode(7))
            if status.st_uid not in (0, os.geteuid()) or writable:
                mode = f"owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o}"
                what = "the file" if each == path else str(each)
                return f"{what} can be changed by others than root ({mode})"
    return ""


# ---- one file ----


def parse(path: Path, data: bytes) -> Spec:
    """Parse a file. Raises ValueError, RecursionError or YAMLError where not even kind and device names can be read."""
    document = json.loads(data) if path.suffix == ".json" else _load_yaml(data)
    if not isinstance(document, dict):
        raise ValueError("is not an object")
    kind, listed = document.get("kind"), document.get("devices") or []
    if not isinstance(kind, str) or len(kind) > MAX_NAME or not KIND.fullmatch(kind):
        raise ValueError(f"kind {_shown(kind)} is not vendor/class")
    if not isinstance(listed, list):
        raise ValueError("devices is not a list")
    devices: dict[str, Device] = {}
    for position, entry in enumerate(listed):
        device = _device(kind, position, entry)
        if device.name in devices:
            fault = f'device "{device.name}": is defined twice'
            device = Device(device.name, fault=fault)
        devices[device.name] = device
    version = document.get("cdiVersion")
    if not isinstance(version, str) or version not in VERSIONS:
        fault = f"cdiVersion {_shown(version)}: this agent knows {', '.join(sorted(VERSIONS))}"
        return Spec(path, kind, devices, fault=fault)
    try:
        return Spec(path, kind, devices, _edits(document))
    except (ValueError, msgspec.ValidationError) as error:
        return Spec(path, kind, devices, fault=str(error))


def _device(kind: str, position: int, entry: object) -> Device:
    name = entry.get("name") if isinstance(entry, dict) else None
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)  # YAML makes a number of a name that is not quoted
    if not isinstance(name, str) or len(name) > MAX_NAME or not DEVICE.fullmatch(name):
        return Device(f"\0{position}", fault=f"devices[{position}]: {_shown(name)} is not a name")
    try:
        return Device(name, _edits(entry))
    except (ValueError, msgspec.ValidationError) as error:
        return Device(name, fault=f'device "{kind}={name}": {error}')


def _edits(holder: Any) -> Edits:
    """The edits of a specification or a device. Raises ValueError, with the place, for what is malformed."""
    edits = holder.get("containerEdits")
    if edits is None:
        return Edits()
    return msgspec.convert({"containerEdits": _given(edits)}, _Holder).container_edits


class _Holder(_Part, frozen=True, rename="camel"):
    container_edits: Edits


def _given(value: object, depth: int = 0) -> object:
    """The value without nulls, which Go writes for what is absent. Raises ValueError for what is nested too deeply."""
    if depth > MAX_DEPTH:
        raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        return {k: _given(v, depth + 1) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_given(entry, depth + 1) for entry in value if entry is not None]
    return value


def _load_yaml(data: bytes) -> object:
    """Load YAML after a check event by event: the loader recurses, and follows aliases. Raises as `parse` does."""
    try:
        _refuse_what_multiplies(data)
        return yaml.load(data, Loader=_LOADER)
    except (LookupError, AttributeError, TypeError) as error:
        # A scalar may have a tag that does not fit, as in "!!bool foo": PyYAML does not look before it converts.
        raise ValueError(f"is not YAML: {type(error).__name__}: {error}") from error


def _refuse_what_multiplies(data: bytes) -> None:
    depth = 0
    for event in yaml.parse(data, Loader=_LOADER):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ValueError("has YAML anchors or aliases")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")


def _shown(value: object) -> str:
    return ascii(value)[:100] if isinstance(value, str) else type(value).__name__
