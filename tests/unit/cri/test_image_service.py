"""ImageService over its socket, on a node in memory."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from nodeagent.images.remote.auth import Auth
from tests.unit.cri import records
from tests.unit.cri.node import Client, serving


@pytest.fixture(name="client")
async def client_of_node(tmp_path: Path) -> AsyncIterator[Client]:
    async with serving(tmp_path / "s") as client:
        yield client


def spec(image: str, handler: str = "") -> pb.ImageSpec:
    return pb.ImageSpec(image=image, runtime_handler=handler)


async def pull(client: Client, **fields: object) -> str:
    request = pb.PullImageRequest(**fields)  # type: ignore[arg-type]
    return str((await client.images.PullImage(request)).image_ref)


async def test_the_reference_of_a_pull_is_the_id_of_the_image(client: Client) -> None:
    reference = await pull(client, image=spec("reg/a:1"))
    status = await client.images.ImageStatus(pb.ImageStatusRequest(image=spec("reg/a:1")))
    assert status.image.id == reference
    assert client.node.images.pulls == [("reg/a:1", None)]


async def test_credentials_arrive(client: Client) -> None:
    auth = pb.AuthConfig(
        username="u",
        password="p",
        auth="a",
        server_address="s",
        identity_token="i",
        registry_token="r",
    )
    await pull(client, image=spec("a"), auth=auth)
    wanted = Auth(
        username="u",
        password="p",
        auth="a",
        server_address="s",
        identity_token="i",
        registry_token="r",
    )
    assert client.node.images.pulls == [("a", wanted)]


async def test_pulls_that_are_malformed(client: Client) -> None:
    for image in (spec(""), spec("a\n"), spec("a", handler="gvisor")):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await pull(client, image=image)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    await pull(client, image=spec("a", handler="kata"))


async def test_handlers_and_references_are_checked_in_every_call(client: Client) -> None:
    for image in (spec("a", handler="gvisor"), pb.ImageSpec(image="a", image_ref="a@sha256:b")):
        requests = (
            client.images.ImageStatus(pb.ImageStatusRequest(image=image)),
            client.images.RemoveImage(pb.RemoveImageRequest(image=image)),
            client.images.ListImages(pb.ListImagesRequest(filter=pb.ImageFilter(image=image))),
        )
        for request in requests:
            with pytest.raises(grpc.aio.AioRpcError, match=r"image\.(runtime_handler|image_ref): "):
                await request


async def test_an_image_that_is_not_here_is_no_error(client: Client) -> None:
    status = await client.images.ImageStatus(pb.ImageStatusRequest(image=spec("none")))
    assert not status.HasField("image")
    await client.images.RemoveImage(pb.RemoveImageRequest(image=spec("none")))


async def test_status_is_the_same_by_every_name(client: Client) -> None:
    image = records.image()
    client.node.images.records[image.id] = image
    answers = [
        await client.images.ImageStatus(pb.ImageStatusRequest(image=spec(name)))
        for name in (image.id, image.repo_tags[0])
    ]
    assert answers[0] == answers[1]
    verbose = await client.images.ImageStatus(
        pb.ImageStatusRequest(image=spec(image.id), verbose=True)
    )
    assert json.loads(verbose.info["info"])["layers"] == ["sha256:l"]


async def test_lists(client: Client) -> None:
    for image in (records.image("sha256:1", repo_tags=("a",)), records.image("sha256:2")):
        client.node.images.records[image.id] = image
    listed = (await client.images.ListImages(pb.ListImagesRequest())).images
    assert [image.id for image in listed] == ["sha256:1", "sha256:2"]
    for name, ids in (("a", ["sha256:1"]), ("b", [])):
        given = pb.ImageFilter(image=spec(name))
        found = (await client.images.ListImages(pb.ListImagesRequest(filter=given))).images
        assert [image.id for image in found] == ids
    parts = [part async for part in client.images.StreamImages(pb.StreamImagesRequest())]
    assert [image.id for part in parts for image in part.images] == ["sha256:1", "sha256:2"]
    await client.images.RemoveImage(pb.RemoveImageRequest(image=spec("a")))
    assert len((await client.images.ListImages(pb.ListImagesRequest())).images) == 1


async def test_the_file_system_has_every_number(client: Client) -> None:
    info = await client.images.ImageFsInfo(pb.ImageFsInfoRequest())
    for filesystem in (*info.image_filesystems, *info.container_filesystems):
        assert filesystem.timestamp > 0
        assert filesystem.fs_id.mountpoint == "/var/lib/x"
        assert filesystem.used_bytes.value == 4096
        assert filesystem.inodes_used.value == 7
    assert len(info.image_filesystems) == len(info.container_filesystems) == 1


PROFILE = "reg/p@sha256:1"


def profile(**fields: object) -> pb.PullSecurityProfileRequest:
    values = {"image": spec(PROFILE), "profile_kind": pb.Seccomp} | fields
    return pb.PullSecurityProfileRequest(**values)  # type: ignore[arg-type]


async def test_the_life_of_a_security_profile(client: Client) -> None:
    auth = pb.AuthConfig(username="u", password="p")
    first = await client.images.PullSecurityProfile(profile(auth=auth))
    second = await client.images.PullSecurityProfile(profile())
    assert (first.cached, second.cached) == (False, True)
    wanted = Auth(username="u", password="p")
    assert client.node.artifacts.pulls == [(PROFILE, wanted), (PROFILE, None)]
    listed = await client.images.ListSecurityProfiles(pb.ListSecurityProfilesRequest())
    assert list(listed.profiles) == [
        pb.SecurityProfileInfo(digest="sha256:1", refs=[PROFILE], size=9)
    ]
    for _ in range(2):
        request = pb.RemoveSecurityProfileRequest(digest="sha256:1")
        await client.images.RemoveSecurityProfile(request)
    listed = await client.images.ListSecurityProfiles(pb.ListSecurityProfilesRequest())
    assert not listed.profiles


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (profile(profile_kind=0), "SecurityProfileInvalid: profile_kind: 0"),
        (profile(profile_kind=2), "SecurityProfileInvalid: profile_kind: 2"),
        (profile(image=spec("")), "image.image: is required"),
        (profile(image=spec(PROFILE, handler="gvisor")), "image.runtime_handler: "),
    ],
)
async def test_security_profiles_that_cannot_be_pulled(
    client: Client, request_: pb.PullSecurityProfileRequest, text: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await client.images.PullSecurityProfile(request_)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert (error.value.details() or "").startswith(text)
    assert not client.node.artifacts.pulls
