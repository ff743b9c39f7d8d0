"""Security profiles from OCI artifacts: fetched by digest, kept beside the images, and independent of them.

An artifact is two small documents, its manifest and the profile, in ``profiles/sha256/``. They are written before the
record that names them; the next start removes documents without a record, and records without documents.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Final, Self

import msgspec

from nodeagent.errors import InvalidArgument, NodeAgentError, NotFound, SecurityProfileInvalid
from nodeagent.images import artifact, manifest
from nodeagent.images.concurrency import SharedWork
from nodeagent.images.content import Documents, sync_file_system
from nodeagent.images.reference import Reference, parse
from nodeagent.images.remote.auth import Auth
from nodeagent.images.remote.client import Session
from nodeagent.images.remote.destinations import Scope
from nodeagent.images.remote.source import open_source
from nodeagent.records import StoredProfile
from nodeagent.store import Store
from nodeagent.tasks import Tasks, to_the_end

log = logging.getLogger(__name__)

KIND: Final = "security profile"
MAX_REFS = 1000  # of one profile, the latest; each of them is a name of the same bytes

_THREADS = 2

Check = Callable[[bytes], Awaitable[None]]


class SecurityProfiles:
    """The security profiles of a node, opened with `SecurityProfiles.open`.

    session: the node's, by which images are pulled too. check: raises SecurityProfileInvalid for a text that is no
    profile. private_redirects: as in `Limits` of images.
    """

    def __init__(
        self,
        root: Path,
        store: Store,
        hosts_dir: Path,
        session: Session,
        tasks: Tasks,
        check: Check,
        private_redirects: bool,
        resources: AsyncExitStack,
    ) -> None:
        self._root = root
        self._store = store
        self._hosts_dir = hosts_dir
        self._check = check
        self._floor = Scope.PRIVATE if private_redirects else Scope.PUBLIC
        self._resources = resources
        self._directory = root / "profiles/sha256"
        self._documents = Documents(self._directory)
        # Not the event loop's own threads, which the whole agent shares: a sync may last.
        self._threads = ThreadPoolExecutor(_THREADS, "profiles")
        resources.callback(self._threads.shutdown)
        self._session = session
        self._pulls: SharedWork[None] = SharedWork(tasks, "profile pull")
        resources.push_async_callback(self._pulls.close)
        self._changing = asyncio.Lock()
        self._profiles = {profile.digest: profile for profile in store.all(StoredProfile)}

    @classmethod
    async def open(
        cls,
        *,
        root: Path,
        store: Store,
        hosts_dir: Path,
        session: Session,
        tasks: Tasks,
        check: Check,
        private_redirects: bool = True,
    ) -> Self:
        """Open the profiles below `root`, and drop what a crash left incomplete."""
        async with AsyncExitStack() as resources:
            profiles = cls(
                root, store, hosts_dir, session, tasks, check, private_redirects, resources
            )
            await profiles._recover()
            profiles._resources = resources.pop_all()
            return profiles

    async def close(self) -> None:
        """Cancel all pulls, which undo themselves."""
        await self._resources.aclose()

    def list(self) -> Sequence[StoredProfile]:
        """All profiles, the oldest first."""
        return sorted(self._profiles.values(), key=lambda profile: profile.pulled_at)

    async def pull(self, reference: str, auth: Auth | None = None) -> bool:
        """Pull a profile, unless it is on the node; returns whether it was.

        Raises SecurityProfileInvalid for what can never be one; NotFound, PermissionDenied, RegistryUnavailable,
        DataLoss and ResourceExhausted as for an image. Nothing of it is kept then.
        """
        name = _pinned(reference)
        known = self._profiles.get(name.digest)
        is_here = known is not None and await self._text(known) is not None
        if not is_here:
            await self._pulls.join((name, auth), lambda: self._pull(name, reference, auth))
        self._remember(name.digest, reference)
        return is_here

    async def read(self, reference: str) -> bytes:
        """The text of a profile by its reference or digest. Raises NotFound for one that is not on the node."""
        profile = self._profiles.get(_pinned(reference).digest)
        text = await self._text(profile) if profile is not None else None
        if text is None:
            raise NotFound(f'{KIND} "{reference}": not on this node; pull it first')
        return text

    async def remove(self, digest: str) -> None:
        """Remove a profile; containers have its filter already. Succeeds where there is none."""
        async with self._changing:
            await self._forget(digest)

    async def _text(self, profile: StoredProfile) -> bytes | None:
        return await to_the_end(self._threads, partial(self._documents.get, profile.content))

    async def _pull(self, name: Reference, reference: str, auth: Auth | None) -> None:
        source = await open_source(self._session, name, auth, self._hosts_dir, self._floor, KIND)
        data, _ = await source.manifest(name.digest, artifact.parse_seccomp)
        text = await source.document(artifact.parse_seccomp(data))
        try:
            await self._check(text)
            await self._keep(name.digest, reference, data, text)
        except NodeAgentError as error:
            raise type(error)(f'{KIND} "{name}": {error}') from None

    async def _keep(self, digest: str, reference: str, data: bytes, text: bytes) -> None:
        """Store both documents, then the record. All of it survives a power cut on return; on failure nothing stays.

        Nothing is done where another pull, with other credentials, was faster: it has been answered for.
        """
        async with self._changing:
            old = self._profiles.get(digest)
            if old is not None and await self._text(old) is not None:
                return
            try:
                for document in (data, text):
                    await to_the_end(self._threads, partial(self._documents.put, document))
                profile = StoredProfile(
                    digest=digest,
                    content=manifest.digest(text),
                    refs=_joined(old.refs if old is not None else (), reference),
                    size_bytes=len(data) + len(text),
                    pulled_at=time.time_ns(),
                )
                self._store.put(profile)
                await self._store.settled()
                await to_the_end(self._threads, partial(sync_file_system, self._root))
            except BaseException:
                await self._forget(digest)
                raise
            self._profiles[digest] = profile  # only now: who finds it there is answered at once

    def _remember(self, digest: str, reference: str) -> None:
        """Add a name that the profile was pulled by, unless it was removed meanwhile."""
        profile = self._profiles.get(digest)
        if profile is not None and reference not in profile.refs:
            refs = _joined(profile.refs, reference)
            self._put(msgspec.structs.replace(profile, refs=refs))

    def _put(self, profile: StoredProfile) -> None:
        self._store.put(profile)
        self._profiles[profile.digest] = profile

    async def _forget(self, digest: str) -> None:
        """Delete the record, then the documents that no other record has."""
        try:
            self._store.delete(StoredProfile, digest)
            self._profiles.pop(digest, None)
        finally:
            await self._collect()

    async def _collect(self) -> None:
        owners = self._profiles.values()
        wanted = {d for owner in owners for d in (owner.digest, owner.content)}
        await to_the_end(self._threads, partial(self._documents.keep, wanted))

    async def _recover(self) -> None:
        self._documents.drop_damaged()
        for profile in self.list():
            if self._documents.get(profile.content) is None:
                log.warning("security profile %s: damaged, dropped; pull it again", profile.digest)
                self._store.delete(StoredProfile, profile.digest)
                del self._profiles[profile.digest]
        await self._collect()


def _pinned(reference: str) -> Reference:
    """Parse a reference. Raises SecurityProfileInvalid unless it names an artifact by its digest."""
    try:
        name = parse(reference, KIND)
    except InvalidArgument as error:
        raise SecurityProfileInvalid(str(error)) from None
    if not name.digest:
        raise SecurityProfileInvalid(f'{KIND} "{reference}": must be named by its digest')
    return name


def _joined(refs: Sequence[str], reference: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*refs, reference)))[-MAX_REFS:]
