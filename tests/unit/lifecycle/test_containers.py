"""The verbs of a container, without a supervisor: what they wait for, and what they do not."""

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nodeagent.lifecycle.cdi import Cdi
from nodeagent.lifecycle.containers import Containers
from nodeagent.records import ContainerConfig

PARTS = ("registry", "supervision", "images", "cgroups", "planner", "cdi", "trash", "directory")


def containers(**parts: Any) -> Containers:
    """parts: those that are used; there is nothing else."""
    nothing = dict.fromkeys(PARTS, cast(Any, None))
    return Containers(**(nothing | parts))


# --- CDI directories ---


class NoPool(ThreadPoolExecutor):
    """That of an event loop, which files of images and lookups of names wait for as well."""

    def submit(self, *_: Any, **__: Any) -> Future[Any]:
        raise AssertionError("waits in the pool of the event loop")


async def test_a_cdi_directory_that_hangs_holds_up_who_asks_for_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(Cdi, "inject", lambda _, config, **__: answers.wait() and config)
    asyncio.get_running_loop().set_default_executor(NoPool())
    node = containers(cdi=Cdi([tmp_path], []))
    sandbox: Any = SimpleNamespace(config=SimpleNamespace(namespaces=SimpleNamespace(user=None)))
    plain = ContainerConfig(name="a", image="i")
    asking = ContainerConfig(name="b", image="i", cdi_devices=("v.com/gpu=0",))
    hanging = asyncio.create_task(node._with_devices(sandbox, asking))
    await asyncio.sleep(0)
    assert await node._with_devices(sandbox, plain) == plain
    answers.set()
    assert await hanging == asking
