"""The language of docstrings: a first sentence stands alone, it does not hang on the name above it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "nodeagent"
FRAGMENT = ("Of", "As", "Who", "With")

MODULES = [
    path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] != "api"
]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_docstring_begins_with_a_sentence(path: Path) -> None:
    found = docstrings(ast.parse(path.read_text()))
    assert [f"line {line}: {text}" for line, text in found if begins_a_fragment(text)] == []


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every string that stands as a statement: those below constants count as well."""
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.lineno, value.value


def begins_a_fragment(text: str) -> bool:
    words = text.split(maxsplit=1)
    return bool(words) and words[0].strip("`,.:") in FRAGMENT


@pytest.mark.parametrize("text", ["Of every pod.", "Who serves it.", "With: its ids.", " As `x`."])
def test_a_fragment_is_found(text: str) -> None:
    assert begins_a_fragment(text)


@pytest.mark.parametrize("text", ["Office hours.", "Whoever asks is answered.", ""])
def test_a_sentence_is_none(text: str) -> None:
    assert not begins_a_fragment(text)
