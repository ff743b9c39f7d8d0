"""Each pod with a container that runs is asked for its state once a minute: the news of an end is sent only once."""

import asyncio
from functools import partial

from nodeagent.lifecycle.inventory import Inventory
from nodeagent.lifecycle.supervisors.supervision import Supervision
from nodeagent.tasks import Tasks

PERIOD_SECONDS = 60.0
NAME = "supervisor state"


class Polling:
    """Asks one pod after the other, spread over the period; one that does not answer holds up no other."""

    def __init__(self, inventory: Inventory, supervision: Supervision, tasks: Tasks) -> None:
        self._inventory = inventory
        self._supervision = supervision
        self._tasks = tasks.part()
        self._asked: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Ask from now on, in the background."""
        self._tasks.keep(NAME, self._poll)

    async def close(self) -> None:
        await self._tasks.close()

    async def _poll(self) -> None:
        while True:
            pods = {
                c.sandbox_id for c in self._inventory.containers.values() if c.state == "running"
            }
            for sandbox_id in pods:
                self._ask(sandbox_id)
                await asyncio.sleep(PERIOD_SECONDS / len(pods))
            if not pods:
                await asyncio.sleep(PERIOD_SECONDS)

    def _ask(self, sandbox_id: str) -> None:
        """Ask a pod, unless its last answer is still waited for, which ends with its deadline."""
        if sandbox_id in self._asked:
            return
        asking = self._tasks.run(
            NAME, self._supervision.check(sandbox_id), about=f'pod sandbox "{sandbox_id}"'
        )
        self._asked[sandbox_id] = asking
        asking.add_done_callback(partial(self._answered, sandbox_id))

    def _answered(self, sandbox_id: str, _asking: object) -> None:
        del self._asked[sandbox_id]
