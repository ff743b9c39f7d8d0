"""Products that forget to sync: what a harness for power losses must find, or it finds nothing."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import nodeagent
from tests.chaos.power.losses import try_losses
from tests.chaos.power.walk import agent_of, walked
from tests.support.registry import Registry

# File, text, and what stands there instead.
DEFECTS = {
    "layers are recorded before they are synced": (
        "images/catalog.py",
        "if self._layers.unrecorded(plan.chain_ids):\n            await self._sync()",
        "",
    ),
    "a pull is answered before its record is synced": (
        "images/catalog.py",
        "            await self._sync()\n            if self._unsynced.get(image.id) is owed:",
        "            if self._unsynced.get(image.id) is owed:",
    ),
    "the log is copied into the database without a sync": (
        "database.py",
        'db.execute("PRAGMA wal_autocheckpoint = 0")  # see `Database.shorten_log`',
        'db.execute("PRAGMA synchronous = OFF"); db.execute("PRAGMA wal_autocheckpoint = 2")',
    ),
}


async def is_found(defect: str, folder: Path, registry: Registry) -> bool:
    """Whether a walk of eight steps on a product with this defect leads to a violation."""
    file, text, instead = DEFECTS[defect]
    code = folder / "code"
    shutil.copytree(Path(nodeagent.__file__).parent, code / "nodeagent")
    source = (code / "nodeagent" / file).read_text()
    assert source.count(text) == 1
    (code / "nodeagent" / file).write_text(source.replace(text, instead))
    with agent_of(folder, registry, code) as agent:
        recording = walked(agent, registry, folder, 8, random.Random(0))
    found = await try_losses(recording, chance=random.Random(0), states=6, seconds=60)
    return bool(found.violations)
