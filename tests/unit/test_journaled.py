"""A database that is written behind its callers: nothing waits for it, nothing is lost when it cannot be had."""

import asyncio
import errno
import itertools
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nodeagent import database, journal, journaled
from nodeagent.database import Change, Database
from nodeagent.errors import DataLoss, ResourceExhausted, Unavailable
from nodeagent.journal import NAMES, Journal
from nodeagent.journaled import JournaledDatabase
from nodeagent.records import HostPort, Lease
from nodeagent.store import Store
from tests.support.node import PATIENCE_SECONDS, wait_for


def lease(pod: str = "p", *addresses: str) -> Lease:
    return Lease(pod_id=pod, addresses=addresses, link="v", acquired_at=1)


class Gate(Database):
    """A database that is written when it is let, or fails."""

    def __init__(self, path: Path) -> None:
        super().__init__(database.opened(path, database.JOURNALED), path)
        self.is_open = threading.Event()
        self.is_reached = threading.Event()
        self.failure: Exception | None = None
        self.written: list[list[Change]] = []

    def write(self, changes: Sequence[Change]) -> None:
        self.is_reached.set()
        assert self.is_open.wait(PATIENCE_SECONDS)
        if self.failure is not None:
            raise self.failure
        super().write(changes)
        self.written.append(list(changes))


class Place:
    """A database that is closed at first, and what an agent keeps in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gate = Gate(folder / "state.db")
        self.rows = JournaledDatabase(self.gate, Journal.open(folder))
        self.store = Store(self.rows)

    def killed(self) -> list[Lease]:
        """What an agent finds that comes after this one was killed now."""
        with closing(Store.copy_of(self.gate.path or Path(), self.folder)) as store:
            return store.all(Lease)


@pytest.fixture(name="place")
def place_of_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(journaled, "_FIRST_RETRY_SECONDS", 0.001)
    monkeypatch.setattr(journaled, "_LONGEST_RETRY_SECONDS", 0.001)
    place = Place(tmp_path)
    yield place
    place.gate.failure = None
    place.gate.is_open.set()
    place.store.close()


async def settled(store: Store) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        await store.settled()


def test_a_write_waits_for_no_disk_and_is_there_for_the_next_agent(place: Place) -> None:
    place.store.put(lease("a"))
    assert place.gate.is_reached.wait(PATIENCE_SECONDS)
    with place.store.transaction():
        place.store.put(lease("b"))
        place.store.put(lease("c"))
        place.store.delete(Lease, "a")
    assert place.store.all(Lease) == [lease("b"), lease("c")] == place.killed()
    assert place.store.get(Lease, "a") is None
    assert place.store.get(Lease, "b") == lease("b")
    place.gate.is_open.set()
    asyncio.run(settled(place.store))
    with closing(Store.open(place.folder / "state.db")) as alone:
        assert alone.all(Lease) == [lease("b"), lease("c")]
    assert journal.read(place.folder) == []


def test_what_changes_several_times_is_written_once(place: Place) -> None:
    place.gate.is_open.set()
    for number in range(20):
        place.store.put(lease("a", str(number)))
    place.store.put(
        HostPort(protocol="TCP", host_ip="", host_port=80, pod_id="a", container_port=80)
    )
    asyncio.run(settled(place.store))
    written = [change for changes in place.gate.written for change in changes]
    assert len(written) < 22, "a write that the thread took in the middle makes one more"
    assert place.store.all(Lease) == [lease("a", "19")]


async def test_whoever_waits_is_told_why_it_cannot_be_written(place: Place) -> None:
    place.gate.is_open.set()
    place.gate.failure = DataLoss("state.db: malformed")
    place.store.put(lease("a"))
    with pytest.raises(DataLoss, match="malformed"):
        await settled(place.store)
    assert place.store.trouble() == "state.db: malformed"
    assert place.killed() == [lease("a")]
    place.gate.failure = None
    await settled(place.store)
    assert place.store.trouble() == ""
    await settled(place.store)


async def test_whoever_waits_for_what_came_later_is_told_as_well(place: Place) -> None:
    place.store.put(lease("a"))
    assert place.gate.is_reached.wait(PATIENCE_SECONDS)
    place.store.put(lease("b"))
    place.gate.failure = OSError(errno.EIO, "input/output error")
    place.gate.is_open.set()
    with pytest.raises(OSError, match="input/output error"):
        await settled(place.store)


async def test_a_caller_that_is_cancelled_leaves_the_thread_at_work(place: Place) -> None:
    place.store.put(lease("a"))
    waiting = asyncio.ensure_future(place.store.settled())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    place.gate.is_open.set()
    await settled(place.store)


@pytest.mark.parametrize(
    ("failure", "is_trouble"),
    [
        (ResourceExhausted("full"), False),
        (Unavailable("locked"), False),
        (OSError(errno.EIO, "input/output error"), True),
        (DataLoss("malformed"), True),
        (KeyError("whatever"), True),
    ],
)
def test_it_is_tried_until_it_succeeds(
    place: Place, failure: Exception, is_trouble: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """What is no trouble: a node that is not ready frees no disk, and a backup is over soon."""
    place.gate.failure = failure
    place.gate.is_open.set()
    place.store.put(lease("a"))
    with pytest.raises(type(failure)):
        asyncio.run(settled(place.store))
    with pytest.raises(type(failure)):  # of a later attempt
        asyncio.run(settled(place.store))
    assert bool(place.store.trouble()) is is_trouble
    assert len([line for line in caplog.messages if "it is tried again" in line]) == 1
    place.gate.is_open.clear()
    place.gate.is_reached.clear()
    assert place.gate.is_reached.wait(PATIENCE_SECONDS)
    assert bool(place.store.trouble()) is is_trouble, "also while it is tried"
    place.gate.is_open.set()
    place.gate.failure = None
    asyncio.run(settled(place.store))
    assert place.store.trouble() == ""


def test_a_journal_that_cannot_be_emptied_is_tried_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had is written twice, which changes nothing."""
    failures = itertools.cycle((ResourceExhausted("full"), OSError(errno.EIO, "failed")))

    def empty(_files: Journal) -> None:
        raise next(failures)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "empty", empty)
        place.gate.is_open.set()
        place.store.put(lease("a"))
        for _ in range(2):
            with pytest.raises((ResourceExhausted, OSError)):
                asyncio.run(settled(place.store))
    asyncio.run(settled(place.store))
    assert place.store.all(Lease) == [lease("a")]
    assert journal.read(place.folder) == []


def test_a_write_that_does_not_return_is_trouble(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.store.put(lease("a"))
    assert place.gate.is_reached.wait(PATIENCE_SECONDS)
    assert place.store.trouble() == ""
    monkeypatch.setattr(journaled, "LATE_SECONDS", -1.0)
    assert "a write has lasted 0 s; is its file system frozen" in place.store.trouble()


def test_a_log_that_cannot_be_shortened_is_trouble(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write goes to the page cache: it is the sync after it that waits for a hung disk."""
    is_reached, goes_on = threading.Event(), threading.Event()

    def shorten_log(_database: Database) -> None:
        is_reached.set()
        assert goes_on.wait(PATIENCE_SECONDS)

    monkeypatch.setattr(Database, "shorten_log", shorten_log)
    monkeypatch.setattr(journaled, "LATE_SECONDS", 0.0)
    place.gate.is_open.set()
    place.store.put(lease("a"))
    assert is_reached.wait(PATIENCE_SECONDS)
    wait_for("the trouble", lambda: "a write has lasted 0 s" in place.store.trouble())
    goes_on.set()
    wait_for("its end", lambda: place.store.trouble() == "")


def test_memory_has_a_bound(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journaled, "MOST_BYTES", 5000)
    place.store.put(lease("a", "x" * 3000))
    with pytest.raises(
        Unavailable, match=r"state\.db: is written slowly; \d+ MiB of changes wait for it in memory"
    ):
        place.store.put(lease("b", "x" * 3000))
    assert place.killed() == [lease("a", "x" * 3000)]


def test_an_agent_that_ends_writes_everything_and_leaves_no_journal(tmp_path: Path) -> None:
    with closing(Store.open(tmp_path / "state.db", tmp_path)) as store:
        for number in range(100):
            store.put(lease(str(number)))
    assert not [path for path in tmp_path.iterdir() if path.name in NAMES]
    with closing(Store.open(tmp_path / "state.db")) as store:
        assert len(store.all(Lease)) == 100


def test_what_a_release_without_a_journal_has_written_since_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An agent was killed; its changes are older than those of the release that was put back then."""
    path = tmp_path / "state.db"
    with closing(Store.open(path, tmp_path)) as store:
        store.put(lease("a", "1"))
        asyncio.run(settled(store))
        assert database.version_of(path) == database.JOURNALED
    assert database.version_of(path) == database.SCHEMA_VERSION
    with closing(Journal.open(tmp_path)) as files:
        files.append(entry(lease("b")))
        files.turn()
        files.append(entry(lease("a", "2")))
    with closing(Store.open(path)) as earlier:
        earlier.put(lease("a", "3"))
    with closing(Store.open(path, tmp_path)) as store:
        assert store.all(Lease) == [lease("a", "3")]
        assert "a release that knows no journal has written it since" in caplog.text
        store.put(lease("b"))
    with closing(Store.open(path, tmp_path)) as store:
        assert store.all(Lease) == [lease("a", "3"), lease("b")]


def test_an_agent_that_cannot_write_ends_and_leaves_the_rest_to_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journaled, "CLOSE_SECONDS", 0.0)
    place = Place(tmp_path)
    place.store.put(lease("a"))
    assert place.gate.is_reached.wait(PATIENCE_SECONDS)
    place.store.put(lease("b"))
    place.store.close()
    place.gate.failure = OSError(errno.EIO, "input/output error")
    place.gate.is_open.set()
    wait_for("the end of the thread", lambda: not place.rows._thread.is_alive())
    place.gate.close()
    with closing(Store.open(tmp_path / "state.db", tmp_path)) as store:
        assert store.all(Lease) == [lease("a"), lease("b")]
        asyncio.run(settled(store))
    with closing(Store.open(tmp_path / "state.db")) as store:
        assert store.all(Lease) == [lease("a"), lease("b")]


def test_what_was_left_to_the_next_one_is_not_touched_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk answers again, while the thread of the one that has ended is still there."""
    place = Place(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(journaled, "CLOSE_SECONDS", 0.0)
        place.store.put(lease("a"))
        assert place.gate.is_reached.wait(PATIENCE_SECONDS)
        place.store.put(lease("b"))
        place.store.close()
    following = Place(tmp_path)
    following.store.put(lease("c"))
    place.gate.is_open.set()
    wait_for("the end of the thread", lambda: not place.rows._thread.is_alive())
    assert following.killed() == [lease("a"), lease("b"), lease("c")]
    following.gate.is_open.set()
    following.store.close()
    place.gate.close()


def test_what_an_agent_has_left_is_written_in_its_order(tmp_path: Path) -> None:
    """The later file has the later state."""
    with closing(Journal.open(tmp_path)) as files:
        files.append(entry(lease("a", "1"), lease("b", "1")))
        files.turn()
        files.append(entry(lease("a", "2")))
    with closing(Store.open(tmp_path / "state.db", tmp_path)) as store:
        assert store.all(Lease) == [lease("a", "2"), lease("b", "1")]
        store.put(lease("b", "2"))
        asyncio.run(settled(store))
    with closing(Store.open(tmp_path / "state.db")) as store:
        assert store.all(Lease) == [lease("a", "2"), lease("b", "2")]


def test_an_entry_that_cannot_be_read_is_named_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(Journal.open(tmp_path)) as files:
        files.append(b"\xc1")
        files.turn()
        files.append(msgspec_entry([("sqlite_master", "x", b"y")]))
        files.append(entry(lease("a")))
    with closing(Store.open(tmp_path / "state.db", tmp_path)) as store:
        assert store.all(Lease) == [lease("a")]
        store.put(lease("b"))
        asyncio.run(settled(store))
    assert "an entry cannot be read" in caplog.text
    assert "unknown table sqlite_master" in caplog.text


def entry(*records: Lease) -> bytes:
    with scratch_rows() as taken:
        store = Store(taken)
        with store.transaction():
            for record in records:
                store.put(record)
    return msgspec_entry(taken.changes)


class Taken(Database):
    changes: Sequence[Any] = ()

    def write(self, changes: Sequence[Change]) -> None:
        self.changes = list(changes)


@contextmanager
def scratch_rows() -> Iterator[Taken]:
    with closing(Taken(sqlite3.connect(":memory:"))) as taken:
        yield taken


def msgspec_entry(changes: Sequence[Any]) -> bytes:
    encode: Callable[[Any], bytes] = msgspec.msgpack.encode
    return encode(changes)


def test_a_copy_has_what_goes_from_the_journal_into_the_file_meanwhile(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.store.put(lease("a"))
    assert place.gate.is_reached.wait(PATIENCE_SECONDS)
    real = database.copied

    def copied(path: Path) -> sqlite3.Connection:
        copy = real(path)
        place.gate.is_open.set()
        asyncio.run(settled(place.store))
        return copy

    monkeypatch.setattr(database, "copied", copied)
    assert place.killed() == [lease("a")]


def test_a_copy_has_what_is_in_the_journal(place: Place) -> None:
    place.store.put(lease("a"))
    before = {path.name: path.read_bytes() for path in place.folder.iterdir()}
    assert place.killed() == [lease("a")]
    assert {path.name: path.read_bytes() for path in place.folder.iterdir()} == before
