"""What callers rely on, with Debian's docker-registry at the other end."""

from __future__ import annotations

import asyncio
import base64
import errno
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from nodeagent.errors import (
    InvalidArgument,
    NotFound,
    PermissionDenied,
    RegistryUnavailable,
    ResourceExhausted,
)
from nodeagent.images.catalog import Auth, Images, Limits
from nodeagent.store import Store
from tests.support import images as made
from tests.support import tars
from tests.support.fake_registry import image, layer
from tests.support.places import Place
from tests.support.registry import PASSWORD, USERNAME, Registry, running_registry

NGINX = "e2e-test-images/nginx:1.14-2"


@pytest.fixture(scope="module")
def writable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that the tests of this module push to."""
    with running_registry(tmp_path_factory.mktemp("writable")) as registry:
        yield registry


async def test_pull_by_tag(images: Images, registry: Registry) -> None:
    name = f"{registry.host}/{NGINX}"
    pulled = await images.pull(name)
    expected = made.nginx()
    assert pulled.id == made.digest(expected._config("amd64"))
    assert pulled.repo_tags == (name,)
    assert pulled.repo_digests == (
        f"{registry.host}/e2e-test-images/nginx@{made.digest(expected.top()[0])}",
    )
    assert pulled.manifest == made.digest(expected.manifests()[0])
    blobs = sum(len(layer.blob) for layer in expected.layers)
    assert pulled.size_bytes == blobs + len(expected._config("amd64"))
    assert pulled.config.cmd == ("nginx", "-g", "daemon off;")
    assert pulled.config.stop_signal == "SIGTERM"
    upper, lower = images.lower_dirs(pulled)
    assert (upper / "srv/index.html").read_text() == made.PAGE
    assert (lower / "bin/busybox").stat().st_nlink > 100


async def test_every_way_to_name_an_image(images: Images, registry: Registry) -> None:
    name = f"{registry.host}/{NGINX}"
    pulled = await images.pull(name)
    digits = pulled.id.removeprefix("sha256:")
    for known in (name, *pulled.repo_digests, pulled.id, digits, digits[:13], pulled.id[:20]):
        assert images.find(known) == pulled
    for unknown in ("", digits[:3], "0" * 64, "nginx:1.14-2", f"{registry.host}/{NGINX}x", "A B"):
        assert images.find(unknown) is None
    assert images.list() == [pulled]


async def test_pull_by_digest(images: Images, registry: Registry) -> None:
    top = made.digest(made.nginx().top()[0])
    name = f"{registry.host}/e2e-test-images/nginx@{top}"
    pulled = await images.pull(name)
    assert (pulled.repo_tags, pulled.repo_digests) == ((), (name,))
    tagged = await images.pull(f"{registry.host}/{NGINX}")
    assert (tagged.id, tagged.repo_digests) == (pulled.id, (name,))
    direct = await images.pull(f"{registry.host}/e2e-test-images/nginx@{pulled.manifest}")
    assert direct.id == pulled.id
    assert len(direct.repo_digests) == 2


async def test_tag_beside_a_digest_does_not_count(images: Images, registry: Registry) -> None:
    top = made.digest(made.nginx().top()[0])
    pulled = await images.pull(f"{registry.host}/e2e-test-images/nginx:other@{top}")
    assert pulled.repo_tags == ()


async def test_a_second_pull_fetches_nothing(images: Images, registry: Registry) -> None:
    first = await images.pull(f"{registry.host}/{NGINX}")
    fetched = images.counters.fetched_bytes
    assert await images.pull(f"{registry.host}/{NGINX}") == first
    assert images.counters.fetched_bytes == fetched
    assert images.counters.skipped_bytes == sum(len(layer.blob) for layer in made.nginx().layers)
    assert images.counters.pulls == {"success": 2}


async def test_pulls_at_once_fetch_each_blob_once(images: Images, registry: Registry) -> None:
    name = f"{registry.host}/{NGINX}"
    pulled = await asyncio.gather(*(images.pull(name) for _ in range(4)))
    assert len({id(one) for one in pulled}) == 1
    assert images.counters.fetched_bytes == sum(len(layer.blob) for layer in made.nginx().layers)
    assert images.counters.layers_fetched == 2


async def test_images_that_share_a_layer_share_the_work(images: Images, registry: Registry) -> None:
    names = [f"k8s-staging-cri-tools/test-image-{number}:latest" for number in (1, 2, 3)]
    pulled = await asyncio.gather(*(images.pull(f"{registry.host}/{name}") for name in names))
    assert len({one.id for one in pulled}) == 3
    assert len({one.layers[0] for one in pulled}) == 1
    assert images.counters.layers_fetched == 4


async def test_one_impatient_caller_does_not_end_the_other(
    images: Images, registry: Registry
) -> None:
    name = f"{registry.host}/bench/pull:1"
    patient = asyncio.create_task(images.pull(name))
    impatient = asyncio.create_task(images.pull(name))
    await asyncio.sleep(0.02)
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    assert (await patient).repo_tags == (name,)


@pytest.mark.parametrize("delay", [0, 0.005, 0.02, 0.05, 0.1])
async def test_a_cancelled_pull_leaves_nothing_that_disturbs(
    place: Place, registry: Registry, delay: float
) -> None:
    name = f"{registry.host}/bench/pull:1"
    async with place.open() as images:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(delay):
                await images.pull(name)
        assert images.list() == []
        pulled = await images.pull(name)
        assert len(list((images.lower_dirs(pulled)[0] / "data/2/00").iterdir())) == 25
    assert place.left("staging") == []
    assert len(place.left("layers")) == 3


async def test_tags_move(place: Place, writable: Registry) -> None:
    first = image(layer(tars.file("a", b"1")), repository="test/move")
    second = image(layer(tars.file("a", b"2")), repository="test/move")
    name = f"{writable.host}/test/move:1"
    async with place.open() as images:
        writable.push(first)
        old = await images.pull(name)
        writable.push(second)
        new = await images.pull(name)
        assert new.id != old.id
        assert new.repo_tags == (name,)
        dangling = images.find(old.id)
        assert dangling is not None
        assert (dangling.repo_tags, dangling.repo_digests) == ((), old.repo_digests)
    async with place.open() as images:
        assert {found.id: found.repo_tags for found in images.list()} == {
            old.id: (),
            new.id: (name,),
        }


async def test_removal_takes_all_names(place: Place, writable: Registry) -> None:
    one = image(layer(tars.file("b")), repository="test/one")
    writable.push(one)
    writable.push(image(*one.layers, repository="test/two", tag="2"))
    names = [f"{writable.host}/test/one:1", f"{writable.host}/test/two:2"]
    async with place.open() as images:
        pulled = [await images.pull(name) for name in names]
        assert pulled[1].repo_tags == tuple(names)
        await asyncio.gather(*(images.remove(name) for name in (*names, names[0], "none")))
        assert images.list() == []
        assert images.find(names[1]) is None
        assert (await images.usage()).used_bytes == 0
    assert place.left("layers", "blobs/sha256", "staging") == []


@pytest.mark.parametrize(
    ("owner", "name", "number"), [(Path, "unlink", 1), (Path, "rename", 1), (Store, "delete", 2)]
)
@pytest.mark.parametrize("is_held", [False, True])
async def test_a_removal_that_fails_once_is_made_up_for(
    place: Place, registry: Registry, owner: type, name: str, number: int, is_held: bool
) -> None:
    """The document, the layer, or its record; what is asked for again is done, although no image is found any more."""
    async with place.open() as images:
        pulled = await images.pull(f"{registry.host}/{NGINX}")
        if is_held:
            images.hold(pulled.id, "container")
        with failing(owner, name, number), suppress(OSError):
            await images.remove(pulled.id)
        await images.remove(pulled.id)
        if is_held:
            with failing(owner, name, number), suppress(OSError):
                await images.release("container")
            await images.release("container")
        assert (await images.usage()).used_bytes == 0
    assert place.left("layers", "blobs/sha256", "staging") == []


@contextmanager
def failing(owner: type, name: str, number: int) -> Iterator[None]:
    """One call of a method fails."""
    real, numbers = getattr(owner, name), itertools.count(1)

    def call(*arguments: Any, **options: Any) -> Any:
        if next(numbers) == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield


async def test_shared_layers_stay_with_the_last_image(images: Images, registry: Registry) -> None:
    names = [f"{registry.host}/k8s-staging-cri-tools/test-image-{n}:latest" for n in (1, 2)]
    one, two = [await images.pull(name) for name in names]
    await images.remove(one.id)
    assert all(path.is_dir() for path in images.lower_dirs(two))
    assert not images.lower_dirs(one)[0].exists()


async def test_containers_hold_layers(place: Place, registry: Registry) -> None:
    async with place.open() as images:
        pulled = await images.pull(f"{registry.host}/{NGINX}")
        layers = images.lower_dirs(pulled)
        images.hold(pulled.id, "container-1")
        images.hold(pulled.id, "container-2")
        images.hold(pulled.id, "container-1")
        await images.remove(pulled.id)
        assert images.find(pulled.id) is None
        await images.release("container-1")
        assert all(path.is_dir() for path in layers)
    async with place.open() as images:
        images.hold(pulled.id, "container-2")
        assert images.list() == []
        assert all(path.is_dir() for path in layers)
        await images.release("nobody")
        await images.release("container-2")
        assert not any(path.exists() for path in layers)


async def test_an_image_that_was_removed_gets_no_new_holder(
    images: Images, registry: Registry
) -> None:
    """A container that is being made meanwhile would run on layers that go with another image."""
    pulled = await images.pull(f"{registry.host}/{NGINX}")
    images.hold(pulled.id, "earlier")
    await images.remove(pulled.id)
    with pytest.raises(NotFound, match="was removed meanwhile"):
        images.hold(pulled.id, "container")
    images.hold(pulled.id, "earlier")
    assert images.holders == {"earlier"}


async def test_an_image_that_was_removed_comes_back_for_nothing(
    images: Images, registry: Registry
) -> None:
    pulled = await images.pull(f"{registry.host}/{NGINX}")
    images.hold(pulled.id, "container")
    await images.remove(pulled.id)
    fetched = images.counters.fetched_bytes
    assert (await images.pull(f"{registry.host}/{NGINX}")).id == pulled.id
    assert images.counters.fetched_bytes == fetched
    await images.release("container")
    assert all(path.is_dir() for path in images.lower_dirs(pulled))


async def test_usage_is_what_the_disk_says(place: Place, registry: Registry) -> None:
    async with place.open() as images:
        await images.pull(f"{registry.host}/{NGINX}")
        usage = await images.usage()
    assert usage.mountpoint == str(place.root)
    folders = [place.root / "layers", place.root / "blobs"]
    paths = [path for folder in folders for path in folder.rglob("*")]
    inodes = {path.lstat().st_ino: path.lstat().st_blocks * 512 for path in paths}
    assert abs(usage.inodes_used - len(inodes)) <= 4  # directories of ours
    assert abs(usage.used_bytes - sum(inodes.values())) < 100_000


async def test_pinned(place: Place, registry: Registry) -> None:
    name = f"{registry.host}/{NGINX}"
    async with place.open(pinned=[f"{registry.host}/pause:*"]) as images:
        assert not (await images.pull(name)).pinned
        assert (await images.pull(f"{registry.host}/pause:3.9")).pinned
    async with place.open(pinned=[name]) as images:
        assert {found.repo_tags[0]: found.pinned for found in images.list()} == {
            name: True,
            f"{registry.host}/pause:3.9": False,
        }


async def test_unknown_images(place: Place, registry: Registry) -> None:
    async with place.open() as images:
        for name in ("none:1", "e2e-test-images/nginx:none", f"none@sha256:{'0' * 64}"):
            with pytest.raises(NotFound, match=f"{registry.host}/{name}"):
                await images.pull(f"{registry.host}/{name}")
        with pytest.raises(InvalidArgument):
            await images.pull("0123456789abcdef" * 4)
        assert images.counters.pulls == {"failure": 3}
    assert place.left("layers", "blobs/sha256", "staging") == []


async def test_nobody_listens(images: Images) -> None:
    with pytest.raises(
        RegistryUnavailable, match=r'^RegistryUnavailable: image "127.0.0.1:1/a:latest"'
    ):
        await images.pull("127.0.0.1:1/a")


async def test_credentials(images: Images, private_registry: Registry) -> None:
    name = f"{private_registry.host}/library/busybox:1"
    pair = base64.b64encode(f"{USERNAME}:{PASSWORD}".encode()).decode()
    for auth in (None, Auth(username=USERNAME, password="wrong"), Auth(registry_token="wrong")):
        with pytest.raises(PermissionDenied, match=name):
            await images.pull(name, auth)
    assert images.list() == []
    first = await images.pull(name, Auth(username=USERNAME, password=PASSWORD))
    assert await images.pull(name, Auth(auth=pair, server_address=private_registry.host)) == first
    # That it is here says nothing about who may have it.
    with pytest.raises(PermissionDenied):
        await images.pull(name)


async def test_limits(place: Place, registry: Registry) -> None:
    name = f"{registry.host}/{NGINX}"
    for limits in (Limits(max_image_entries=100), Limits(max_image_bytes=1 << 20)):
        async with place.open(limits=limits) as images:
            with pytest.raises(ResourceExhausted, match="more than"):
                await images.pull(name)
            assert place.left("layers", "staging") == []


async def test_one_layer_at_a_time(place: Place, registry: Registry) -> None:
    async with place.open(limits=Limits(layers_at_once=1)) as images:
        names = [f"{registry.host}/{name}" for name in (NGINX, "bench/pull:1")]
        assert len(await asyncio.gather(*map(images.pull, names))) == 2


PULL_FOR_EVER = """
import asyncio, sys
from pathlib import Path
from nodeagent.images.catalog import Images
from nodeagent.images.remote.client import open_session
from nodeagent.store import Store
from nodeagent.tasks import Tasks

async def main():
    root = Path(sys.argv[1])
    store = Store.open(root / "state.db")
    images = await Images.open(
        root=root, store=store, hosts_dir=root / "none", session=open_session(), tasks=Tasks()
    )
    while True:
        await images.pull(sys.argv[2])
        print("pulled", flush=True)
        await images.remove(sys.argv[2])

asyncio.run(main())
"""


@pytest.mark.parametrize("pause", [0.02, 0.06, 0.15])
async def test_killed_at_any_moment(place: Place, registry: Registry, pause: float) -> None:
    name = f"{registry.host}/bench/pull:1"
    command = [sys.executable, "-c", PULL_FOR_EVER, str(place.root), name]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    await process.stdout.readline()
    await asyncio.sleep(pause)
    process.kill()
    await process.communicate()
    async with place.open() as images:
        for found in images.list():
            assert all(path.is_dir() for path in images.lower_dirs(found))
        pulled = await images.pull(name)
        for number, directory in enumerate(reversed(images.lower_dirs(pulled))):
            assert len(list(directory.rglob("file-*"))) == 400, number
        await images.remove(name)
    assert place.left("layers", "blobs/sha256", "staging") == []
