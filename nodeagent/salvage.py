"""Salvage of a damaged state.db: the rows that can still be read, in a new file.

Rows are looked for in every way that leads to them: through the table from both ends, and by the keys of its index.
What only the index knows is lost, and named. The damaged files are kept, in the directory for what is set aside.
"""

import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from nodeagent import database, files
from nodeagent.database import table
from nodeagent.records import KINDS, Record

Rows = dict[str, bytes]


@dataclass(slots=True)
class Salvaged:
    """The rows by kind and key, those whose record can be read; the bodies of others; the names of what is lost."""

    rows: dict[type[Record], Rows] = field(default_factory=dict)
    unreadable: dict[tuple[type[Record], str], bytes] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)


def damage(path: Path) -> str:
    """What is wrong with the pages of a database, "" for nothing. The file is not written."""
    try:
        with closing(_opened(path)) as db:
            (answer,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    except database.ERRORS as error:
        return str(error)
    return "" if answer == "ok" else " ".join(answer.split())


def read(path: Path) -> Salvaged:
    """All that can be read of a database, in whatever state it is."""
    found = Salvaged()
    with closing(_opened(path)) as db:
        for kind in KINDS:
            _read_table(db, kind, found)
    return found


def rebuild(path: Path, found: Salvaged, quarantine: Path) -> Path:
    """Replace the database by a new one with these rows; returns where the old files are.

    A crash leaves the damaged database, or the new one: never none, which would be that of a node without pods.
    """
    new = path.with_name(f"{path.name}.new")
    for suffix in ("", "-wal", "-shm", ".reserve"):
        new.with_name(new.name + suffix).unlink(missing_ok=True)
    with closing(database.opened(new)) as db:
        db.execute("BEGIN")
        for kind, rows in found.rows.items():
            db.executemany(f"INSERT INTO {table(kind)} VALUES (?, ?)", rows.items())
        db.execute("COMMIT")
    new.with_name(f"{new.name}.reserve").unlink()
    kept = quarantine / f"{path.name}-{time.time_ns()}"
    files.ensure_directory(str(kept), mode=0o700)
    for suffix in ("", "-wal"):
        old = path.with_name(path.name + suffix)
        if old.exists():
            shutil.copyfile(old, kept / old.name)
            (kept / old.name).chmod(0o600)
    os.sync()
    # The log before the database that it belongs to: SQLite would take it for the new one's.
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    files.sync_directory(str(path.parent))
    new.rename(path)
    files.sync_directory(str(path.parent))
    return kept


def _opened(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(database.reading_uri(path), uri=True, isolation_level=None)
    db.text_factory = lambda data: data.decode(errors="replace")
    return db


def _read_table(db: sqlite3.Connection, kind: type[Record], found: Salvaged) -> None:
    name, rows = table(kind), found.rows.setdefault(kind, {})
    decoder = msgspec.json.Decoder(kind)

    def take(key: object, body: object) -> None:
        if not isinstance(key, str) or not isinstance(body, bytes):
            return
        try:
            is_whole = decoder.decode(body).key == key
        except (msgspec.DecodeError, TypeError, UnicodeDecodeError):
            is_whole = False
        if is_whole:
            rows[key] = body
        else:
            found.unreadable[kind, key] = body

    for order in ("ASC", "DESC"):
        for key, body in _until_damage(db, f"SELECT key, body FROM {name} ORDER BY rowid {order}"):
            take(key, body)
    keys = {
        key
        for order in ("ASC", "DESC")
        for (key,) in _until_damage(db, f"SELECT key FROM {name} ORDER BY key {order}")
        if isinstance(key, str)
    }
    for key in sorted(keys - rows.keys() - {k for each, k in found.unreadable if each is kind}):
        got = list(_until_damage(db, f"SELECT key, body FROM {name} WHERE key = ?", key))
        if got:
            take(*got[0])
        else:
            found.lost.append(f'{kind.__name__} "{key}"')


def _until_damage(
    db: sqlite3.Connection, query: str, *parameters: str
) -> Iterator[tuple[object, ...]]:
    """The rows of a query up to the first that cannot be read."""
    try:
        yield from db.execute(query, parameters)
    except (*database.ERRORS, OverflowError):
        return
