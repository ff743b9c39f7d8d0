"""The agent's durable state: frozen records in one SQLite file.

Each record type has a table, each record a row with its key and its JSON. The records are in memory while the agent
runs; the next agent reads the file. It is used from the event loop's thread only: a write of one record takes about
50 µs (WAL, no fsync), and one that a crash of the *machine* loses belonged to a pod that is gone with it. Callers that
need more (a pulled image) call `sync`.

The file has a version (PRAGMA user_version). What a record of it may lack, or a reader pass over, leaves the version as
it is; anything else raises it, and comes with a migration. A newer one is refused, and nothing of it is touched.

The writes of stopping and removing must find room on a full disk, or nothing would ever be freed again: the database
and its log have free pages from the start, and a file beside them is removed where an agent starts on a full disk.
"""

import errno
import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Self, TypeVar

import msgspec

from nodeagent import files
from nodeagent.errors import DataLoss, IncompatibleVersion, NodeAgentError, ResourceExhausted
from nodeagent.records import KINDS, Record

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1

_MODE = 0o600
# The database is locked by another process for a moment, such as a backup.
_PASSING = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_ROOM_BYTES = 512 << 10
_RESERVE_BYTES = 4 * _ROOM_BYTES

R = TypeVar("R", bound=Record)


class Store:
    """Records by type and key. Every method is atomic; `transaction` joins several into one."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection
        self._depth = 0
        self._trouble = ""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open or make the file.

        Raises `DataLoss` for a damaged or foreign file, `IncompatibleVersion` for that of a newer release.
        """
        reserve = path.with_name(f"{path.name}.reserve")
        try:
            db = _open(path)
        except sqlite3.Error:
            # On a full disk the log and its index cannot be made: the reserve gives them room for a second attempt.
            reserve.unlink(missing_ok=True)
            try:
                db = _open(path)
            except sqlite3.Error as error:
                raise DataLoss(f"{path}: {error}") from error
        _keep_reserve(reserve)
        return cls(db)

    @classmethod
    def copy_of(cls, path: Path) -> Self:
        """A copy in memory of an agent's file, which is not written, nor are the files beside it.

        The copy of a missing file is empty. Raises as `open`.
        """
        db = sqlite3.connect(":memory:", isolation_level=None)
        try:
            if path.exists():
                _read(path, db)
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
        if (
            self._db.in_transaction
        ):  # after some errors SQLite has rolled back (sqlite.org/lang_transaction.html)
            self._db.execute("ROLLBACK")
        self._reuse_log()

    def put(self, record: Record) -> None:
        """Insert or replace a record."""
        self._write(
            f"INSERT OR REPLACE INTO {_table(type(record))} VALUES (?, ?)",
            (record.key, msgspec.json.encode(record)),
        )

    def delete(self, kind: type[Record], key: str) -> None:
        """Delete a record. Succeeds where there is none."""
        self._write(f"DELETE FROM {_table(kind)} WHERE key = ?", (key,))

    def _write(self, statement: str, parameters: tuple[object, ...] = ()) -> None:
        """Execute a statement that writes. Raises ResourceExhausted on a full disk, OSError on a failing one."""
        try:
            try:
                self._db.execute(statement, parameters)
            except sqlite3.OperationalError as error:
                # Within a transaction the log cannot be begun again.
                if error.sqlite_errorcode != sqlite3.SQLITE_FULL or self._depth:
                    raise
                self._reuse_log()
                self._db.execute(statement, parameters)
            self._trouble = ""
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise ResourceExhausted(f"state.db: {error}") from error
            if error.sqlite_errorcode not in _PASSING:
                self._trouble = f"state.db: {error}"
            raise OSError(errno.EIO, f"state.db: {error}") from error

    def trouble(self) -> str:
        """The reason why nothing can be written, or "". Tries a write only if the last one failed.

        A full disk is no reason: freeing it needs a node that works.
        """
        if self._trouble and not self._depth:
            with suppress(NodeAgentError, OSError, sqlite3.Error), self.transaction():
                self._write(f"PRAGMA user_version = {SCHEMA_VERSION}")
        return self._trouble

    def _reuse_log(self) -> None:
        """Begin the log again, whose pages are on the disk already."""
        with suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(RESTART)")

    def get(self, kind: type[R], key: str) -> R | None:
        row = self._db.execute(f"SELECT body FROM {_table(kind)} WHERE key = ?", (key,)).fetchone()
        return msgspec.json.decode(row[0], type=kind) if row else None

    def all(self, kind: type[R]) -> list[R]:
        """All records of a type, in the order of their keys. One that cannot be read is skipped, and stays."""
        rows = self._db.execute(f"SELECT key, body FROM {_table(kind)} ORDER BY key")
        decoder = msgspec.json.Decoder(kind)
        records = []
        for key, body in rows:
            try:
                records.append(decoder.decode(body))
            except msgspec.DecodeError as error:
                log.error('%s "%s": the record cannot be read: %s', kind.__name__, key, error)
        return records


def _open(path: Path) -> sqlite3.Connection:
    _make_private(path)
    db = sqlite3.connect(path, isolation_level=None)
    try:
        _prepare(db, path)
        _make_room(db)
    except BaseException:
        db.close()
        raise
    return db


def _read(path: Path, target: sqlite3.Connection) -> None:
    """Copy the database at `path` into `target` without writing beside it."""
    # Without a log no process writes; opening it otherwise would make one (sqlite.org/wal.html, "Read-Only Databases").
    alone = "" if path.with_name(f"{path.name}-wal").exists() else "&immutable=1"
    uri = f"{path.absolute().as_uri()}?mode=ro{alone}"
    with closing(sqlite3.connect(uri, uri=True)) as source:
        source.backup(target)


def _make_private(path: Path) -> None:
    """Make the file with a private mode, which SQLite then gives to its log and index as well.

    An existing database is not opened for this: closing it would drop the POSIX locks of all its connections
    (fcntl(2)).
    """
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE))
    for suffix in ("", "-wal", "-shm"):
        files.narrow(f"{path}{suffix}", _MODE)


def _make_room(db: sqlite3.Connection) -> None:
    """Write pages and free them: they stay in both files, and are used again."""
    with suppress(sqlite3.Error):
        db.execute("CREATE TABLE IF NOT EXISTS room (body BLOB)")
        db.execute("INSERT INTO room VALUES (zeroblob(?))", (_ROOM_BYTES,))
        db.execute("PRAGMA wal_checkpoint(RESTART)")
        db.execute("DELETE FROM room")
        db.execute("PRAGMA wal_checkpoint(RESTART)")


def _keep_reserve(path: Path) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, _MODE)
    try:
        os.posix_fallocate(file, 0, _RESERVE_BYTES)
    except OSError as error:
        log.warning("%s: %s", path, error.strerror)
    finally:
        os.close(file)


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise IncompatibleVersion(
            f"{path}: schema {version} is newer than {SCHEMA_VERSION}, the newest that this release understands; "
            "install the release of the agent that wrote it"
        )
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    for kind in KINDS:
        db.execute(
            f"CREATE TABLE IF NOT EXISTS {_table(kind)} (key TEXT PRIMARY KEY, body BLOB NOT NULL)"
        )
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _table(kind: type[Record]) -> str:
    return f"record_{kind.__name__.lower()}"
