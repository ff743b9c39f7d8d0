"""Text of others in messages of ours."""

import pytest

from nodeagent.text import one_line


@pytest.mark.parametrize(
    ("text", "limit", "shown"),
    [
        ("plain, ü and 字", None, "plain, ü and 字"),
        ("a\nb\rc\tWARNING", None, "a b c WARNING"),
        ("\x1b[31mred\x07", None, " [31mred "),
        ("a\u2028b\x85c\u202ed", None, "a b c d"),
        ("abcdef", 3, "abc"),
        ("", 3, ""),
    ],
)
def test_one_line(text: str, limit: int | None, shown: str) -> None:
    assert one_line(text, limit) == shown
