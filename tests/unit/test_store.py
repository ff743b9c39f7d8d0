"""The store: records survive, whole or not at all."""

import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent import database
from nodeagent.database import SCHEMA_VERSION, Database
from nodeagent.errors import DataLoss, IncompatibleVersion, Unavailable
from nodeagent.records import HostPort, Lease
from nodeagent.requests import ContainerConfig
from nodeagent.store import Store
from tests.unit.cri import records


def lease(pod: str = "p", *addresses: str) -> Lease:
    return Lease(pod_id=pod, addresses=addresses, link="v", acquired_at=1)


@pytest.fixture(name="path")
def path_of_store(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


def test_records_survive_closing(path: Path) -> None:
    kept = [records.sandbox(), records.container(started_at=7), records.image(), lease()]
    store = Store.open(path)
    for record in kept:
        store.put(record)
    store.close()
    again = Store.open(path)
    assert [again.get(type(record), record.key) for record in kept] == kept
    again.close()


def test_all_files_are_the_owner_s_alone(path: Path) -> None:
    """Whatever the umask, and also where an earlier version has made them."""
    umask = os.umask(0o022)
    try:
        for _ in range(2):
            with closing(Store.open(path)) as store:
                store.put(lease())
                files = list(path.parent.iterdir())
                names = {"state.db", "state.db-wal", "state.db-shm", "state.db.reserve"}
                assert {file.name for file in files} == names
                assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
            path.chmod(0o644)
    finally:
        os.umask(umask)


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """The pid of a process that has a write lock of the database, and does nothing more."""
    script = (
        "import sqlite3, sys; db = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "db.execute('BEGIN IMMEDIATE'); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        yield other.pid
        assert other.stdin is not None
        other.stdin.close()


def test_an_agent_that_starts_waits_a_bounded_time_and_names_who_has_the_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "PATIENCE_MS", 50)
    Store.open(path).close()
    with locked(path) as pid, pytest.raises(Unavailable, match=f"locked by process {pid} "):
        Store.open(path)
    Store.open(path).close()


def test_the_log_is_copied_into_the_file_when_it_is_long(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Database(database.opened(path), path)
    with closing(Store(rows)) as store:
        size = path.stat().st_size
        for number in range(300):
            store.put(lease(str(number), "x" * 8192))
        rows.shorten_log()
        assert path.stat().st_size == size
        monkeypatch.setattr(database, "LOG_BYTES", 300 * 8192)
        rows.shorten_log()
        assert path.stat().st_size > 300 * 8192
        assert len(store.all(Lease)) == 300


# --- damage ---


@pytest.mark.parametrize("length", [0.25, 0.5, 0.99])
def test_a_truncated_database_is_refused_with_the_remedy(path: Path, length: float) -> None:
    fill(path)
    os.truncate(path, int(path.stat().st_size * length) & ~1)
    with pytest.raises(DataLoss, match=r"state\.db: .*nodeagent check --repair"):
        Store.open(path)
    with pytest.raises(DataLoss, match=r"state\.db: .*nodeagent check --repair"):
        Store.copy_of(path, path.parent).close()


@given(at=st.floats(0, 1), size=st.sampled_from([1, 512, 4096]))
def test_whatever_is_overwritten_there_is_an_error_of_ours_at_most(at: float, size: int) -> None:
    """Never one of SQLite's. What can be read afterwards is what was written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state.db")
        written = {record.pod_id: record for record in fill(path)}
        with path.open("r+b") as file:
            file.seek(int(at * (path.stat().st_size - size)))
            file.write(b"\xa5" * size)
        try:
            with closing(Store.open(path)) as store:
                for record in store.all(Lease):
                    assert store.get(Lease, record.pod_id) == record
                    assert record.pod_id not in written or len(record.addresses) == 1
                store.put(lease("new"))
                with store.transaction():
                    store.delete(Lease, "3")
        except (DataLoss, IncompatibleVersion):
            pass


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xa5" * (64 << 10), None])
def test_a_damaged_log_or_index_loses_the_latest_writes_at_most(
    path: Path, suffix: str, content: bytes | None
) -> None:
    fill(path)
    with closing(Store.open(path)) as store:
        store.put(lease("latest"))
        copies = {s: path.with_name(path.name + s).read_bytes() for s in ("", "-wal", "-shm")}
    for name, data in copies.items():
        path.with_name(path.name + name).write_bytes(data)
    damaged = path.with_name(path.name + suffix)
    if content is None:  # the second half
        content = copies[suffix][: len(copies[suffix]) // 2] + b"\xa5" * 10_000
    damaged.write_bytes(content)
    with closing(Store.open(path)) as store:
        assert len(store.all(Lease)) >= 60


def fill(path: Path) -> list[Lease]:
    """Some pages of records, all of them in the database."""
    written = [lease(str(number), "x" * 2000) for number in range(60)]
    with closing(Store.open(path)) as store:
        for record in written:
            store.put(record)
    return written


def test_a_page_that_is_damaged_while_the_agent_runs(path: Path) -> None:
    fill(path)
    rows = Database(database.opened(path), path)
    with closing(Store(rows)) as store:
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(b"\xa5" * (path.stat().st_size - 4096))
        rows._db.execute("PRAGMA cache_size = 0")
        with pytest.raises(DataLoss, match="nodeagent check --repair"):
            store.all(Lease)
        with pytest.raises(DataLoss, match="nodeagent check --repair"):
            store.get(Lease, "3")
        with pytest.raises(DataLoss, match="nodeagent check --repair"):
            store.put(lease("3", "y" * 9000))
        with pytest.raises(DataLoss, match="malformed"), store.transaction():
            store.delete(Lease, "3")


def test_put_replaces_and_delete_forgets(path: Path) -> None:
    store = Store.open(path)
    store.put(lease("p", "10.0.0.1/16"))
    store.put(lease("p", "10.0.0.2/16"))
    store.put(lease("o"))
    assert store.all(Lease) == [lease("o"), lease("p", "10.0.0.2/16")]
    store.delete(Lease, "p")
    store.delete(Lease, "p")
    assert store.get(Lease, "p") is None
    assert store.all(HostPort) == []
    store.close()


def test_kinds_do_not_share_keys(path: Path) -> None:
    store = Store.open(path)
    store.put(records.sandbox("x"))
    store.put(records.container("x"))
    assert type(store.get(type(records.sandbox()), "x")) is type(records.sandbox())
    store.delete(type(records.container()), "x")
    assert store.get(type(records.sandbox()), "x") is not None
    store.close()


def test_a_transaction_that_fails_writes_nothing(path: Path) -> None:
    store = Store.open(path)
    store.put(lease("before"))
    with pytest.raises(ZeroDivisionError):
        _replace_and_fail(store)
    assert store.all(Lease) == [lease("before")]
    with store.transaction():
        store.put(lease("after"))
    assert store.all(Lease) == [lease("after"), lease("before")]
    store.close()


def _replace_and_fail(store: Store) -> None:
    with store.transaction():
        store.put(lease("during"))
        with store.transaction():
            store.delete(Lease, "before")
        raise ZeroDivisionError


def test_another_process_sees_only_whole_transactions(path: Path) -> None:
    store, other = Store.open(path), Store.open(path)
    with store.transaction():
        store.put(lease("a"))
        assert other.all(Lease) == []
    assert other.all(Lease) == [lease("a")]
    store.close()
    other.close()


def test_the_file_of_a_newer_agent_is_refused(path: Path) -> None:
    Store.open(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA journal_mode = DELETE")
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    before = path.read_bytes()
    with pytest.raises(
        IncompatibleVersion, match=r"state.db: schema 2 is newer than 1.*; install the release"
    ):
        Store.open(path)
    assert path.read_bytes() == before
    assert not [name for name in os.listdir(path.parent) if "-wal" in name], "it is closed"


def test_the_file_of_the_first_releases_is_read(path: Path) -> None:
    """It had no version."""
    with closing(Store.open(path)) as store:
        store.put(lease())
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 0")
    with closing(Store.open(path)) as store:
        assert store.all(Lease) == [lease()]
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)


def test_a_file_of_something_else_is_refused(path: Path) -> None:
    path.write_bytes(b"x" * 4096)
    with pytest.raises(DataLoss, match="not a database"):
        Store.open(path)


def test_a_record_that_cannot_be_read_is_passed_over(path: Path) -> None:
    with closing(Store.open(path)) as store:
        store.put(lease("a"))
        store.put(lease("b"))
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE record_lease SET body = substr(body, 1, 9) WHERE key = 'a'")
    with closing(Store.open(path)) as store:
        assert store.all(Lease) == [lease("b")]
        assert store.get(Lease, "a") is None
        assert store.unreadable(Lease) == {"a"}
        store.put(lease("a"))
        assert store.unreadable(Lease) == set()


@given(st.dictionaries(st.text(), st.text()), st.lists(st.tuples(st.text(), st.binary())))
def test_texts_and_bytes_of_any_kind(labels: dict[str, str], envs: list[tuple[str, bytes]]) -> None:
    config = {"labels": labels, "annotations": labels, "envs": tuple(envs)}
    record = records.container(config=config)
    with closing(Store(Database(_memory()))) as store:
        store.put(record)
        kept = store.get(type(record), record.key)
    assert kept == record
    assert isinstance(kept.config, ContainerConfig)


def _memory() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.execute("CREATE TABLE record_container (key TEXT PRIMARY KEY, body BLOB NOT NULL)")
    return db


def test_a_copy_has_what_the_file_has(path: Path) -> None:
    """It includes what is still in the log, and neither file is written to."""
    with closing(Store.copy_of(path, path.parent)) as nothing:
        assert nothing.all(Lease) == []
    assert os.listdir(path.parent) == []
    with closing(Store.open(path)) as store:
        store.put(lease("a"))
        with closing(Store.copy_of(path, path.parent)) as copy:
            copy.put(lease("b"))
            assert copy.all(Lease) == [lease("a"), lease("b")]
        assert store.all(Lease) == [lease("a")]
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA user_version = 0")
        db.execute("DROP TABLE record_lease")
    with closing(Store.copy_of(path, path.parent)) as earlier:
        assert earlier.all(Lease) == []
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (0,)


@pytest.mark.parametrize("content", [b"x" * 4096, None])
def test_a_copy_of_what_is_no_store_of_ours_is_refused(path: Path, content: bytes | None) -> None:
    if content is None:
        Store.open(path).close()
        with closing(sqlite3.connect(path)) as db:
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    else:
        path.write_bytes(content)
    with pytest.raises(DataLoss if content else IncompatibleVersion):
        Store.copy_of(path, path.parent)
