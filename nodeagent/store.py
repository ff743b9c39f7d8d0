"""The agent's durable state: frozen records by type and key.

The records are in memory while the agent runs; the next agent reads the file. Where the records are an agent's own, a
write takes about 70 µs and never waits for a disk (`journaled`).

A record that cannot be read is not taken for one that is not there: `unreadable` has its key, so that nobody touches
what it names.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, Self, TypeVar

import msgspec

from nodeagent import database, journal, journaled
from nodeagent.database import Change, Database, table
from nodeagent.errors import Unavailable
from nodeagent.journaled import JournaledDatabase
from nodeagent.records import Record

log = logging.getLogger(__name__)

_COPIES = 100  # attempts, of some milliseconds each, to copy file and journal of an agent that runs

R = TypeVar("R", bound=Record)


class Rows(Protocol):
    """Where the records are: see `Database` and `JournaledDatabase`."""

    def write(self, changes: Sequence[Change]) -> None: ...
    def rows(self, name: str, key: str | None = None) -> list[tuple[str, bytes]]: ...
    async def settled(self) -> None: ...
    def trouble(self) -> str: ...
    def close(self) -> None: ...


class Store:
    """Records by type and key. Every method is atomic; `transaction` joins several writes into one.

    Every method raises what its rows raise: `DataLoss` for a damaged file, `Unavailable` while it cannot be had,
    `ResourceExhausted` where there is no room, and `OSError`.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._depth = 0
        self._changes: list[Change] = []
        self._unreadable: dict[type[Record], set[str]] = {}

    @classmethod
    def open(cls, path: Path, state: Path | None = None) -> Self:
        """Open or make the file. state: the directory of its journal; without one, each write waits for the file.

        Raises `DataLoss` for a damaged or foreign file, `IncompatibleVersion` for that of a newer release, and
        `Unavailable` where another program keeps it locked for `database.PATIENCE_MS`.
        """
        if state is not None:
            return cls(JournaledDatabase.open(path, state))
        return cls(Database(database.opened(path), path))

    @classmethod
    def copy_of(cls, path: Path, state: Path) -> Self:
        """A copy in memory of what an agent has in its file and journal, which are not written.

        The copy of missing files is empty. Raises as `open`.
        """
        for _ in range(_COPIES):
            before = journal.numbers(state)
            rows = Database(database.copied(path))
            changes = journaled.pending(state)
            if journal.numbers(state) == before:
                break  # else something has gone from the journal into the file, after that was copied
            rows.close()
        else:
            raise Unavailable(f"{path}: changes too fast to be copied; try again")
        if changes:
            rows.write(changes)
        return cls(rows)

    def close(self) -> None:
        self._rows.close()

    # --- writing ---

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make all writes of the block at its end, together, or none. Nested blocks join the outermost."""
        self._depth += 1
        try:
            yield
            if self._depth == 1 and self._changes:
                self._rows.write(self._changes)
                self._read_anew(self._changes)
        finally:
            self._depth -= 1
            if not self._depth:
                self._changes = []

    def put(self, record: Record) -> None:
        """Insert or replace a record."""
        with self.transaction():
            body = msgspec.json.encode(record)
            self._changes.append(Change(table(type(record)), record.key, body))

    def delete(self, kind: type[Record], key: str) -> None:
        """Delete a record, readable or not. Succeeds where there is none."""
        with self.transaction():
            self._changes.append(Change(table(kind), key, None))

    def _read_anew(self, changes: Sequence[Change]) -> None:
        """What could not be read of these is not there any more."""
        for kind, keys in self._unreadable.items():
            keys.difference_update(c.key for c in changes if c.table == table(kind))

    async def settled(self) -> None:
        """Return when all that was written is in the database's file, which is not synced. Raises why it is not."""
        await self._rows.settled()

    def trouble(self) -> str:
        """The reason why the database cannot be written, or ""."""
        return self._rows.trouble()

    # --- reading ---

    def get(self, kind: type[R], key: str) -> R | None:
        """The record with this key. None for one that cannot be read as well, which stays, and is in `unreadable`."""
        return next(iter(self._decoded(kind, self._rows.rows(table(kind), key))), None)

    def all(self, kind: type[R]) -> list[R]:
        """All records of a type, in the order of their keys. One that cannot be read stays, and is in `unreadable`."""
        return self._decoded(kind, self._rows.rows(table(kind)))

    def unreadable(self, kind: type[Record]) -> frozenset[str]:
        """The keys of those records of a type that were read and could not be: what they name may well be in use."""
        return frozenset(self._unreadable.get(kind, ()))

    def _decoded(self, kind: type[R], rows: list[tuple[str, bytes]]) -> list[R]:
        decoder = msgspec.json.Decoder(kind)
        records = []
        for key, body in rows:
            try:
                record = decoder.decode(body)
            except (msgspec.DecodeError, TypeError, UnicodeDecodeError) as error:
                self._pass_over(kind, key, error)
                continue
            if record.key == key:
                records.append(record)
            else:
                self._pass_over(kind, key, f"it is that of {record.key}")
                self._unreadable[kind].add(record.key)
        return records

    def _pass_over(self, kind: type[Record], key: str, why: object) -> None:
        self._unreadable.setdefault(kind, set()).add(key)
        log.error('%s "%s": the record cannot be read: %s', kind.__name__, key, why)
