"""The verbs of a container, without a supervisor: what they wait for, and what they do not."""

import asyncio
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nodeagent.lifecycle.containers.creation import Creation
from nodeagent.lifecycle.containers.stopping import Stopping
from nodeagent.lifecycle.plan.cdi import Cdi
from nodeagent.requests import ContainerConfig, HookConfig, Namespaces
from nodeagent.tasks import Tasks
from nodeagent.words import HookStage

PARTS = ("inventory", "images", "cgroups", "groups", "planner", "cdi", "removal", "directories")


def creation(**parts: Any) -> Creation:
    """parts: those that are used; there is nothing else."""
    nothing = dict.fromkeys(PARTS, cast(Any, None))
    return Creation(**(nothing | parts), tasks=Tasks())


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
    node = creation(cdi=Cdi([tmp_path], []))
    sandbox: Any = SimpleNamespace(config=SimpleNamespace(namespaces=Namespaces()))
    plain = ContainerConfig(name="a", image="i")
    asking = ContainerConfig(name="b", image="i", cdi_devices=("v.com/gpu=0",))
    hanging = asyncio.create_task(node._with_devices(sandbox, asking))
    await asyncio.sleep(0)
    assert await node._with_devices(sandbox, plain) == plain
    answers.set()
    assert await hanging == asking


# --- stop ---


class Starting:
    """A container whose start is not over, as its supervisor and the inventory know it."""

    def __init__(self, *stages: HookStage) -> None:
        hooks = tuple(
            HookConfig(stage=s, path="/h", args=("/h",), env=(), source="s") for s in stages
        )
        config = ContainerConfig(name="c", image="i", hooks=hooks)
        self.container: Any = SimpleNamespace(
            id="c", sandbox_id="p", config=config, stop_signal=signal.SIGTERM, state="exited"
        )
        self.start = asyncio.Lock()
        self.asked: list[int] = []
        inventory = SimpleNamespace(
            container=lambda _: self.container,
            containers={"c": self.container},
            supervisor=lambda _: self,
            lock=lambda _: self.start,
        )
        nothing = cast(Any, SimpleNamespace())
        self.stopping = Stopping(cast(Any, inventory), nothing, nothing)
        self.stopping._starting.add("c")

    async def stop(self, _id: str, _number: int, timeout_ms: int) -> None:
        """Stop it: as it ends, its start is over."""
        self.asked.append(timeout_ms)
        self.start.release()


@pytest.mark.parametrize(("stages", "timeout_ms"), [(("poststart",), 30_000), (("poststop",), 0)])
async def test_a_container_whose_hooks_run_after_the_start_has_its_time_to_end(
    monkeypatch: pytest.MonkeyPatch, stages: tuple[HookStage, ...], timeout_ms: int
) -> None:
    """Its program runs. Without such hooks something holds up the start: it would not hear a signal."""
    monkeypatch.setattr("nodeagent.lifecycle.containers.stopping.START_SECONDS", 0)
    starting = Starting(*stages)
    await starting.start.acquire()
    await starting.stopping.stop("c", 30)
    assert starting.asked == [timeout_ms]
