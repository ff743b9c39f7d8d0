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


def bare_gathers(source: str) -> list[str]:
    """Calls of gather, which goes on without its other tasks when one fails, or whose failures nobody looks at."""
    tree = ast.parse(source)
    read = {
        id(node.value.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Await)
    }
    return [
        f"line {call.lineno}: {ast.unparse(call.func)}"
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and ast.unparse(call.func).rpartition(".")[2] == "gather"
        and not (
            id(call) in read and any(each.arg == "return_exceptions" for each in call.keywords)
        )
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_task_has_an_owner(path: Path) -> None:
    source = path.read_text()
    assert bare_starts(source) == []
    assert bare_gathers(source) == []


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


def test_a_bare_gather_is_found() -> None:
    source = """async def f():
    await asyncio.gather(a, b)
    await gather(a, return_exceptions=True)
    c = await gather(a, return_exceptions=True)
    d = await gather(a)
"""
    assert bare_gathers(source) == ["line 2: asyncio.gather", "line 3: gather", "line 5: gather"]
