"""What an agent finds when it starts, after whatever happened to the last one."""

from __future__ import annotations

import errno
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from nodeagent import database, trash
from nodeagent.images import catalog, install
from nodeagent.records import Layer
from nodeagent.store import Store
from tests.support import tars
from tests.support.fake_registry import Server, image, layer
from tests.support.places import Place

TWO = image(layer(tars.file("a", b"lower")), layer(tars.file("b", b"upper")))


async def test_what_no_record_knows_is_removed(place: Place) -> None:
    async with place.open():
        pass
    (place.root / "staging/layer-1/deep").mkdir(parents=True)
    (place.root / "staging/blob-1").write_bytes(b"half")
    (place.root / "layers" / ("0" * 64) / "a").mkdir(parents=True)
    (place.root / "layers/lost+found").mkdir()
    (place.root / "blobs/sha256" / ("0" * 64)).write_bytes(b"{}")
    async with place.open() as images:
        assert (await images.usage()).used_bytes == 0
    assert place.left("staging", "layers", "blobs/sha256") == ["lost+found"]


async def test_a_missing_layer_is_fetched_again_and_no_other(place: Place, server: Server) -> None:
    server.add(TWO)
    name = f"{server.host}/test/image:1"
    async with place.open() as images:
        upper, _ = images.lower_dirs(await images.pull(name))
    shutil.rmtree(upper)
    server.requests.clear()
    async with place.open() as images:
        assert images.list() == []
        await images.pull(name)
        assert (upper / "b").read_bytes() == b"upper"
    fetched = [request.path for request in server.asked("/blobs/")]
    assert fetched == [f"/v2/test/image/blobs/{tars.digest(TWO.layers[1].blob)}"]


async def test_layers_without_an_image_go(place: Place, server: Server) -> None:
    server.add(TWO)
    async with place.open() as images:
        await images.pull(f"{server.host}/test/image:1")
    with closing(database.opened(place.root / "state.db")) as db:
        db.execute("DELETE FROM record_image")
    async with place.open() as images:
        assert images.list() == []
    assert place.left("layers", "blobs/sha256") == []
    store = Store.open(place.root / "state.db")
    assert store.all(Layer) == []
    store.close()


async def test_a_damaged_document_is_fetched_again(place: Place, server: Server) -> None:
    server.add(TWO)
    name = f"{server.host}/test/image:1"
    async with place.open() as images:
        pulled = await images.pull(name)
        config = place.root / "blobs/sha256" / pulled.id.removeprefix("sha256:")
        config.write_bytes(b"damaged")
        assert (await images.pull(name)).id == pulled.id
        assert len(server.asked(pulled.id)) == 2
        assert (await images.pull(name)).id == pulled.id
        assert len(server.asked(pulled.id)) == 2


async def test_a_document_that_a_power_loss_has_left_incomplete_goes(
    place: Place, server: Server
) -> None:
    """Also one that its image has, and what was to become one."""
    server.add(TWO)
    name = f"{server.host}/test/image:1"
    async with place.open() as images:
        pulled = await images.pull(name)
    documents = place.root / "blobs/sha256"
    config = documents / pulled.id.removeprefix("sha256:")
    config.write_bytes(b"")
    (documents / f".{config.name}.0123456789ab").write_bytes(b"")
    async with place.open() as images:
        assert [image.id for image in images.list()] == [pulled.id]
        assert len(place.left("blobs/sha256")) == 1
        await images.pull(name)
    assert config.read_bytes()


async def test_a_layer_that_was_forgotten_is_synced_before_it_is_there_again(
    place: Place, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may bring its old record back, which then stands for what is there."""
    server.add(TWO)
    name = f"{server.host}/test/image:1"
    layers: list[int] = []

    def sync(_: Path) -> None:
        layers.append(len(place.left("layers")))

    monkeypatch.setattr(install, "sync_file_system", sync)
    async with place.open() as images:
        await images.pull(name)
        assert layers == [], "nothing more than ever on the usual way"
        await images.remove(name)
        await images.pull(name)
    assert sorted(layers) == [0, 1]


async def test_what_a_pull_has_not_synced_the_next_one_syncs(
    place: Place, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is recorded and written then: the next pull changes nothing, and answers for it."""
    server.add(TWO)
    name = f"{server.host}/test/image:1"
    syncs: list[int] = []

    def sync(_: Path) -> None:
        syncs.append(len(place.left("blobs/sha256")))
        if len(syncs) == 2:
            raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(catalog, "sync_file_system", sync)
    async with place.open() as images:
        with pytest.raises(OSError, match="input/output error"):
            await images.pull(name)
        for _ in range(2):
            await images.pull(name)
    assert syncs == [0, 2, 2], "the layers, what failed, and once more"


async def test_an_unreadable_layer_that_cannot_be_set_aside_is_tried_again(
    place: Place, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(TWO)
    name = f"{server.host}/test/image:1"
    async with place.open() as images:
        await images.pull(name)
    with closing(database.opened(place.root / "state.db")) as rows:
        rows.execute("UPDATE record_layer SET body = 'x'")
    failures = [OSError(errno.ENOSPC, "no space left on device")]

    def set_aside(path: Path, quarantine: Path) -> Path:
        if failures:
            raise failures.pop()
        return trash.set_aside(path, quarantine)

    monkeypatch.setattr("nodeagent.images.layer_store.set_aside", set_aside)
    async with place.open() as images:
        with pytest.raises(OSError, match="no space left"):
            await images.pull(name)
        await images.pull(name)
    assert len(place.left("quarantine")) == 2
