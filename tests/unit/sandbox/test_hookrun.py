"""What a supervisor hears of the hooks that it has run."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

from nodeagent.sandbox.hookrun import ContainerHooks
from nodeagent.sandbox.pod import Pod
from nodeagent.sandbox.spec import ContainerPlan


def test_a_creation_hears_of_hooks_that_cannot_begin(tmp_path: Path) -> None:
    """As on a full disk: it waits for them, until its caller gives up."""
    hooks = {"bundle": str(tmp_path / "absent/bundle"), "annotations": {}, "stages": {}}
    plan = cast(ContainerPlan, {"id": "c", "hooks": hooks})
    told: list[str] = []
    ContainerHooks(cast(Pod, SimpleNamespace()), plan).create(1, told.append)
    assert [text.partition("]")[0] for text in told] == ["hooks prestart, createRuntime: [Errno 2"]
