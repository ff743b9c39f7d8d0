"""The database of the store: SQLite with a write-ahead log, its version, its room on a full disk, and its errors.

Each record type has a table, each record a row with its key and its JSON. A write is not synced: one that a crash of
the *machine* loses belonged to a pod that is gone with it, and callers that need more sync the file system.

The file has a version (PRAGMA user_version). What a record of it may lack, or a reader pass over, leaves the version as
it is; anything else raises it, and comes with a migration. A newer one is refused, and nothing of it is touched.

The writes of stopping and removing must find room on a full disk, or nothing would ever be freed again: the database
and its log have free pages from the start, and a file beside them is removed where an agent starts on a full disk.

A damaged file is refused when it is opened, with the command that repairs it: an agent does not half serve.
"""

import errno
import logging
import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from nodeagent import files
from nodeagent.errors import DataLoss, IncompatibleVersion, ResourceExhausted, Unavailable
from nodeagent.linux import locks
from nodeagent.records import KINDS, Record

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
# Of a file that an agent has open which keeps changes elsewhere at first. Every release reads it, as the first ones
# wrote no version; and those that know of nothing else write theirs.
JOURNALED = 0
PATIENCE_MS = 5000  # with the lock of another program
LOG_BYTES = 8 << 20  # from this size on, the log is copied into the database
REMEDY = "stop the agent and run `nodeagent check --repair`"

# The database is locked by another program for a moment, such as a backup.
PASSING = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
ERRORS = (sqlite3.Error, UnicodeDecodeError)
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

_MODE = 0o600
_ROOM_BYTES = 512 << 10
_RESERVE_BYTES = 4 * _ROOM_BYTES
# Of the log, that a small write takes: a page of the table and one of its index.
_PAGES_BYTES = 8 << 10


class Change(NamedTuple):
    """A row that is inserted or replaced; without a body one that is deleted, if it is there."""

    table: str
    key: str
    body: bytes | None


class Database:
    """Rows by table and key, in a file, or in memory where there is no path.

    Every method raises `DataLoss` for a damaged file, `Unavailable` while another program has locked it for
    `PATIENCE_MS`, `ResourceExhausted` on a full disk, and `OSError` on a failing one.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path | None = None) -> None:
        self.path = path
        self._db = connection
        self._logged_bytes = 0

    def write(self, changes: Sequence[Change]) -> None:
        """Make all changes, or none."""
        try:
            try:
                self._execute(changes)
            except sqlite3.OperationalError as error:
                if code(error) != sqlite3.SQLITE_FULL:
                    raise
                # Begin the log again, whose pages are on the disk already.
                with suppress(sqlite3.Error):
                    self._db.execute("PRAGMA wal_checkpoint(RESTART)")
                self._execute(changes)
        except ERRORS as error:
            raise translated(error, self.path) from error
        self._logged_bytes += sum(_PAGES_BYTES + len(change.body or b"") for change in changes)

    def _execute(self, changes: Sequence[Change]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for name, key, body in changes:
                if body is None:
                    self._db.execute(f"DELETE FROM {name} WHERE key = ?", (key,))
                else:
                    self._db.execute(f"INSERT OR REPLACE INTO {name} VALUES (?, ?)", (key, body))
            self._db.execute("COMMIT")
        except BaseException:
            # After some errors SQLite has rolled back (sqlite.org/lang_transaction.html).
            with suppress(sqlite3.Error):
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
            raise

    def rows(self, name: str, key: str | None = None) -> list[tuple[str, bytes]]:
        """All rows of a table, or the one with this key."""
        where, parameters = ("", ()) if key is None else (" WHERE key = ?", (key,))
        try:
            return self._db.execute(
                f"SELECT key, body FROM {name}{where} ORDER BY key", parameters
            ).fetchall()
        except ERRORS as error:
            raise translated(error, self.path) from error

    def shorten_log(self) -> None:
        """Copy the log into the file and sync both, if it is long."""
        if self._logged_bytes >= LOG_BYTES:
            with suppress(sqlite3.Error):
                self._db.execute("PRAGMA wal_checkpoint(PASSIVE)")
            self._logged_bytes = 0

    def mark(self, version: int) -> None:
        """Give the file this version, if that can be written."""
        with suppress(sqlite3.Error):
            self._db.execute(f"PRAGMA user_version = {version}")

    async def settled(self) -> None:
        """Return at once: a write that has returned is in the file."""

    def trouble(self) -> str:
        """Return "": each write raises what hinders it."""
        return ""

    def close(self) -> None:
        self._db.close()


def opened(path: Path, version: int = SCHEMA_VERSION) -> sqlite3.Connection:
    """A connection to the file, which is made if need be and gets this version, for one thread at a time.

    Raises `DataLoss` for a damaged or foreign file, `IncompatibleVersion` for that of a newer release, and
    `Unavailable` where another program keeps it locked for `PATIENCE_MS`.
    """
    reserve = path.with_name(f"{path.name}.reserve")
    try:
        db = _open(path, version)
    except ERRORS as error:
        if code(error) in (*PASSING, *DAMAGED):
            raise translated(error, path) from error
        # On a full disk the log and its index cannot be made: the reserve gives them room for a second attempt.
        reserve.unlink(missing_ok=True)
        try:
            db = _open(path, version)
        except ERRORS as again:
            raise translated(again, path, opening=True) from again
    _keep_reserve(reserve)
    return db


def copied(path: Path) -> sqlite3.Connection:
    """A copy of the file in memory; see `Store.copy_of`."""
    db = sqlite3.connect(":memory:", isolation_level=None)
    try:
        if path.exists():
            _read(path, db)
        _prepare(db, path, SCHEMA_VERSION)
    except ERRORS as error:
        db.close()
        raise translated(error, path, opening=True) from error
    except BaseException:
        db.close()
        raise
    return db


def version_of(path: Path) -> int:
    """The version of the file, 0 where there is none. Raises what SQLite does."""
    if not path.exists():
        return 0
    with closing(sqlite3.connect(reading_uri(path), uri=True, timeout=PATIENCE_MS / 1000)) as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
    return int(version)


def reading_uri(path: Path) -> str:
    """The URI by which SQLite reads a database without making files beside it."""
    # Without a log no process writes; opening it otherwise would make one (sqlite.org/wal.html, "Read-Only Databases").
    alone = "" if path.with_name(f"{path.name}-wal").exists() else "&immutable=1"
    return f"{path.absolute().as_uri()}?mode=ro{alone}"


def table(kind: type[Record]) -> str:
    return f"record_{kind.__name__.lower()}"


# --- errors ---


def code(error: Exception) -> int:
    """The primary result code, 0 of an error that is not SQLite's (sqlite.org/rescode.html)."""
    if isinstance(error, UnicodeDecodeError):  # of a message that quotes the file
        return sqlite3.SQLITE_CORRUPT
    number: int = getattr(error, "sqlite_errorcode", 0)
    return number & 0xFF


def translated(error: Exception, path: Path | None, *, opening: bool = False) -> Exception:
    """The error of ours for one of SQLite's. path: of the file, None in memory.

    opening: a statement that SQLite does not understand then is none of ours, but one of the schema in the file.
    """
    name, number = path or "state.db", code(error)
    if number in PASSING:
        return Unavailable(f"{name}: {error}{_by_whom(path)}; end that program")
    if number == sqlite3.SQLITE_FULL:
        return ResourceExhausted(f"{name}: {error}")
    if number in DAMAGED or (opening and number == sqlite3.SQLITE_ERROR):
        return DataLoss(f"{name}: {error}; {REMEDY}")
    if path is not None and _is_on_read_only(path):
        return OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
    return OSError(errno.EIO, f"{name}: {error}")


def _is_on_read_only(path: Path) -> bool:
    """Whether that is what SQLite calls an I/O error: a file system that fails becomes read-only.

    It is tried, because ext4 does not tell it in statvfs(2) then.
    """
    try:
        os.close(os.open(path.parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EROFS
    return False


def _by_whom(path: Path | None) -> str:
    """The holder of the lock, for a message. In WAL mode it is one of the log's index (sqlite.org/walformat.html)."""
    if path is None:
        return ""
    pids = [pid for suffix in ("-shm", "") for pid in locks.holders(f"{path}{suffix}")]
    return f" by {locks.described(pids[0])}" if pids else " by another program"


# --- the file ---


def _open(path: Path, version: int) -> sqlite3.Connection:
    _make_private(path)
    db = sqlite3.connect(
        path, isolation_level=None, timeout=PATIENCE_MS / 1000, check_same_thread=False
    )
    try:
        _prepare(db, path, version)
        _verify(db, path)
        db.execute("PRAGMA wal_autocheckpoint = 0")  # see `Database.shorten_log`
        _make_room(db)
    except BaseException:
        db.close()
        raise
    return db


def _read(path: Path, target: sqlite3.Connection) -> None:
    """Copy the database at `path` into `target` without writing beside it."""
    with closing(sqlite3.connect(reading_uri(path), uri=True)) as source:
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


def _verify(db: sqlite3.Connection, path: Path) -> None:
    """Read every page: it is better not to start than to stop in the middle."""
    (answer,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if answer != "ok":
        raise DataLoss(f"{path}: {' '.join(answer.split())}; {REMEDY}")


def _prepare(db: sqlite3.Connection, path: Path, version: int) -> None:
    (found,) = db.execute("PRAGMA user_version").fetchone()
    if found > SCHEMA_VERSION:
        raise IncompatibleVersion(
            f"{path}: schema {found} is newer than {SCHEMA_VERSION}, the newest that this release understands; "
            "install the release of the agent that wrote it"
        )
    db.text_factory = lambda data: data.decode(errors="replace")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    for kind in KINDS:
        db.execute(
            f"CREATE TABLE IF NOT EXISTS {table(kind)} (key TEXT PRIMARY KEY, body BLOB NOT NULL)"
        )
    db.execute(f"PRAGMA user_version = {version}")
