"""The agent's durable state: frozen records in one SQLite file.

One table a record type, one row a record: its key and its JSON. The records live in memory while the agent runs; the
file is what the next agent reads. It is used from the event loop's thread only: a write of one record takes about
50 µs (WAL, no fsync), and one that a crash of the *machine* loses belonged to a pod that is gone with it. Whoever
needs more (a pulled image) calls `sync`.

What is written to stop and to remove must find room on a full disk, or nothing would ever be freed again: the database
and its log have free pages from the start, and a file beside them gives way where an agent starts on a full disk.
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
from nodeagent.errors import DataLoss, NodeAgentError, ResourceExhausted
from nodeagent.records import KINDS, Record

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1

_MODE = 0o600
# Others hold the database: who reads it for a moment, a backup for one.
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
        """Open or make the file; raises `DataLoss` where it is none of ours, or a newer agent's."""
        reserve = path.with_name(f"{path.name}.reserve")
        try:
            db = _open(path)
        except sqlite3.Error:
            reserve.unlink(missing_ok=True)
            try:
                db = _open(path)
            except sqlite3.Error as error:
                raise DataLoss(f"{path}: {error}") from error
        _keep_reserve(reserve)
        return cls(db)

    @classmethod
    def copy_of(cls, path: Path) -> Self:
        """A copy, in memory, of the file of an agent: neither it nor what is beside it is written.

        One that is not there has nothing. Raises `DataLoss` as `open`.
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
        """All writes inside become durable together, or none does. Nested ones join the outermost."""
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
        if self._db.in_transaction:  # SQLite may have done so by itself
            self._db.execute("ROLLBACK")
        self._reuse_log()

    def put(self, record: Record) -> None:
        """Insert or replace."""
        self._write(
            f"INSERT OR REPLACE INTO {_table(type(record))} VALUES (?, ?)",
            (record.key, msgspec.json.encode(record)),
        )

    def delete(self, kind: type[Record], key: str) -> None:
        """Forget a record; one that is not there is forgotten already."""
        self._write(f"DELETE FROM {_table(kind)} WHERE key = ?", (key,))

    def _write(self, statement: str, parameters: tuple[object, ...] = ()) -> None:
        """Raises ResourceExhausted on a full disk, and OSError on one that fails."""
        try:
            try:
                self._db.execute(statement, parameters)
            except sqlite3.OperationalError as error:
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
        """Why nothing can be written; "" where it can be. Only after a failure it tries again.

        A full disk is not among the reasons: what frees it needs a node that works.
        """
        if self._trouble and not self._depth:
            with suppress(NodeAgentError, OSError, sqlite3.Error), self.transaction():
                self._write(f"PRAGMA user_version = {SCHEMA_VERSION}")
        return self._trouble

    def _reuse_log(self) -> None:
        """Have the log written from its beginning again, where it has room."""
        with suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(RESTART)")

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
    """Without a log beside it nobody writes; to look for one would make one (sqlite.org/wal.html, "Read-Only")."""
    alone = "" if path.with_name(f"{path.name}-wal").exists() else "&immutable=1"
    uri = f"{path.absolute().as_uri()}?mode=ro{alone}"
    with closing(sqlite3.connect(uri, uri=True)) as source:
        source.backup(target)


def _make_private(path: Path) -> None:
    """SQLite gives its log and index the mode that it finds on the database.

    A database that is there is not opened for this: to close it would drop the locks of other connections to it.
    """
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE))
    for suffix in ("", "-wal", "-shm"):
        files.narrow(f"{path}{suffix}", _MODE)


def _make_room(db: sqlite3.Connection) -> None:
    """Pages once written stay in both files, and are used again."""
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
