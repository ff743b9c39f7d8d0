"""`nodeagent check --data` and `--repair`: whether the agent's files are whole, and what to do with those that are not.

What is damaged is named. `repair` sets it aside, in the directory ``quarantine`` of the root, and takes it out of the
records, so that the next pull fetches it again; nothing is deleted, as a container that runs may use it. It takes the
locks of an agent: none may run meanwhile.
"""

import json
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from nodeagent import files, salvage
from nodeagent.config import Config
from nodeagent.errors import DataLoss, NodeAgentError
from nodeagent.images import verification
from nodeagent.images.reference import is_digest
from nodeagent.images.verification import Damaged
from nodeagent.lifecycle.places import Places
from nodeagent.records import KINDS, Layer, Record
from nodeagent.store import Store
from nodeagent.trash import QUARANTINE, set_aside


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A damaged thing. done: what was done about it, "" where it only was looked at."""

    name: str
    why: str
    done: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.why}" + (f"; {self.done}" if self.done else "")


@dataclass(slots=True)
class Report:
    """What was looked at, by kind, and what was found. left: damage that is still there."""

    checked: dict[str, int]
    findings: list[Finding]

    @property
    def left(self) -> int:
        return sum(not finding.done for finding in self.findings)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.checked.items())
        return f"checked {counts}: {len(self.findings)} damaged, {self.left} left as they are"


def look(config: Config) -> Report:
    """Verify everything, and change nothing. An agent may run."""
    places = Places.of(config)
    report = Report({}, [])
    _look_at_database(places, report)
    with suppress(DataLoss), closing(Store.copy_of(places.database, places.journal)) as store:
        for damaged in _look_at_files(places.root, store, report):
            if _still_recorded(places, damaged):
                report.findings.append(_finding(places.root, damaged))
    _look_at_state(places, report)
    return report


def repair(config: Config) -> Report:
    """Verify everything, and set aside what is damaged. Raises AlreadyExists where an agent runs."""
    places = Places.of(config)
    report = Report({}, [])
    with places.owned():
        quarantine = places.root / QUARANTINE
        _repair_database(places, quarantine, report)
        with closing(Store.open(places.database, places.journal)) as store:
            for damaged in list(_look_at_files(places.root, store, report)):
                _set_aside(places.root, store, damaged, quarantine, report)
        files.sync_directory(str(places.root))
        _look_at_state(places, report)
    return report


# --- the database ---


def _look_at_database(places: Places, report: Report) -> None:
    path = places.database
    report.checked["records"] = 0
    if not path.exists():
        return
    if why := salvage.damage(path):
        report.findings.append(Finding(name=path.name, why=why))
        return
    try:
        with closing(Store.copy_of(path, places.journal)) as store:
            report.checked["records"] = sum(len(store.all(kind)) for kind in KINDS)
            for kind in KINDS:
                for key in sorted(store.unreadable(kind)):
                    report.findings.append(Finding(name=_named(kind, key), why=_UNREADABLE))
    except NodeAgentError as error:
        report.findings.append(Finding(name=path.name, why=str(error)))


_UNREADABLE = "its record cannot be read"


def _repair_database(places: Places, quarantine: Path, report: Report) -> None:
    path = places.database
    report.checked["records"] = 0
    if not path.exists():
        return
    with suppress(DataLoss):
        # Raises IncompatibleVersion: of a newer file nothing is touched.
        Store.copy_of(path, places.journal).close()
    found = salvage.read(path)
    report.checked["records"] = sum(map(len, found.rows.values()))
    for (kind, key), body in found.unreadable.items():
        copy = quarantine / f"{kind.__name__}-{key.replace('/', '_')[:100]}.json"
        files.ensure_directory(str(quarantine), mode=0o700)
        files.write_atomic(str(copy), body, mode=0o600)
        done = f"removed, a copy is {copy}"
        report.findings.append(Finding(name=_named(kind, key), why=_UNREADABLE, done=done))
    if why := salvage.damage(path):
        kept = salvage.rebuild(path, found, quarantine)
        done = f"made anew with {report.checked['records']} records, the old one is in {kept}"
        report.findings.append(Finding(name=path.name, why=why, done=done))
        for name in found.lost:
            report.findings.append(Finding(name=name, why="its record is lost", done="forgotten"))
    with closing(Store.open(path, places.journal)) as store:
        for kind, key in found.unreadable:
            if store.get(kind, key) is None:  # the journal may have a later state of it
                store.delete(kind, key)
        known = {layer.chain_id for layer in store.all(Layer)}
    # Without a record an agent removes them, under the containers that run on them.
    for directory in list((places.root / "layers").glob("*")):
        chain_id = f"sha256:{directory.name}"
        if is_digest(chain_id) and chain_id not in known:
            set_aside(directory, quarantine)


def _named(kind: type[Record], key: str) -> str:
    return f'{kind.__name__} "{key}"'


# --- files ---


def _look_at_files(root: Path, store: Store, report: Report) -> Iterator[Damaged]:
    kinds = {
        "documents": verification.documents(root),
        "layers": verification.layers(root, store),
    }
    for kind, checks in kinds.items():
        report.checked[kind] = 0
        for _, damaged in checks:
            report.checked[kind] += 1
            if damaged is not None:
                yield damaged


def _still_recorded(places: Places, damaged: Damaged) -> bool:
    """Whether an agent that runs has not removed it meanwhile."""
    if not damaged.layer:
        return damaged.path.exists()
    with closing(Store.copy_of(places.database, places.journal)) as store:
        return store.get(Layer, damaged.layer) is not None


def _finding(root: Path, damaged: Damaged, done: str = "") -> Finding:
    images = f" (of image {', '.join(damaged.images)})" if damaged.images else ""
    return Finding(name=f"{damaged.path.relative_to(root)}{images}", why=damaged.why, done=done)


def _set_aside(
    root: Path, store: Store, damaged: Damaged, quarantine: Path, report: Report
) -> None:
    """The record first: what is left of a crash between is a directory that no record has, which an agent removes."""
    if damaged.layer:
        store.delete(Layer, damaged.layer)
    try:
        done = f"is in {set_aside(damaged.path, quarantine)}, the next pull fetches it again"
    except FileNotFoundError:
        done = "the next pull fetches it again"
    report.findings.append(_finding(root, damaged, done))


# --- the state directory ---


def _look_at_state(places: Places, report: Report) -> None:
    """The files that a successor of a supervisor reads. The agent ends what it cannot take over."""
    paths = sorted(
        path
        for pattern in ("*/pod.json", "*/containers/*/state.json", "*/containers/*/plan.json")
        for path in places.pods.glob(pattern)
    )
    report.checked["files of pods"] = len(paths)
    for path in paths:
        try:
            is_whole = isinstance(json.loads(path.read_bytes()), dict)
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            is_whole = False
        if not is_whole:
            report.findings.append(Finding(name=str(path), why="it cannot be read"))
