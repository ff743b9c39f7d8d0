"""`nodeagent check --data` and `--repair`: what is damaged is named, set aside, and fetched again by the next pull."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import pytest

from nodeagent import cli, database, files, repair, salvage
from nodeagent.config import Config
from nodeagent.database import SCHEMA_VERSION
from nodeagent.errors import AlreadyExists, DataLoss, IncompatibleVersion
from nodeagent.lifecycle.places import Places
from nodeagent.records import KINDS, Image, Layer, Lease
from nodeagent.store import Store
from tests.support import tars
from tests.support.fake_registry import Server, image, layer, serving
from tests.support.places import Place
from tests.unit.cri import records

TREE = tars.file("a", b"lower"), tars.file("b/c", b"x" * 9000)
TWO = image(layer(*TREE), layer(tars.file("d", b"upper")))


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as started:
        yield started


@pytest.fixture(name="place")
def place_of(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(name="config")
def config_of(place: Place, tmp_path: Path) -> Config:
    return Config(root=str(place.root), state=str(tmp_path / "run"))


def damages(report: repair.Report) -> list[str]:
    return [finding.name for finding in report.findings]


async def pulled(place: Place, server: Server) -> Image:
    server.add(TWO)
    async with place.open() as images:
        return await images.pull(f"{server.host}/test/image:1")


# --- files ---


async def test_all_is_well(place: Place, server: Server, config: Config) -> None:
    await pulled(place, server)
    for report in (repair.look(config), repair.repair(config)):
        assert str(report) == (
            "checked 3 records, 2 documents, 2 layers, 0 files of pods: 0 damaged, 0 left as they are"
        )
    assert not (place.root / "quarantine").exists()


def cut(path: Path) -> None:
    os.truncate(path, 3)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def rewrite(path: Path) -> None:
    path.write_bytes(b"X" * path.stat().st_size)


def retype(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


CHANGES: list[Callable[[Path], None]] = [
    cut,
    grow,
    rewrite,
    retype,
    Path.unlink,
    lambda path: path.chmod(0o777),
    lambda path: path.with_name("new").touch(),
    lambda path: files.remove_tree(str(path.parent)),
]


@pytest.mark.parametrize("change", CHANGES)
async def test_a_damaged_layer_is_fetched_again(
    place: Place, server: Server, config: Config, change: Callable[[Path], None]
) -> None:
    chain = (await pulled(place, server)).layers[0].removeprefix("sha256:")
    damaged = place.root / "layers" / chain
    change(damaged / "b/c")
    name = f"layers/{chain} (of image {server.host}/test/image:1)"
    report = repair.look(config)
    assert (damages(report), report.left) == ([name], 1)
    assert damaged.exists()
    report = repair.repair(config)
    assert (damages(report), report.left) == ([name], 0)
    assert [path.name[:64] for path in (place.root / "quarantine").iterdir()] == [chain]
    assert damages(repair.look(config)) == []
    server.requests.clear()
    async with place.open() as images:
        assert images.list() == []
        _, lower = images.lower_dirs(await images.pull(f"{server.host}/test/image:1"))
        assert (lower / "b/c").read_bytes() == b"x" * 9000
    assert len(server.asked("/blobs/")) == 1, "the other layer is still there"
    assert damages(repair.look(config)) == []


async def test_a_layer_of_an_earlier_version_is_read(
    place: Place, server: Server, config: Config
) -> None:
    """It has no digest to compare with."""
    chain = (await pulled(place, server)).layers[0]
    with closing(database.opened(place.root / "state.db")) as db:
        db.execute("UPDATE record_layer SET body = json_remove(body, '$.tree')")
    with closing(Store.open(place.root / "state.db")) as store:
        assert store.get(Layer, chain) is not None
    directory = place.root / "layers" / chain.removeprefix("sha256:")
    cut(directory / "b/c")
    assert damages(repair.look(config)) == []
    files.remove_tree(str(directory))
    assert len(damages(repair.look(config))) == 1


async def test_a_damaged_document_is_fetched_again(
    place: Place, server: Server, config: Config
) -> None:
    await pulled(place, server)
    [first, *_] = sorted((place.root / "blobs/sha256").iterdir())
    cut(first)
    for look in (repair.look, repair.repair):
        assert damages(look(config)) == [f"blobs/sha256/{first.name}"]
    async with place.open() as images:
        [listed] = images.list()
        assert (await images.pull(f"{server.host}/test/image:1")).id == listed.id
    assert first.exists()
    assert damages(repair.look(config)) == []


def test_a_damaged_profile_and_what_is_none_of_ours(place: Place, config: Config) -> None:
    Store.open(place.root / "state.db").close()
    (place.root / "profiles/sha256").mkdir(parents=True)
    (place.root / "profiles/sha256" / ("0" * 64)).write_bytes(b"{}")
    (place.root / "profiles/sha256/lost+found").mkdir()
    assert damages(repair.repair(config)) == [f"profiles/sha256/{'0' * 64}"]


def test_files_of_pods_are_named_and_left(place: Place, config: Config) -> None:
    Store.open(place.root / "state.db").close()
    container = Path(config.state) / "pods/p/containers/c"
    container.mkdir(parents=True)
    (container / "state.json").write_text('{"pid": 1')
    (container / "plan.json").write_text("{}")
    report = repair.repair(config)
    assert (damages(report), report.left) == ([str(container / "state.json")], 1)


def test_an_agent_that_runs_is_not_repaired(place: Place, config: Config) -> None:
    with Places.of(config).owned():
        with pytest.raises(AlreadyExists, match="another agent has this directory"):
            repair.repair(config)
        assert repair.look(config).findings == []


# --- records ---


def lease(pod: str, size: int = 2000) -> Lease:
    return Lease(pod_id=pod, addresses=("x" * size,), link="v", acquired_at=1)


def fill(path: Path, count: int = 60) -> None:
    with closing(Store.open(path)) as store:
        for number in range(count):
            store.put(lease(str(number)))
        store.put(records.sandbox("pod"))


def test_an_unreadable_record_is_kept_apart(place: Place, config: Config) -> None:
    path = place.root / "state.db"
    fill(path, 3)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE record_sandbox SET body = substr(body, 1, 30)")
    assert damages(repair.look(config)) == ['Sandbox "pod"']
    assert damages(repair.repair(config)) == ['Sandbox "pod"']
    assert len((place.root / "quarantine/Sandbox-pod.json").read_bytes()) == 30
    with closing(Store.open(path)) as store:
        assert [len(store.all(kind)) for kind in KINDS if store.all(kind)] == [3]
    assert repair.look(config).findings == []


@pytest.mark.parametrize("page", range(2, 30, 3))
def test_what_is_beside_a_damaged_page_is_salvaged(place: Place, config: Config, page: int) -> None:
    """A page has two of the rows, or their keys, or leads to others of the table: at most a few rows are lost."""
    path = place.root / "state.db"
    fill(path)
    with path.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xa5" * 4096)
    if not salvage.damage(path):  # a free page
        Store.open(path).close()
        return
    with pytest.raises(DataLoss, match="check --repair"):
        Store.open(path)
    assert damages(repair.look(config)) == ["state.db"]
    report = repair.repair(config)
    assert report.left == 0
    with closing(Store.open(path)) as store:
        kept = store.all(Lease)
        assert len(kept) >= 55
        assert set(kept) <= {lease(str(number)) for number in range(60)}
        lost = {f'Lease "{number}"' for number in range(60)} - {f'Lease "{k.key}"' for k in kept}
    assert lost == {name for name in damages(report) if name.startswith("Lease")}, "each is named"
    [kept_at] = (place.root / "quarantine").iterdir()
    assert (kept_at / "state.db").stat().st_mode & 0o777 == 0o600
    assert repair.look(config).findings == []
    assert not list(place.root.glob("state.db.new*"))


def test_a_file_that_is_no_database_is_replaced(place: Place, config: Config) -> None:
    path = place.root / "state.db"
    path.write_bytes(b"x" * 9999)
    assert damages(repair.repair(config)) == ["state.db"]
    Store.open(path).close()


def test_what_is_only_in_the_log_is_salvaged_too(place: Place, config: Config) -> None:
    path = place.root / "state.db"
    fill(path)
    with closing(Store.open(path)) as store:
        store.put(lease("latest"))
        copies = {name: path.with_name(name).read_bytes() for name in ("state.db", "state.db-wal")}
    for name, data in copies.items():
        path.with_name(name).write_bytes(data)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xa5" * 4096)
    if salvage.damage(path):
        repair.repair(config)
    with closing(Store.open(path)) as store:
        assert store.get(Lease, "latest") == lease("latest")


def test_a_newer_database_is_not_touched(place: Place, config: Config) -> None:
    path = place.root / "state.db"
    fill(path, 1)
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE record_sandbox SET body = '[]'")
        db.commit()
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(IncompatibleVersion):
        repair.repair(config)
    assert not (place.root / "quarantine").exists()


# --- the command ---


def test_the_exit_status_says_whether_damage_is_left(
    place: Place, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    (place.root / "state.db").write_bytes(b"x" * 9999)
    directories = ["--root", config.root, "--state", config.state]
    assert cli.main(["check", *directories, "--data"]) == 1
    assert "state.db: file is not a database" in capsys.readouterr().out
    assert cli.main(["check", *directories, "--repair"]) == 0
    assert cli.main(["check", *directories, "--data"]) == 0
    assert "0 damaged" in capsys.readouterr().out
