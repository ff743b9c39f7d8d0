"""The agent's durable state: frozen records in one SQLite file.

One table a record type, one row a record: its key and its JSON. The records live in memory while the agent runs; the
file is what the next agent reads. It is used from the event loop's thread only: a write of one record takes about
50 µs (WAL, no fsync), and one that a crash of the *machine* loses belonged to a pod that is gone with it. Whoever
needs more (a pulled image) calls `sync`.
"""

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self, TypeVar

import msgspec

from nodeagent.errors import DataLoss
from nodeagent.records import KINDS, Record

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1

R = TypeVar("R", bound=Record)


class Store:
    """Records by type and key. Every method is atomic; `transaction` joins several into one."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection
        self._depth = 0

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open or make the file; raises `DataLoss` where it is none of ours, or a newer agent's."""
        try:
            db = sqlite3.connect(path, isolation_level=None)
        except sqlite3.Error as error:
            raise DataLoss(f"{path}: {error}") from error
        try:
            _prepare(db, path)
        except sqlite3.Error as error:
            db.close()
            raise DataLoss(f"{path}: {error}") from error
        except BaseException:
            db.close()
            raise
        return cls(db)

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes inside become durable together, or none does. Nested ones join the outermost."""
        if self._depth == 0:
            self._db.execute("BEGIN IMMEDIATE")
        self._depth += 1
        try:
            yield
        except BaseException:
            self._depth -= 1
            if self._depth == 0:
                self._db.execute("ROLLBACK")
            raise
        self._depth -= 1
        if self._depth == 0:
            self._db.execute("COMMIT")

    def put(self, record: Record) -> None:
        """Insert or replace."""
        self._db.execute(
            f"INSERT OR REPLACE INTO {_table(type(record))} VALUES (?, ?)",
            (record.key, msgspec.json.encode(record)),
        )

    def delete(self, kind: type[Record], key: str) -> None:
        """Forget a record; one that is not there is forgotten already."""
        self._db.execute(f"DELETE FROM {_table(kind)} WHERE key = ?", (key,))

    def get(self, kind: type[R], key: str) -> R | None:
        row = self._db.execute(f"SELECT body FROM {_table(kind)} WHERE key = ?", (key,)).fetchone()
        return msgspec.json.decode(row[0], type=kind) if row else None

    def all(self, kind: type[R]) -> list[R]:
        """Every record of a type, in the order of its keys; one that cannot be read is passed over, and stays."""
        rows = self._db.execute(f"SELECT key, body FROM {_table(kind)} ORDER BY key")
        decoder = msgspec.json.Decoder(kind)
        records = []
        for key, body in rows:
            try:
                records.append(decoder.decode(body))
            except msgspec.DecodeError as error:
                log.error('%s "%s": the record cannot be read: %s', kind.__name__, key, error)
        return records

    def sync(self) -> None:
        """Return once everything written so far would survive a power cut."""
        self._db.execute("PRAGMA wal_checkpoint(FULL)")


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise DataLoss(f"{path}: schema {version} is newer than this agent's {SCHEMA_VERSION}")
    for kind in KINDS:
        db.execute(
            f"CREATE TABLE IF NOT EXISTS {_table(kind)} (key TEXT PRIMARY KEY, body BLOB NOT NULL)"
        )
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _table(kind: type[Record]) -> str:
    return f"record_{kind.__name__.lower()}"
