"""Security profiles out of registries: what is kept of them, and that nothing is of those that cannot be."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from nodeagent.errors import (
    DataLoss,
    NotFound,
    PermissionDenied,
    RegistryUnavailable,
    SecurityProfileInvalid,
)
from nodeagent.images import profiles as module
from nodeagent.images.profiles import SecurityProfiles
from nodeagent.images.remote.auth import Auth
from nodeagent.images.remote.client import open_session
from nodeagent.store import Store
from nodeagent.tasks import Tasks
from tests.support import artifacts, images
from tests.support.artifacts import Artifact
from tests.support.fake_registry import Server, send_part
from tests.support.node import PATIENCE_SECONDS
from tests.support.places import Place
from tests.support.registry import PASSWORD, USERNAME, Registry, running_registry

PROFILE = artifacts.seccomp({"defaultAction": "SCMP_ACT_ALLOW"})
OTHER = artifacts.seccomp({"defaultAction": "SCMP_ACT_LOG"})


async def check(text: bytes) -> None:
    if b"defaultAction" not in text:
        raise SecurityProfileInvalid("no action")


@asynccontextmanager
async def opened(place: Place) -> AsyncIterator[SecurityProfiles]:
    store = Store.open(place.root / "state.db")
    try:
        async with open_session() as session:
            profiles = await SecurityProfiles.open(
                root=place.root,
                store=store,
                hosts_dir=place.certs,
                session=session,
                tasks=Tasks(),
                check=check,
            )
            try:
                yield profiles
            finally:
                await profiles.close()
    finally:
        store.close()


@pytest.fixture
async def profiles(place: Place) -> AsyncIterator[SecurityProfiles]:
    async with opened(place) as found:
        yield found


@pytest.fixture
def kept(place: Place) -> Path:
    return place.root / "profiles/sha256"


def documents(*pulled: Artifact) -> set[str]:
    """The names of the files that are kept of them."""
    kept = [document for one in pulled for document in (one.manifests()[0], one.profile)]
    return {images.digest(document).removeprefix("sha256:") for document in kept}


def left(kept: Path) -> set[str]:
    return {path.name for path in kept.iterdir()}


async def test_pull_list_read_remove(
    profiles: SecurityProfiles, server: Server, kept: Path
) -> None:
    digest = server.add(PROFILE)
    name = PROFILE.reference(server.host)
    assert await profiles.pull(name) is False
    [found] = profiles.list()
    assert (found.digest, found.refs, found.size_bytes) == (digest, (name,), PROFILE.size)
    assert await profiles.read(name) == PROFILE.profile
    assert left(kept) == documents(PROFILE)
    for _ in range(2):
        await profiles.remove(digest)
    assert (list(profiles.list()), left(kept)) == ([], set())
    with pytest.raises(NotFound, match="not on this node; pull it first"):
        await profiles.read(name)


async def test_what_is_here_is_asked_of_nobody(profiles: SecurityProfiles, server: Server) -> None:
    server.add(PROFILE)
    name = PROFILE.reference(server.host)
    await profiles.pull(name)
    asked = len(server.requests)
    again = f"other.example/x/y:1@{PROFILE.digest}"
    assert await profiles.pull(name) is True
    assert await profiles.pull(again) is True
    assert len(server.requests) == asked
    [found] = profiles.list()
    assert found.refs == (name, again)
    assert await profiles.read(f"third.example/z@{PROFILE.digest}") == PROFILE.profile


async def test_the_refs_of_a_profile_are_bounded(
    profiles: SecurityProfiles, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_REFS", 3)
    server.add(PROFILE)
    for name in [
        PROFILE.reference(server.host),
        *(f"r.example/{n}@{PROFILE.digest}" for n in "abc"),
    ]:
        await profiles.pull(name)
    [found] = profiles.list()
    assert [ref.partition("@")[0] for ref in found.refs] == [f"r.example/{n}" for n in "abc"]


async def test_two_artifacts_of_one_profile_share_it(
    profiles: SecurityProfiles, server: Server, kept: Path
) -> None:
    twin = Artifact(profile=PROFILE.profile, changes={"annotations": {"a": "b"}})
    for one in (PROFILE, twin):
        server.add(one)
        await profiles.pull(one.reference(server.host))
    assert left(kept) == documents(PROFILE, twin)
    await profiles.remove(PROFILE.digest)
    assert left(kept) == documents(twin)
    assert await profiles.read(twin.reference(server.host)) == twin.profile


async def test_what_is_here_survives_a_restart(place: Place, server: Server, kept: Path) -> None:
    server.add(PROFILE)
    server.add(OTHER)
    names = [one.reference(server.host) for one in (PROFILE, OTHER)]
    async with opened(place) as profiles:
        for name in names:
            await profiles.pull(name)
    (kept / "stray").write_bytes(b"of a pull that was cut off")
    (kept / images.digest(OTHER.profile).removeprefix("sha256:")).write_bytes(b"damaged")
    async with opened(place) as profiles:
        assert [found.refs for found in profiles.list()] == [(names[0],)]
        assert await profiles.read(names[0]) == PROFILE.profile
        assert left(kept) == documents(PROFILE)


async def test_what_is_damaged_is_fetched_again(
    profiles: SecurityProfiles, server: Server, kept: Path
) -> None:
    server.add(PROFILE)
    name = PROFILE.reference(server.host)
    await profiles.pull(name)
    (kept / images.digest(PROFILE.profile).removeprefix("sha256:")).write_bytes(b"damaged")
    with pytest.raises(NotFound):
        await profiles.read(name)
    assert await profiles.pull(name) is False
    assert await profiles.read(name) == PROFILE.profile


@pytest.mark.parametrize(
    ("artifact", "text"),
    [
        (Artifact(profile=b'{"x": 1}'), "no action"),
        (Artifact(profile=PROFILE.profile, changes={"artifactType": "a/b"}), "with a config"),
        (Artifact(profile=PROFILE.profile, changes={"layers": []}), "0 layers"),
    ],
)
async def test_what_is_no_profile(
    profiles: SecurityProfiles, server: Server, kept: Path, artifact: Artifact, text: str
) -> None:
    server.add(artifact)
    name = artifact.reference(server.host)
    with pytest.raises(SecurityProfileInvalid) as error:
        await profiles.pull(name)
    assert str(error.value).startswith(f'security profile "{name}": ')
    assert text in str(error.value)
    assert (list(profiles.list()), left(kept)) == ([], set())


async def test_an_image_is_no_profile(profiles: SecurityProfiles, registry: Registry) -> None:
    digest = images.digest(images.busybox().top()[0])
    name = f"{registry.host}/{images.busybox().repository}@{digest}"
    with pytest.raises(SecurityProfileInvalid, match=r"index\.v1\+json\", not an artifact"):
        await profiles.pull(name)


@pytest.mark.parametrize("name", ["reg.example/p:1", "reg.example/p", "A B", f"sha256:{'a' * 64}"])
async def test_a_profile_is_named_by_its_digest(profiles: SecurityProfiles, name: str) -> None:
    with pytest.raises(SecurityProfileInvalid, match=f'^security profile "{name}": '):
        await profiles.pull(name)


async def test_what_the_registry_has_not(profiles: SecurityProfiles, server: Server) -> None:
    """Whoever reads it knows of no image."""
    name = PROFILE.reference(server.host)
    with pytest.raises(NotFound) as no_manifest:
        await profiles.pull(name)
    server.add(PROFILE)
    del server.contents[
        next(path for path in server.contents if images.digest(PROFILE.profile) in path)
    ]
    with pytest.raises(NotFound) as no_text:
        await profiles.pull(name)
    told = [str(caught.value) for caught in (no_manifest, no_text)]
    assert all(text.startswith(f'security profile "{name}": http') for text in told)
    assert told[0].endswith("; look at the security profile's name and digest")
    assert told[1].endswith("; a part of the security profile is not there any more, push it again")
    assert not any("image" in text for text in told)


async def test_another_profile_in_its_place(
    profiles: SecurityProfiles, server: Server, kept: Path
) -> None:
    server.add(PROFILE)
    path = next(path for path in server.contents if images.digest(PROFILE.profile) in path)
    server.contents[path] = PROFILE.profile[::-1], "application/octet-stream"
    with pytest.raises(DataLoss):
        await profiles.pull(PROFILE.reference(server.host))
    assert left(kept) == set()


async def test_a_registry_that_is_down(
    profiles: SecurityProfiles, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodeagent.images.remote.source.FIRST_PAUSE_SECONDS", 0)

    async def down(_: web.Request) -> web.StreamResponse:
        return web.Response(status=503)

    server.hooks.append(down)
    name = PROFILE.reference(server.host)
    with pytest.raises(
        RegistryUnavailable, match=f'^RegistryUnavailable: security profile "{name}": .*503'
    ):
        await profiles.pull(name)
    assert not profiles.list()


async def test_a_pull_that_is_cut_off_leaves_nothing(
    profiles: SecurityProfiles, server: Server, kept: Path
) -> None:
    server.add(PROFILE)
    held = asyncio.Event()

    async def hold(request: web.Request) -> web.StreamResponse | None:
        if "/blobs/" not in request.path:
            return None
        response = await send_part(request, PROFILE.profile, 4)
        held.set()
        await asyncio.Event().wait()
        return response

    server.hooks.append(hold)
    pull = asyncio.create_task(profiles.pull(PROFILE.reference(server.host)))
    await held.wait()
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    assert (list(profiles.list()), left(kept)) == ([], set())


async def test_one_that_is_cut_off_while_it_is_written_leaves_nothing(
    profiles: SecurityProfiles, server: Server, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(PROFILE)
    loop, reached = asyncio.get_running_loop(), asyncio.Event()

    def slow(_: Path) -> None:
        loop.call_soon_threadsafe(reached.set)

    monkeypatch.setattr(module, "sync_file_system", slow)
    pull = asyncio.create_task(profiles.pull(PROFILE.reference(server.host)))
    await reached.wait()
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    assert (list(profiles.list()), left(kept)) == ([], set())


async def test_what_was_answered_for_stays_when_a_pull_with_other_credentials_is_cut_off(
    profiles: SecurityProfiles, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(PROFILE)
    name = PROFILE.reference(server.host)
    loop, syncs = asyncio.get_running_loop(), asyncio.Semaphore(0)
    gates = [threading.Event(), threading.Event()]
    numbers = itertools.count()

    def slow(_: Path) -> None:
        loop.call_soon_threadsafe(syncs.release)
        assert gates[next(numbers)].wait(PATIENCE_SECONDS)

    monkeypatch.setattr(module, "sync_file_system", slow)
    pulls = [
        asyncio.create_task(profiles.pull(name, auth)) for auth in (None, Auth(username="other"))
    ]
    await syncs.acquire()
    assert list(profiles.list()) == [], "a pull that finds it there is answered at once"
    gates[0].set()
    _, left = await asyncio.wait(pulls, return_when=asyncio.FIRST_COMPLETED)
    if left:
        again = asyncio.create_task(syncs.acquire())
        await asyncio.wait([again, *left], return_when=asyncio.FIRST_COMPLETED)
        for task in (again, *left):
            task.cancel()
    gates[1].set()
    await asyncio.gather(*left, return_exceptions=True)
    assert [profile.digest for profile in profiles.list()] == [PROFILE.digest]
    assert await profiles.read(name) == PROFILE.profile


async def test_the_end_of_one_pull_is_not_that_of_others(
    profiles: SecurityProfiles, server: Server, kept: Path
) -> None:
    """Each writes documents that no record names yet."""
    bad = Artifact(profile=b"{}")
    for one in (PROFILE, OTHER, bad):
        server.add(one)
    results = await asyncio.gather(
        *(profiles.pull(one.reference(server.host)) for one in (PROFILE, bad, OTHER, PROFILE)),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [bool, SecurityProfileInvalid, bool, bool]
    assert left(kept) == documents(PROFILE, OTHER)


# ---- with Debian's docker-registry at the other end ----


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("guarded"), authenticated=True) as registry:
        registry.push(PROFILE)
        yield registry


async def test_credentials_are_used(profiles: SecurityProfiles, guarded: Registry) -> None:
    name = PROFILE.reference(guarded.host)
    with pytest.raises(PermissionDenied, match="a private security profile needs a pull secret"):
        await profiles.pull(name)
    with pytest.raises(PermissionDenied):
        await profiles.pull(name, Auth(username=USERNAME, password="wrong"))
    assert await profiles.pull(name, Auth(username=USERNAME, password=PASSWORD)) is False
    assert json.loads(await profiles.read(name)) == {"defaultAction": "SCMP_ACT_ALLOW"}
