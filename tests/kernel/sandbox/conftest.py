"""An image layer, made once, and containers upon it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nodeagent.sandbox.spec import ContainerPlan
from tests.kernel.sandbox.containers import container_plan, make_layer

Plan = Callable[..., ContainerPlan]


@pytest.fixture(scope="session")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_layer(tmp_path_factory.mktemp("image") / "layer")


@pytest.fixture
def plan(tmp_path: Path, layer: Path) -> Plan:
    """plan(argv or a shell script, process={…}, **changes): a container of its own."""

    def make(command: str | list[str], **changes: Any) -> ContainerPlan:
        argv = ["/bin/sh", "-c", command] if isinstance(command, str) else command
        return container_plan(tmp_path / "container", layer, argv, **changes)

    return make
