"""Rules of `nodeagent.sandbox` by room that no import contract can state: what launcher and supervisors never call."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "nodeagent"
NEVER_WAITING = ("runtime", "launcher", "supervisor")
INTERPRETER = ("runtime", "launcher", "supervisor", "init")

# Calls that wait, unless one of these words is among their arguments.
WAITING = {
    "time.sleep": (),
    "os.system": (),
    "os.popen": (),
    "os.wait": (),
    "os.wait3": ("WNOHANG",),
    "os.wait4": ("WNOHANG",),
    "os.waitpid": ("WNOHANG",),
    "os.waitid": ("WNOHANG",),
    "fcntl.flock": ("LOCK_NB", "LOCK_UN"),
    "fcntl.lockf": ("LOCK_NB", "LOCK_UN"),
    "signal.sigwait": (),
    "signal.sigwaitinfo": (),
    "socket.create_connection": (),
    "socket.getaddrinfo": (),
}
# Where one of them is right: the module and the function, with the reason.
RIGHT = {
    (
        "exits.py",
        "record",
        "fcntl.flock",
    ),  # held for one write to tmpfs, by a launcher or a supervisor
    ("runtime/children.py", "_bury", "os.waitid"),  # the process is a zombie already
    ("supervisor/hookrun.py", "_claimed", "fcntl.flock"),  # in the runner, a child that may wait
}


def modules(*rooms: str) -> list[Path]:
    """The modules of these rooms, and those beside the rooms, which all of them use."""
    sandbox = PACKAGE / "sandbox"
    inside = (path for room in rooms for path in (sandbox / room).rglob("*.py"))
    return sorted([*sandbox.glob("*.py"), *inside])


def calls(tree: ast.AST, function: str = "") -> Iterator[tuple[str, str, str]]:
    """The calls, each with the function that it is in, its name, its arguments."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield from calls(node, node.name)
            continue
        if isinstance(node, ast.Call):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            yield function, ast.unparse(node.func), " ".join(map(ast.unparse, arguments))
        yield from calls(node, function)


def waiting(path: Path) -> set[tuple[str, str, str]]:
    name = str(path.relative_to(PACKAGE / "sandbox"))
    return {
        (name, function, called)
        for function, called, arguments in calls(ast.parse(path.read_text()))
        if called in WAITING and not any(word in arguments for word in WAITING[called])
    }


def test_launcher_and_supervisors_never_wait() -> None:
    found = set().union(*map(waiting, modules(*NEVER_WAITING)))
    assert found == RIGHT


@pytest.mark.parametrize("call", ["time.sleep(1)", "os.waitpid(1, 0)", "fcntl.flock(1, LOCK_EX)"])
def test_a_call_that_waits_is_found(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    path = tmp_path / "sandbox/supervisor/new.py"
    path.parent.mkdir(parents=True)
    path.write_text(f"def f():\n    {call}\n")
    assert waiting(path) == {("supervisor/new.py", "f", call.partition("(")[0])}


@pytest.mark.parametrize(
    "path", modules(*INTERPRETER), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_modules_are_imported_at_the_head(path: Path) -> None:
    """Before the first fork, and before the root of a container is entered, where its files would be imported."""
    tree = ast.parse(path.read_text())
    inner = {
        node.lineno
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.Lambda)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
        or (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("__import__", "importlib.import_module")
        )
    }
    assert not inner


SHARED = [
    *(PACKAGE / "linux").glob("*.py"),
    *(
        PACKAGE / name
        for name in ("files.py", "disk_reserve.py", "errors.py", "text.py", "words.py")
    ),
]


@pytest.mark.parametrize(
    "path", [*modules(*INTERPRETER), *SHARED], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_only_the_standard_library_is_imported(path: Path) -> None:
    """An import contract can forbid libraries by name only; this also refuses one that nobody has thought of."""
    imported = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    roots = {name.partition(".")[0] for name in imported}
    assert roots - sys.stdlib_module_names <= {"nodeagent"}
