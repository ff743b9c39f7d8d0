"""The agent's durable state: frozen records in one SQLite file.

Each record type has a table, each record a row with its key and its JSON. The records are in memory while the agent
runs; the next agent reads the file. It is used from the event loop's thread only: a write of one record takes about
50 µs (WAL, no fsync), and one that a crash of the *machine* loses belonged to a pod that is gone with it. Callers that
need more (a pulled image) sync the file system.

The loop never sleeps in SQLite for long. Where another program has locked the file (a backup, a shell), a write fails
after `database.PATIENCE_MS`, and further ones at once until one has succeeded; the error names who holds the lock. What
is in SQLite's log is copied into the database, and synced, by a thread (`checkpoints`); what is left on the loop is one
sync of the log's first page after each of these copies.

A record that cannot be read is not taken for one that is not there: `unreadable` has its key, so that nobody touches
what it names.
"""

import asyncio
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import msgspec

from nodeagent import database
from nodeagent.database import SCHEMA_VERSION, table
from nodeagent.errors import NodeAgentError
from nodeagent.records import Record
from nodeagent.tasks import to_the_end

log = logging.getLogger(__name__)

LOG_BYTES = 8 << 20  # from this size on, the log is copied into the database
LOOK_SECONDS = 5.0  # between looks at its size
_PAGES_BYTES = (
    8 << 10
)  # of the log, that a small write takes: a page of the table and one of its index

R = TypeVar("R", bound=Record)


class Store:
    """Records by type and key. Every method is atomic; `transaction` joins several into one.

    Every method raises `DataLoss` for a damaged file, `Unavailable` while another program has locked it,
    `ResourceExhausted` on a full disk, and `OSError` on a failing one. path: of the file, None in memory.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path | None = None) -> None:
        self._db = connection
        self._path = path
        self._depth = 0
        self._trouble = ""
        self._is_damaged = False
        self._is_patient = True
        self._logged_bytes = 0
        self._unreadable: dict[type[Record], set[str]] = {}

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open or make the file.

        Raises `DataLoss` for a damaged or foreign file, `IncompatibleVersion` for that of a newer release, and
        `Unavailable` where another program keeps it locked for `database.START_PATIENCE_MS`.
        """
        return cls(database.opened(path), path)

    @classmethod
    def copy_of(cls, path: Path) -> Self:
        """A copy in memory of an agent's file, which is not written, nor are the files beside it.

        The copy of a missing file is empty. Raises as `open`.
        """
        return cls(database.copied(path))

    def close(self) -> None:
        self._db.close()

    # --- writing ---

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make all writes of the block durable together, or none. Nested blocks join the outermost."""
        if self._depth == 0:
            self._write("BEGIN IMMEDIATE")
        self._depth += 1
        try:
            yield
            if self._depth == 1:
                self._write("COMMIT")
        except BaseException:
            if self._depth == 1:
                self._roll_back()
            raise
        finally:
            self._depth -= 1

    def _roll_back(self) -> None:
        """Roll back, and raise nothing: the error that led here is the one to report."""
        # After some errors SQLite has rolled back (sqlite.org/lang_transaction.html).
        with suppress(sqlite3.Error):
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        self._reuse_log()

    def put(self, record: Record) -> None:
        """Insert or replace a record."""
        self._write(
            f"INSERT OR REPLACE INTO {table(type(record))} VALUES (?, ?)",
            (record.key, msgspec.json.encode(record)),
        )
        self._unreadable.get(type(record), set()).discard(record.key)

    def delete(self, kind: type[Record], key: str) -> None:
        """Delete a record, readable or not. Succeeds where there is none."""
        self._write(f"DELETE FROM {table(kind)} WHERE key = ?", (key,))
        self._unreadable.get(kind, set()).discard(key)

    def _write(self, statement: str, parameters: tuple[object, ...] = ()) -> None:
        """Execute a statement that writes."""
        try:
            try:
                self._db.execute(statement, parameters)
            except sqlite3.OperationalError as error:
                # Within a transaction the log cannot be begun again.
                if database.code(error) != sqlite3.SQLITE_FULL or self._depth:
                    raise
                self._reuse_log()
                self._db.execute(statement, parameters)
        except database.ERRORS as error:
            raise self._noted(error) from error
        if not self._is_damaged:
            self._trouble = ""
        self._wait_for_others(True)
        self._logged_bytes += _PAGES_BYTES + sum(len(p) for p in parameters if isinstance(p, bytes))

    def _noted(self, error: Exception) -> Exception:
        """The error to raise for one of SQLite's."""
        code, translated = database.code(error), database.translated(error, self._path)
        if code in database.PASSING:
            self._wait_for_others(False)
        elif code != sqlite3.SQLITE_FULL:
            self._trouble = str(translated)
            self._is_damaged |= code in database.DAMAGED
        return translated

    def _wait_for_others(self, patient: bool) -> None:
        """Whether the next write waits for a lock: not after one that has waited in vain."""
        if patient is not self._is_patient:
            self._is_patient = patient
            with suppress(sqlite3.Error):
                self._db.execute(f"PRAGMA busy_timeout = {database.PATIENCE_MS if patient else 0}")

    def trouble(self) -> str:
        """The reason why nothing can be written, or "". Tries a write only if the last one failed.

        A full disk is no reason: freeing it needs a node that works. Damage is one that does not pass.
        """
        if self._trouble and not self._depth and not self._is_damaged:
            with suppress(NodeAgentError, OSError), self.transaction():
                self._write(f"PRAGMA user_version = {SCHEMA_VERSION}")
        return self._trouble

    # --- the log ---

    async def checkpoints(self) -> None:
        """Keep the log short, without an end: a thread copies it into the database, while the loop may write."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if self._path is not None and self._logged_bytes >= LOG_BYTES:
                logged_bytes = self._logged_bytes
                await to_the_end(None, partial(database.checkpoint, self._path))
                self._logged_bytes -= logged_bytes

    def _reuse_log(self) -> None:
        """Begin the log again, whose pages are on the disk already."""
        with suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(RESTART)")

    # --- reading ---

    def get(self, kind: type[R], key: str) -> R | None:
        """The record with this key. None for one that cannot be read as well, which stays, and is in `unreadable`."""
        rows = self._rows(f"SELECT key, body FROM {table(kind)} WHERE key = ?", (key,))
        return next(iter(self._decoded(kind, rows)), None)

    def all(self, kind: type[R]) -> list[R]:
        """All records of a type, in the order of their keys. One that cannot be read stays, and is in `unreadable`."""
        return self._decoded(kind, self._rows(f"SELECT key, body FROM {table(kind)} ORDER BY key"))

    def unreadable(self, kind: type[Record]) -> frozenset[str]:
        """The keys of those records of a type that were read and could not be: what they name may well be in use."""
        return frozenset(self._unreadable.get(kind, ()))

    def _rows(self, query: str, parameters: tuple[str, ...] = ()) -> list[tuple[str, bytes]]:
        try:
            return self._db.execute(query, parameters).fetchall()
        except database.ERRORS as error:
            raise self._noted(error) from error

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
