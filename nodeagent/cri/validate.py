"""Checks of single values where they enter: each returns the value, or refuses it by the name of its field.

Raises `InvalidArgument` only. What depends on the node or on another object is checked behind the API.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn, TypeVar

from nodeagent.errors import InvalidArgument

MAX_NAME_BYTES = 1024
MAX_TEXT_BYTES = 4096
MAX_PATH_BYTES = 4095  # PATH_MAX, without the final NUL
MAX_COMPONENT_BYTES = 255  # NAME_MAX
MAX_LIST = 100_000  # a pod in a namespace of many services has tens of thousands of variables
MAX_METADATA_BYTES = 1 << 20

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

T = TypeVar("T")
W = TypeVar("W", bound=str)


def refuse(field: str, problem: str) -> NoReturn:
    raise InvalidArgument(f"{field}: {problem}")


def text(value: str, field: str, *, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """A text of one line, possibly empty."""
    if _CONTROL.search(value):
        refuse(field, "has a control character")
    if len(value.encode()) > max_bytes:
        refuse(field, f"is longer than {max_bytes} bytes")
    return value


def given(value: str, field: str, *, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """A text of one line, not empty."""
    if not value:
        refuse(field, "is required")
    return text(value, field, max_bytes=max_bytes)


def name(value: str, field: str) -> str:
    """A name that may become part of a path."""
    if "/" in value:
        refuse(field, "has a slash in it")
    return given(value, field, max_bytes=MAX_NAME_BYTES)


def string(value: str, field: str) -> str:
    """A text that becomes a string of the kernel: anything but NUL."""
    if "\0" in value:
        refuse(field, "has a NUL in it")
    return value


def strings(values: Sequence[str], field: str) -> tuple[str, ...]:
    bounded(values, field)
    return tuple(string(value, f"{field}[{index}]") for index, value in enumerate(values))


def path(value: str, field: str) -> str:
    """An absolute path, in its shortest form."""
    if not value.startswith("/"):
        refuse(field, f'"{value}" is not an absolute path' if value else "is required")
    return "/" + _components(value, field)


def optional_path(value: str, field: str) -> str:
    return path(value, field) if value else ""


def relative_path(value: str, field: str) -> str:
    """A path below something, in its shortest form; empty stays empty."""
    if value.startswith("/"):
        refuse(field, f'"{value}" is not a relative path')
    return _components(value, field)


def container_path(value: str, field: str) -> str:
    """A path in a container: absolute, in its shortest form. A relative path begins at the root.

    ``..`` goes back before any link is followed, and at the root stays there, as Go's filepath.Clean has it. A relative
    path that leads out is refused: the other runtimes differ in what they make of it.
    """
    parts: list[str] = []
    for part in value.split("/"):
        if part not in ("", ".", ".."):
            parts.append(part)
        elif part == ".." and not parts and not value.startswith("/"):
            refuse(field, f'"{value}" leads out of the container')
        elif part == ".." and parts:
            parts.pop()
    return path("/" + "/".join(parts) if value else "", field)


def absolute_container_path(value: str, field: str) -> str:
    return container_path(value, field) if value.startswith("/") else path(value, field)


def container_paths(values: Sequence[str], field: str) -> tuple[str, ...]:
    bounded(values, field)
    return tuple(
        absolute_container_path(value, f"{field}[{index}]") for index, value in enumerate(values)
    )


def _components(value: str, field: str) -> str:
    string(value, field)
    if len(value.encode()) > MAX_PATH_BYTES:
        refuse(field, f"is longer than {MAX_PATH_BYTES} bytes")
    parts = [part for part in value.split("/") if part not in ("", ".")]
    if ".." in parts:
        refuse(field, f'"{value}" has .. in it')
    if any(len(part.encode()) > MAX_COMPONENT_BYTES for part in parts):
        refuse(field, f"has a component longer than {MAX_COMPONENT_BYTES} bytes")
    return "/".join(parts)


def number(value: int, field: str, low: int, high: int) -> int:
    if not low <= value <= high:
        refuse(field, f"{value} is not between {low} and {high}")
    return value


def word(value: int, words: Mapping[int, W], field: str) -> W:
    """The meaning of an enum value. Unknown ones are refused here: proto3 lets them pass."""
    if value not in words:
        allowed = ", ".join(f"{number} ({meaning})" for number, meaning in words.items())
        refuse(field, f"{value} is none of {allowed}")
    return words[value]


def one_of(value: str, allowed: Iterable[str], field: str) -> str:
    if value not in allowed:
        refuse(field, f'"{value}" is not one of {", ".join(allowed)}')
    return value


def bounded(values: Sequence[T], field: str, limit: int = MAX_LIST) -> Sequence[T]:
    if len(values) > limit:
        refuse(field, f"has {len(values)} entries, more than {limit}")
    return values


def matching(value: str, pattern: re.Pattern[str], field: str, meaning: str) -> str:
    if not pattern.fullmatch(value):
        refuse(field, f'"{value}" is not {meaning}')
    return value


def metadata(values: Mapping[str, str], field: str) -> dict[str, str]:
    """Labels or annotations, kept byte for byte; only their size is bounded."""
    size = sum(len(key.encode()) + len(value.encode()) for key, value in values.items())
    if size > MAX_METADATA_BYTES:
        refuse(field, f"has {size} bytes, more than {MAX_METADATA_BYTES}")
    return dict(values)
