"""The configuration as operators read it: every table and key with its meaning, its values and its default.

It comes from the schema in `nodeagent.config` alone, and goes into what `nodeagent config --defaults` prints,
docs/config.md and nodeagent.toml(5).
"""

import inspect
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
from msgspec.inspect import (
    BoolType,
    IntType,
    LiteralType,
    Metadata,
    StrType,
    StructType,
    Type,
    VarTupleType,
)

from nodeagent.config import Config, Table
from nodeagent.config_file import DEFAULT_PATH, to_toml

COLUMNS = 98
HEAD = (
    "Every setting of nodeagent, with its default. Remove the # before those that you change. The agent reads "
    f"{DEFAULT_PATH}, then config.d/*.toml beside it in the order of their names."
)


class Setting(NamedTuple):
    """A key. values: what it takes; limited: whether that is less than its type; default: as TOML writes it."""

    name: str
    values: str
    limited: bool
    default: str
    meaning: str


class Section(NamedTuple):
    """A table; the keys before the first table of a file are in one with the name ""."""

    name: str
    meaning: str
    settings: tuple[Setting, ...]


def sections() -> Iterator[Section]:
    """Yield every table with its keys, in the order in which a file has them."""
    defaults = Config()
    yield _section("", defaults)
    for name in defaults.__struct_fields__:
        table = getattr(defaults, name)
        if isinstance(table, Table):
            yield _section(name, table)


def commented_defaults() -> str:
    """A file with every table and, commented out, every key with its meaning and default.

    The agent reads it as it is, and with the keys taken out of their comments.
    """
    return _comment(HEAD) + "".join(map(_commented, sections()))


def _section(name: str, table: Table) -> Section:
    fields = msgspec.inspect.type_info(type(table))
    assert isinstance(fields, StructType)
    settings = (
        _setting(field.name, field.type, getattr(table, field.name))
        for field in fields.fields
        if not isinstance(getattr(table, field.name), Table)
    )
    meaning = inspect.cleandoc(type(table).__doc__ or "").replace("\n", " ").replace("  ", " ")
    return Section(name, meaning, tuple(settings))


def _setting(name: str, kind: Type, default: object) -> Setting:
    values, limited = _values(kind)
    return Setting(name, values, limited, to_toml(default), _sentence(kind))


def _sentence(kind: Type) -> str:
    schema = kind.extra_json_schema if isinstance(kind, Metadata) else None
    text = str((schema or {})["description"])
    return text[:1].upper() + text[1:]


def _values(kind: Type) -> tuple[str, bool]:
    match kind:
        case Metadata(type=inner):
            return _values(inner)
        case BoolType():
            return "true or false", False
        case IntType(ge=lowest, le=None):
            return f"{lowest} or more", True
        case IntType(ge=lowest, le=highest):
            return f"{lowest} to {highest}", True
        case StrType(max_length=None):
            return "text", False
        case StrType(max_length=longest):
            return f"at most {longest} characters", True
        case LiteralType(values=values):
            return ", ".join(map(to_toml, values)), True
        case VarTupleType(item_type=StrType()):
            return "list of texts", False
    raise NotImplementedError(kind)


def _commented(section: Section) -> str:
    head = f"\n[{section.name}]\n{_comment(section.meaning)}" if section.name else ""
    return head + "".join(map(_commented_out, section.settings))


def _commented_out(setting: Setting) -> str:
    values = f" ({setting.values})" if setting.limited else ""
    return f"\n{_comment(setting.meaning + values)}# {setting.name} = {setting.default}\n"


def _comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in textwrap.wrap(text, COLUMNS))
