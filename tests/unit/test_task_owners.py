"""Every background task of the agent has an owner, and nobody drops what gathered work has failed of.

Ruff bans `asyncio.create_task` and `asyncio.ensure_future`. It cannot tell methods of that name apart: those of a
TaskGroup, which owns what it starts, and those of an event loop, which does not.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "nodeagent"
OWNER = PACKAGE / "tasks.py"
STARTS = ("create_task", "ensure_future", "run_coroutine_threadsafe")
SOURCES = [path for path in PACKAGE.rglob("*.py") if path != OWNER and "api" not in path.parts]


def groups(tree: ast.AST) -> set[str]:
    """What is a TaskGroup in this module, as it is written there."""
    return {name for node in ast.walk(tree) for name in _bound(node)}


def _bound(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.AsyncWith):
        for item in node.items:
            if item.optional_vars is not None and _is_group(item.context_expr):
                yield ast.unparse(item.optional_vars)
    elif isinstance(node, ast.AnnAssign) and _is_group(node.annotation):
        yield ast.unparse(node.target)


def _is_group(node: ast.expr) -> bool:
    return ast.unparse(node).removesuffix("()") in {"TaskGroup", "asyncio.TaskGroup"}


def bare_starts(source: str) -> list[str]:
    """Calls that start a task which nobody owns."""
    tree = ast.parse(source)
    owners = groups(tree)
    return [
        f"line {node.lineno}: {ast.unparse(node.func)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in STARTS
        and ast.unparse(node.func.value) not in owners
    ]


def dropped_failures(source: str) -> list[str]:
    """Calls of gather with return_exceptions whose result nobody looks at."""
    dropped = (
        node.value.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Await)
    )
    return [
        f"line {call.lineno}: {ast.unparse(call.func)}"
        for call in dropped
        if isinstance(call, ast.Call)
        and any(keyword.arg == "return_exceptions" for keyword in call.keywords)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_task_has_an_owner(path: Path) -> None:
    source = path.read_text()
    assert bare_starts(source) == []
    assert dropped_failures(source) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("asyncio.create_task(work())", ["line 1: asyncio.create_task"]),
        ("loop.create_task(work())", ["line 1: loop.create_task"]),
        ("asyncio.get_running_loop().create_task(work())", ["line 1: asyncio.get_running_loop().create_task"]),
        ("class A:\n group: asyncio.TaskGroup\n def f(self): group.create_task(work())", []),
        ("async def f():\n async with asyncio.TaskGroup() as g:\n  g.create_task(work())", []),
        ("async def f():\n async with other() as g:\n  g.create_task(work())", ["line 3: g.create_task"]),
    ],
)  # fmt: skip
def test_a_bare_start_is_found(source: str, found: list[str]) -> None:
    assert bare_starts(source) == found


def test_failures_that_nobody_looks_at_are_found() -> None:
    source = "async def f():\n await gather(a, return_exceptions=True)\n b = await gather(a, return_exceptions=True)"
    assert dropped_failures(source) == ["line 2: gather"]
