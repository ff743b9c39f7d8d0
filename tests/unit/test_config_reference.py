"""The configuration as operators read it: complete, and a file that the agent reads."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent import config, config_file, config_reference


def keys(table: config.Table, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name in table.__struct_fields__:
        value = getattr(table, name)
        if isinstance(value, config.Table):
            yield from keys(value, (name,))
        else:
            yield (*above, name)


def test_every_key_is_in_it() -> None:
    described = [
        (*filter(None, (section.name,)), setting.name)
        for section in config_reference.sections()
        for setting in section.settings
    ]
    assert described == list(keys(config.Config()))


def test_every_table_and_key_says_what_it_is() -> None:
    for section in config_reference.sections():
        assert re.fullmatch(r"[A-Z].*\.", section.meaning), section.name
        for setting in section.settings:
            assert re.match(r"[A-Z]", setting.meaning), setting.name
            assert not setting.meaning.endswith("."), setting.name


@pytest.mark.parametrize(
    ("table", "key", "values"),
    [
        ("", "root", "text"),
        ("", "slots", "0 to 256"),
        ("", "handlers", "list of texts"),
        ("network", "bridge", "at most 15 characters"),
        ("network", "masquerade", "true or false"),
        ("images", "max_image_entries", "1000 or more"),
        ("cgroup", "driver", '"auto", "cgroupfs", "systemd"'),
    ],
)
def test_values_are_those_that_are_taken(table: str, key: str, values: str) -> None:
    found = {
        (section.name, setting.name): setting.values
        for section in config_reference.sections()
        for setting in section.settings
    }
    assert found[table, key] == values


def test_the_defaults_are_read_with_and_without_their_comments(tmp_path: Path) -> None:
    text = config_reference.commented_defaults()
    uncommented = re.sub(r"(?m)^# (\w+ = )", r"\1", text)
    for each in (text, uncommented):
        path = tmp_path / "config.toml"
        path.write_text(each)
        assert config_file.load(path, {}) == config.Config()
    written = tomllib.loads(config_file.dumps(config.Config()))
    assert tomllib.loads(uncommented) == written
