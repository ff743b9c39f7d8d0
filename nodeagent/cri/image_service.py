"""ImageService: its calls, each in a few lines. The methods have the names of the RPCs."""
# ruff: noqa: N802

import time
from collections.abc import AsyncGenerator

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri import messages, translate_images, validate, verbose
from nodeagent.cri.listing import Listing
from nodeagent.errors import SecurityProfileInvalid
from nodeagent.images.remote.auth import Auth
from nodeagent.lifecycle.node import Node
from nodeagent.records import Image


class ImageService:
    def __init__(self, node: Node) -> None:
        self._images = node.images
        self._artifacts = node.artifacts
        self._handlers = frozenset(("", *node.config.handlers))
        self._list = Listing(
            self._images.list, lambda record: messages.image(record).SerializeToString()
        )

    async def ListImages(self, request: pb.ListImagesRequest) -> bytes:
        return self._list.reply(lambda images: self._select(images, request.filter))

    async def StreamImages(self, request: pb.StreamImagesRequest) -> AsyncGenerator[bytes, None]:
        for part in self._list.stream(lambda images: self._select(images, request.filter)):
            yield part

    def _select(self, images: list[Image], given: pb.ImageFilter) -> list[Image]:
        translate_images.check(given.image, "filter.image", self._handlers)
        if not given.image.image:
            return images
        image = self._images.find(given.image.image)
        return [] if image is None else [image]

    async def ImageStatus(self, request: pb.ImageStatusRequest) -> pb.ImageStatusResponse:
        """Reply empty for an image that is not on the node: the CRI wants no error."""
        image = self._images.find(self._name(request.image))
        if image is None:
            return pb.ImageStatusResponse()
        info = verbose.image_info(image) if request.verbose else None
        return pb.ImageStatusResponse(image=messages.image(image), info=info)

    async def PullImage(self, request: pb.PullImageRequest) -> pb.PullImageResponse:
        """Reply with the image's id as image_ref, as all other calls do."""
        auth = _auth(request.auth) if request.HasField("auth") else None
        image = await self._images.pull(self._name(request.image), auth)
        return pb.PullImageResponse(image_ref=image.id)

    async def RemoveImage(self, request: pb.RemoveImageRequest) -> pb.RemoveImageResponse:
        await self._images.remove(self._name(request.image))
        return pb.RemoveImageResponse()

    async def PullSecurityProfile(
        self, request: pb.PullSecurityProfileRequest
    ) -> pb.PullSecurityProfileResponse:
        """Refuse an unknown kind with SecurityProfileInvalid, which the kubelet does not retry."""
        if request.profile_kind != pb.Seccomp:
            raise SecurityProfileInvalid(f"profile_kind: {request.profile_kind} is not Seccomp (1)")
        auth = _auth(request.auth) if request.HasField("auth") else None
        cached = await self._artifacts.pull(self._name(request.image), auth)
        return pb.PullSecurityProfileResponse(cached=cached)

    async def ListSecurityProfiles(
        self, request: pb.ListSecurityProfilesRequest
    ) -> pb.ListSecurityProfilesResponse:
        profiles = (
            pb.SecurityProfileInfo(digest=p.digest, refs=p.refs, size=p.size_bytes)
            for p in self._artifacts.list()
        )
        return pb.ListSecurityProfilesResponse(profiles=profiles)

    async def RemoveSecurityProfile(
        self, request: pb.RemoveSecurityProfileRequest
    ) -> pb.RemoveSecurityProfileResponse:
        await self._artifacts.remove(validate.given(request.digest, "digest"))
        return pb.RemoveSecurityProfileResponse()

    async def ImageFsInfo(self, request: pb.ImageFsInfoRequest) -> pb.ImageFsInfoResponse:
        """Report one file system twice: layers and writable layers are on the same one."""
        usage = await self._images.usage()
        filesystem = pb.FilesystemUsage(
            timestamp=time.time_ns(),
            fs_id=pb.FilesystemIdentifier(mountpoint=str(usage.mountpoint)),
            used_bytes=pb.UInt64Value(value=usage.used_bytes),
            inodes_used=pb.UInt64Value(value=usage.inodes_used),
        )
        return pb.ImageFsInfoResponse(
            image_filesystems=[filesystem], container_filesystems=[filesystem]
        )

    def _name(self, spec: pb.ImageSpec) -> str:
        translate_images.check(spec, "image", self._handlers)
        return validate.given(spec.image, "image.image")


def _auth(message: pb.AuthConfig) -> Auth:
    return Auth(
        username=message.username,
        password=message.password,
        auth=message.auth,
        server_address=message.server_address,
        identity_token=message.identity_token,
        registry_token=message.registry_token,
    )
