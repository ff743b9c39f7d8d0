"""Resolution of an image's name to a plan: its manifest, its config and its layers."""

import asyncio
import logging

from nodeagent.errors import InvalidArgument, NodeAgentError, NotFound, Unsupported
from nodeagent.images import manifest
from nodeagent.images.content import Documents
from nodeagent.images.manifest import Descriptor, Index, Manifest
from nodeagent.images.plan import Plan
from nodeagent.images.remote.source import Source

log = logging.getLogger(__name__)

_MAX_NESTING = 3  # of indexes
_MAX_UNTOLD = 8  # manifests without a platform that are looked into


async def resolve(source: Source, documents: Documents) -> Plan:
    """Ask the registry for the image that the reference means on this node.

    It is asked even where the node has everything: tags move, and the registry decides who may have the image.
    Documents that the node has are not fetched again.
    """
    try:
        return await _Resolution(source, documents).run()
    except NodeAgentError as error:
        subject = f'image "{source.reference}": '
        if subject in str(error):
            raise
        raise type(error)(subject + str(error)) from None


class _Resolution:
    def __init__(self, source: Source, documents: Documents) -> None:
        self._source = source
        self._documents = documents
        self._kept: list[bytes] = []

    async def run(self) -> Plan:
        data, media_type = await self._source.manifest(self._source.reference.version)
        found = await self._for_this_node(data, media_type)
        digest = manifest.digest(self._kept[-1])
        config = await self._config(found.config)
        self._kept.append(config)
        image = manifest.parse_image(config, len(found.layers))
        return Plan(digest, found, image, tuple(self._kept))

    async def _for_this_node(self, data: bytes, media_type: str) -> Manifest:
        for _ in range(_MAX_NESTING):
            self._kept.append(data)
            document = manifest.parse_manifest(data, media_type)
            if isinstance(document, Manifest):
                return document
            data, media_type = await self._chosen(document)
        raise InvalidArgument(f"indexes in indexes, more than {_MAX_NESTING}")

    async def _chosen(self, index: Index) -> tuple[bytes, str]:
        """The manifest for this node; if the index has no platforms, the first whose config names this one."""
        first, *others = manifest.candidates(index)
        if not others:
            return await self._listed(first)
        for descriptor in (first, *others)[:_MAX_UNTOLD]:
            try:
                data, media_type = await self._listed(descriptor)
                if await self._says_so(manifest.parse_manifest(data, media_type)):
                    return data, media_type
            except (InvalidArgument, Unsupported) as error:
                log.debug("%s: %s: %s", self._source.reference, descriptor.digest, error)
        raise NotFound(f"no manifest for {manifest.PLATFORM} in an index that names no platforms")

    async def _says_so(self, document: Index | Manifest) -> bool:
        if isinstance(document, Index):
            return False
        config = await self._config(document.config)
        return manifest.is_for_this_node(
            manifest.parse_image(config, len(document.layers)).platform
        )

    async def _listed(self, descriptor: Descriptor) -> tuple[bytes, str]:
        if data := await self._here(descriptor):
            return data, descriptor.media_type or ""
        return await self._source.manifest(descriptor.digest)

    async def _config(self, descriptor: Descriptor) -> bytes:
        return await self._here(descriptor) or await self._source.document(descriptor)

    async def _here(self, descriptor: Descriptor) -> bytes | None:
        return await asyncio.to_thread(self._documents.get, descriptor.digest)
