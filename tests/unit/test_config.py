"""The configuration: values that are texts."""

import pytest

from nodeagent import config


def test_rlimits_are_pairs_of_numbers() -> None:
    limits = config.Rlimits(nofile="1:2", nproc="unlimited", core="0", memlock="")
    assert list(limits.pairs()) == [("NOFILE", 1, 2), ("NPROC", -1, -1), ("CORE", 0, 0)]


@pytest.mark.parametrize(
    ("text", "parts"), [("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:0", ("::1", 0))]
)
def test_addresses_are_split(text: str, parts: tuple[str, int]) -> None:
    assert config.split_address(text) == parts
