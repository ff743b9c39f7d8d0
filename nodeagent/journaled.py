"""A database that is written behind its callers: their changes are in a journal when a write returns.

A thread takes what has come to the journal and writes it into the database, all of it in one transaction, until that
succeeds. So the event loop never waits for a disk: not for a slow one, a full or a frozen one (a snapshot), nor for a
program that has locked the file (a backup). Of a record that changes several times within a moment, the database gets
the last state alone.

What is in the journal and not in the database yet counts as written: it is read as if it were there, and the next
agent finds it. Callers that need more than that, because the power may fail, wait for `settled`.
"""

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Self

import msgspec

from nodeagent import database, journal
from nodeagent.database import Change, Database
from nodeagent.errors import NodeAgentError, ResourceExhausted, Unavailable
from nodeagent.journal import Journal
from nodeagent.records import KINDS

log = logging.getLogger(__name__)

MOST_BYTES = 64 << 20  # of the journal, which is in memory
LATE_SECONDS = 30.0  # what takes longer is trouble
CLOSE_SECONDS = 5.0
# What follows within this time goes into the database with it.
_PAUSE_SECONDS = 0.05
_FIRST_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 0.1, 5.0

_TABLES = {database.table(kind) for kind in KINDS}

Rows = dict[tuple[str, str], bytes | None]


class JournaledDatabase:
    """Rows by table and key, with the methods of `Database`.

    `write` raises `ResourceExhausted` where the journal has no room, and `Unavailable` once MOST_BYTES of changes wait.
    """

    def __init__(self, target: Database, changes: Journal) -> None:
        self._database = target
        self._journal = changes
        # What follows is shared with the thread.
        self._changed = threading.Condition()
        earlier, latest = (_rows(entries) for entries in changes.earlier)
        self._batch, self._recent = earlier, latest  # in the journal's complete and current file
        self._appended = len(earlier) + len(latest)
        self._batch_end, self._written = len(earlier), 0  # as `_appended` counts
        self._waiting: list[tuple[int, Future[None]]] = []
        self._is_idle = self._is_closing = self._is_left = False
        self._failure: Exception | None = None  # of the last attempt
        self._began: float | None = None  # the attempt that is under way
        if not earlier:  # there may be entries that cannot be read
            changes.empty()
        self._thread = threading.Thread(target=self._run, name="database", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, path: Path, directory: Path) -> Self:
        """Open or make the file, and the journal in a directory. Raises as `database.opened` and `Journal.open`."""
        changes = Journal.open(directory)
        if any(changes.earlier) and _has_version(path):
            log.error(
                "%s: a release that knows no journal has written it since; what is in %s is dropped",
                path,
                directory,
            )
            changes.forget()
        try:
            target = Database(database.opened(path, database.JOURNALED), path)
        except BaseException:
            changes.close()
            raise
        try:
            return cls(target, changes)
        except BaseException:
            changes.close()
            target.close()
            raise

    # --- for the event loop ---

    def write(self, changes: Sequence[Change]) -> None:
        """Make all changes, or none."""
        entry = msgspec.msgpack.encode(changes)
        with self._changed:
            if self._journal.size_bytes + len(entry) > MOST_BYTES:
                raise Unavailable(
                    f"{self._hindrance()}; {MOST_BYTES >> 20} MiB of changes wait for it in memory"
                )
            self._journal.append(entry)
            self._recent.update(((name, key), body) for name, key, body in changes)
            self._appended += 1
            if self._is_idle:
                self._is_idle = False
                self._changed.notify()

    def rows(self, name: str, key: str | None = None) -> list[tuple[str, bytes]]:
        """All rows of a table, or the one with this key, by their keys. Waits for a write that is under way."""
        with self._changed:
            pending = {**self._batch, **self._recent}
        stored = self._database.rows(name, key)
        new = {each: body for (of, each), body in pending.items() if of == name}
        rows = [row for row in stored if row[0] not in new]
        for each, body in new.items():
            if body is not None and key in (None, each):
                rows.append((each, body))
        return sorted(rows, key=lambda row: str(row[0]))

    async def settled(self) -> None:
        """Return when all that was written is in the database's file, which is not synced. Raises why it is not."""
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # a caller that is cancelled leaves it to the thread
        with self._changed:
            if self._written == self._appended:
                return
            self._waiting.append((self._appended, done))
            self._changed.notify()
        await asyncio.wrap_future(done)

    def trouble(self) -> str:
        """The reason why the database cannot be written, or "".

        A full disk is none: freeing it needs a node that works. Nor is the lock of another program, such as a backup.
        """
        with self._changed:
            is_passing = isinstance(self._failure, ResourceExhausted | Unavailable)
            return self._late() or ("" if is_passing else str(self._failure or ""))

    def close(self) -> None:
        """Write what has not been written; after CLOSE_SECONDS it is left to the next agent."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            log.warning("%s; the next agent writes it", self._hindrance())
            with self._changed:
                self._is_left = True
            return
        if self._written == self._appended:
            self._database.mark(database.SCHEMA_VERSION)
            self._journal.remove()
        self._journal.close()
        self._database.close()

    # --- for the thread ---

    def _run(self) -> None:
        while self._has_batch():
            pause = _FIRST_RETRY_SECONDS
            while not self._is_batch_written():
                with self._changed:
                    if self._changed.wait_for(lambda: self._is_closing, pause):
                        return
                pause = min(2 * pause, _LONGEST_RETRY_SECONDS)
            self._began = time.monotonic()  # it syncs, for which alone a hung disk is waited for
            self._database.shorten_log()
            self._began = None

    def _has_batch(self) -> bool:
        """Wait for changes and take them; False at the end."""
        with self._changed:
            if not self._batch:
                self._is_idle = True
                self._changed.wait_for(lambda: self._recent or self._is_closing)
                self._is_idle = False
                if not self._recent or self._is_left:
                    return False
                self._changed.wait_for(lambda: self._waiting or self._is_closing, _PAUSE_SECONDS)
                self._journal.turn()
                self._batch, self._recent = self._recent, {}
                self._batch_end = self._appended
            return True

    def _is_batch_written(self) -> bool:
        failure: Exception | None = None
        self._began = time.monotonic()
        try:
            self._database.write([Change(*of, body) for of, body in self._batch.items()])
            with self._changed:
                if not self._is_left:  # the journal is that of another from then on
                    self._journal.empty()  # if this fails, all is written once more, which changes nothing
        except Exception as error:  # noqa: BLE001 whatever it is, the thread goes on
            failure = error
        with self._changed:
            self._note(failure)
            if failure is None:
                self._batch, self._written = {}, self._batch_end
            # What came later cannot be written either while this fails.
            reached = self._batch_end if failure is None else self._appended
            for waiting in [each for each in self._waiting if each[0] <= reached]:
                self._waiting.remove(waiting)
                if failure is None:
                    waiting[1].set_result(None)
                else:
                    waiting[1].set_exception(failure)
        return failure is None

    def _note(self, failure: Exception | None) -> None:
        """Keep the outcome of an attempt, and log one that is not like the last; the lock is held."""
        if failure is not None and str(failure) != str(self._failure):
            is_expected = isinstance(failure, NodeAgentError | OSError)
            log.error("%s: it is tried again", failure, exc_info=None if is_expected else failure)
        self._failure, self._began = failure, None

    def _hindrance(self) -> str:
        late = self._late() or str(self._failure or "")
        return late or f"{self._database.path}: is written slowly"

    def _late(self) -> str:
        seconds = time.monotonic() - self._began if self._began is not None else 0.0
        if seconds <= LATE_SECONDS:
            return ""
        return (
            f"{self._database.path}: a write has lasted {seconds:.0f} s; "
            "is its file system frozen, or its disk hung?"
        )


def _has_version(path: Path) -> bool:
    """Whether somebody has opened the file who keeps nothing elsewhere; of a damaged one nothing is known."""
    try:
        return database.version_of(path) == database.SCHEMA_VERSION
    except database.ERRORS:
        return False


def pending(directory: Path) -> list[Change]:
    """The changes in the journal of a directory, of which an agent may be writing some, in their order."""
    return [Change(*of, body) for of, body in _rows(journal.read(directory)).items()]


def _rows(entries: Iterable[bytes]) -> Rows:
    """The last state of each row that these entries change."""
    rows: Rows = {}
    for entry in entries:
        try:
            changes = msgspec.msgpack.decode(entry, type=list[Change])
        except msgspec.DecodeError as error:
            log.error("journal: an entry cannot be read: %s", error)
            continue
        for change in changes:
            if change.table in _TABLES:
                rows[sys.intern(change.table), change.key] = change.body
            else:
                log.error("journal: a change of the unknown table %s", change.table)
    return rows
