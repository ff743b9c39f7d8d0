"""docs/operations.md quotes lines of logs and errors that the code writes, and knows every reason of a condition."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
TEXT = (PROJECT / "docs/operations.md").read_text()
GAP = "…"
"""Stands in the document for what differs from time to time."""


@cache
def sources() -> dict[Path, ast.Module]:
    paths = (PROJECT / "nodeagent").rglob("*.py")
    return {path: ast.parse(path.read_text()) for path in paths if "api" not in path.parts}


@cache
def texts() -> frozenset[str]:
    """Every literal text of the code, with a gap for each value that is put into it."""
    nodes = (node for tree in sources().values() for node in ast.walk(tree))
    return frozenset(re.sub(f"{GAP}+", GAP, text) for node in nodes for text in literal(node))


def literal(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield re.sub(r"%[sdgr]", GAP, node.value)
    elif isinstance(node, ast.JoinedStr):
        yield "".join(text for part in node.values for text in literal(part))
    elif isinstance(node, ast.FormattedValue):
        yield GAP


def quoted() -> Iterator[str]:
    """The first cells of the tables of lines, and wherever else a text has a gap."""
    within = False
    for line in TEXT.splitlines():
        within = line.startswith("| Line |") or (within and line.startswith("|"))
        cell = line.split(" | ")[0] if within else line
        yield from (c for c in re.findall(r"`([^`]+)`", cell) if within or GAP in c)


@pytest.mark.parametrize("line", sorted(set(quoted())))
def test_a_quoted_line_is_in_the_code(line: str) -> None:
    assert any(line in text for text in texts()), "no text of the code has this: correct the line"


def test_every_reason_of_a_condition_is_explained() -> None:
    calls = (n for t in sources().values() for n in ast.walk(t) if isinstance(n, ast.Call))
    reasons = {
        reason
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "Trouble" and call.args
        for reason in literal(call.args[0])
        if reason
    }
    assert len(reasons) >= 8
    table = TEXT.partition("## Conditions")[2].partition("\n## ")[0]
    assert {reason for reason in reasons if f"`{reason}`" not in table} == set()


def tasks() -> Iterator[str]:
    """The names of background tasks: of what is kept and run, and of what has a keeper of its own."""
    for tree in sources().values():
        constants = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = _task_name(call)
            if isinstance(name, ast.Name):
                name = constants.get(name.id)
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value


def _task_name(call: ast.Call) -> ast.expr | None:
    called = ast.unparse(call.func)
    if re.search(r"(tasks|keeping|filling)\.(keep|run)$|\.do_behind$|^keep$", called):
        return call.args[0]
    if called == "Trash":
        return call.args[1]
    if called == "Listener":
        return next((word.value for word in call.keywords if word.arg == "name"), None)
    return None


def test_every_background_task_is_explained() -> None:
    names = set(tasks())
    assert len(names) >= 15
    table = TEXT.partition("### Background tasks")[2].partition("\n### ")[0]
    assert {name for name in names if f"`{name}`" not in table} == set()
