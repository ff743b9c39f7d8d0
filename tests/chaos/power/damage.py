"""Damage of a database by hand: overwritten, emptied, cut off. It is opened, or refused, and can be repaired."""

from __future__ import annotations

import logging
import random
import tempfile
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from nodeagent import repair
from nodeagent.config import Config
from nodeagent.errors import DataLoss, IncompatibleVersion
from nodeagent.records import KINDS, Lease
from nodeagent.store import Store
from tests.unit.cri import records

PAGE = 4096
RECORDS = 60


@dataclass(slots=True)
class Tried:
    """Outcomes by name. violations: seed and number of what was no such outcome."""

    outcomes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))


def try_damages(seed: int, *, count: int, seconds: float) -> Tried:
    tried, deadline = Tried(), time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        whole = _database(Path(folder) / "whole")
        logging.disable(logging.CRITICAL)
        try:
            for number in range(count):
                if time.monotonic() > deadline:
                    break
                place = Path(folder) / str(number)
                damaged = _damaged(whole, random.Random(f"{seed}/{number}"))
                try:
                    tried.outcomes.update(_outcomes(place, damaged))
                except Exception as error:  # noqa: BLE001 whatever it is, it is not what was promised
                    tried.violations.append(f"{seed}/{number}: {type(error).__name__}: {error}")
        finally:
            logging.disable(logging.NOTSET)
    return tried


def _database(folder: Path) -> bytes:
    folder.mkdir()
    path = folder / "state.db"
    with closing(Store.open(path)) as store:
        for number in range(RECORDS):
            store.put(Lease(pod_id=str(number), addresses=("x" * 2000,), link="v", acquired_at=1))
        store.put(records.sandbox("pod"))
    return path.read_bytes()


def _damaged(whole: bytes, chance: random.Random) -> bytes:
    data = bytearray(whole)
    for _ in range(chance.choice([1, 1, 3])):
        size = chance.choice([1, 4, 100, 512, PAGE])
        places = (range(len(data) - size), range(600), range(0, len(data) - PAGE, PAGE))
        at = chance.choice(chance.choice(places))
        data[at : at + size] = chance.choice([bytes(size), b"\xa5" * size, chance.randbytes(size)])
    if chance.random() < 0.2:
        del data[chance.randrange(len(data)) :]
    return bytes(data)


def _outcomes(place: Path, damaged: bytes) -> list[str]:
    path = place / "lib/state.db"
    path.parent.mkdir(parents=True)
    path.write_bytes(damaged)
    config = Config(root=str(path.parent), state=str(place / "run"))
    try:
        with closing(Store.open(path)) as store:
            for kind in KINDS:
                store.all(kind)
        found = "opened"
    except IncompatibleVersion:  # it was the version that was overwritten
        return ["refused as newer"]
    except DataLoss as error:
        found = "refused" if "nodeagent check --repair" in str(error) else str(error)
    repair.look(config)
    assert repair.repair(config).left == 0
    assert repair.look(config).findings == []
    with closing(Store.open(path)) as store:
        lost = RECORDS - len(store.all(Lease))
    return [found, "repaired with all records" if not lost else "repaired with a loss"]
