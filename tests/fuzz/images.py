"""What registries, images and those who pull them send."""

import asyncio
import gzip
import io
import itertools
import json
import tarfile
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import zstandard
from google.protobuf.message import DecodeError
from yarl import URL

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri import image_service, messages, translate_images, verbose
from nodeagent.errors import (
    DataLoss,
    InvalidArgument,
    NodeAgentError,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    SecurityProfileInvalid,
    Unsupported,
)
from nodeagent.images import archive, artifact, manifest, reference
from nodeagent.images.budget import Budget
from nodeagent.images.content import Blob, BlobReader
from nodeagent.images.manifest import Index
from nodeagent.images.remote import auth, hosts
from nodeagent.images.remote.auth import ANONYMOUS, Credentials
from nodeagent.images.remote.client import Client, Session, Tls, open_session
from nodeagent.images.remote.destinations import Scope
from nodeagent.images.remote.hosts import Host
from nodeagent.images.remote.registry import Endpoint
from nodeagent.images.remote.source import Source
from nodeagent.images.unpack import inheritance, layers, tar
from nodeagent.images.unpack.compression import CHUNK_BYTES, decompressed
from nodeagent.lifecycle.plan import process
from nodeagent.records import Image
from nodeagent.requests import ContainerConfig
from nodeagent.sandbox.seccomp import oci as seccomp_oci
from tests.fuzz.target import Target, in_steps
from tests.support import artifacts, tars

DOMAIN = "registry.example:5000"
REGISTRY = Host(root=f"http://{DOMAIN}/v2")
DIGEST = manifest.digest(b"")
CONTAINER = ContainerConfig(name="c", image="i")


# --- names and documents --------------------------------------------------------------------------------------------


def image_name(data: bytes) -> None:
    text = data.decode(errors="replace")
    reference.id_prefix(text)
    found = reference.parse(text)
    assert reference.parse(str(found)) == found


IMAGE_NAMES = (
    b"busybox",
    b"quay.io/a/b__c:v1.0-x",
    f"localhost:5000/a@{DIGEST}".encode(),
    f"[::1]:80/a:b@{DIGEST}".encode(),
    b"index.docker.io/library/a-b.c",
    DIGEST.removeprefix("sha256:").encode(),
)


def profile_manifest(data: bytes) -> None:
    found = artifact.parse_seccomp(data)
    assert 0 < found.size <= artifact.MAX_PROFILE_BYTES


PROFILE_MANIFESTS = tuple(
    artifacts.Artifact(profile=b"{}", changes=changes).manifests()[0]
    for changes in ({}, {"artifactType": "", "annotations": {"a": "b"}, "layers": []})
)


def seccomp_profile(data: bytes) -> None:
    """The part of a profile that is read in the agent; what is compiled of it is compiled elsewhere."""
    seccomp_oci.decode(data, {"SYS_ADMIN"})


SECCOMP_PROFILES = (
    (
        b'{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,"architectures":["SCMP_ARCH_X86"],"flags":[],"syscalls":'
        b'[{"names":["read"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":1,"valueTwo":2,"op":"SCMP_CMP_MASKED_EQ"}'
        b'],"includes":{"caps":["CAP_SYS_ADMIN"],"arches":["amd64"],"minKernel":"4.8"},"excludes":{}}]}'
    ),
    b'{"defaultAction":"SCMP_ACT_ALLOW","archMap":[{"architecture":"SCMP_ARCH_X86_64","subArchitectures":[]}]}',
)


def image_manifest(data: bytes) -> None:
    """The last line is the media type that came with it."""
    document, _, media_type = data.rpartition(b"\n")
    found = manifest.parse_manifest(document, media_type.decode("latin-1"))
    if isinstance(found, Index):
        manifest.choose(found)
        return
    unasked: Any = None
    source = Source(unasked, reference.parse("a"), (), Scope.PRIVATE)
    for layer in found.layers:
        source._foreign(layer)


def descriptor(media_type: str, **fields: object) -> dict[str, object]:
    return {"mediaType": media_type, "digest": DIGEST, "size": 7} | fields


PLATFORM = {"os": "linux", "architecture": manifest.ARCHITECTURE, "variant": ""}
MANIFEST = {
    "schemaVersion": 2,
    "mediaType": manifest.OCI_MANIFEST,
    "config": descriptor("application/vnd.oci.image.config.v1+json"),
    "layers": [
        descriptor("application/vnd.oci.image.layer.v1.tar+gzip", annotations={"a": "b"}),
        descriptor(manifest.DOCKER_LAYER + ".gzip", urls=["https://elsewhere.example/layer"]),
    ],
}
INDEX = {
    "schemaVersion": 2,
    "manifests": [descriptor(manifest.DOCKER_MANIFEST, platform=PLATFORM), descriptor("")],
}
MANIFESTS = (
    json.dumps(MANIFEST).encode() + b"\n",
    json.dumps(MANIFEST).encode() + b"\n" + manifest.OCI_MANIFEST.encode(),
    json.dumps(INDEX).encode() + b"\n" + manifest.DOCKER_INDEX.encode(),
    json.dumps({"schemaVersion": 1, "fsLayers": []}).encode() + b"\n",
)


def image_config(data: bytes) -> None:
    """What becomes of it, too: it is kept, listed, and decides what a container runs."""
    found = manifest.parse_image(data, 1)
    image = Image(
        id=manifest.digest(data),
        manifest=DIGEST,
        layers=found.chain_ids,
        size_bytes=len(data),
        config=found.config,
        pulled_at=1,
    )
    assert msgspec.json.decode(msgspec.json.encode(image), type=Image) == image
    messages.image(image).SerializeToString()
    verbose.image_info(image)
    for text in process.environment(CONTAINER, image.config, "h"):
        assert "\0" not in text
        text.encode("utf-8", "surrogateescape")
    user = process.user(CONTAINER, image.config)
    for number in (user["uid"], user["gid"]):
        assert number is None or 0 <= number < 1 << 32
    process.stop_signal(CONTAINER, image.config)
    process.arguments(CONTAINER, image.config)


IMAGE_CONFIG = {
    "architecture": manifest.ARCHITECTURE,
    "os": "linux",
    "config": {
        "User": "1000:1000",
        "Env": ["PATH=/bin", "A=é"],
        "Entrypoint": ["sh"],
        "Cmd": ["-c", "true"],
        "WorkingDir": "a",
        "StopSignal": "SIGRTMIN+3",
        "Labels": {"a": "b"},
        "Volumes": {"/v": {}},
    },
    "rootfs": {"type": "layers", "diff_ids": [DIGEST]},
}
IMAGE_CONFIGS = (
    json.dumps(IMAGE_CONFIG).encode(),
    json.dumps(
        {"config": {"User": "app:app", "StopSignal": "9"}, "rootfs": IMAGE_CONFIG["rootfs"]}
    ).encode(),
)


# --- archives -------------------------------------------------------------------------------------------------------


def with_checksums(data: bytes) -> bytes:
    """The same with right checksums where headers are: what was changed at random would get no further."""
    fixed = bytearray(data)
    at = 0
    while at + tar.BLOCK <= len(fixed):
        block = fixed[at : at + tar.BLOCK]
        if any(block):
            total = sum(block) - sum(block[148:156]) + 8 * 32
            fixed[at + 148 : at + 156] = b"%06o\0 " % total
        digits = bytes(block[124:136]).strip(b" \0")
        size = int(digits, 8) if digits.isdigit() and not {*b"89"} & {*digits} else 0
        at += tar.BLOCK + size + -size % tar.BLOCK
    return bytes(fixed)


def tar_entries(data: bytes) -> None:
    """However the archive is cut into pieces, it is the same."""
    steps = data[:1]
    data = with_checksums(data[1:])
    whole = read_tar(iter([data]))
    assert read_tar(in_steps(steps + data)) == whole
    assert sum(len(content) for _, content, _ in whole[0]) <= len(data)


Holes = list[tuple[int, int]]  # after how much data, and of what size


def read_tar(chunks: Iterator[bytes]) -> tuple[list[tuple[tar.Entry, bytes, Holes]], str]:
    found: list[tuple[tar.Entry, bytes, Holes]] = []
    try:
        for entry, pieces in tar.read(chunks):
            content, holes = bytearray(), Holes()
            for piece in pieces:
                if isinstance(piece, tar.Hole):
                    holes.append((len(content), piece.size))
                else:
                    content += piece
            assert len(content) + sum(size for _, size in holes) == entry.size
            found.append((entry, bytes(content), holes))
    except (InvalidArgument, Unsupported) as error:
        return found, str(error)
    return found, ""


LAYER = (
    tars.directory("a", uid=5, mtime=7),
    tars.file("a/f", b"content", mode=0o4755, xattrs={"user.k": "v"}),
    tars.symlink("a/s", "/a/f"),
    tars.link("a/l", "below"),
    tars.link("h", "a/f"),
    tars.char("c", 1, 3),
    tars.member("p", tarfile.FIFOTYPE),
    tars.file("a/.wh.gone"),
    tars.file("b/.wh..wh..opq"),
    tars.file("é" * 120, b"x"),
    tars.symlink("d", "x" * 120),
)
LAYERS = (
    *(tars.archive(*LAYER, form=form) for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)),
    tars.archive(*LAYER[:4], form=tarfile.USTAR_FORMAT),
    tars.archive(tars.file("a"), tars.directory("a"), tars.symlink("a", "b"), tars.file("a/c")),
    *(
        tars.archive(
            tars.file("s", data, pax_headers={f"GNU.sparse.{key}": value for key, value in headers})
        )
        for headers, data in (
            ((("map", "2,5"), ("size", "9")), b"12345"),
            (
                (("major", "1"), ("minor", "0"), ("realsize", "9"), ("name", "t")),
                b"1\n2\n5\n".ljust(512, b"\0") + b"12345",
            ),
        )
    ),
)


def layer(data: bytes) -> None:
    """Unpacked for real, over another layer."""
    data = with_checksums(data)
    with tempfile.TemporaryDirectory(prefix="na-fuzz-") as name:
        folder = Path(name)
        below = folder / "below"
        (below / "a").mkdir(parents=True)
        (below / "below").write_text("below")
        budget = Budget(folder, max_bytes=1 << 20, max_entries=1000)
        diff_id = manifest.digest(data)
        blob = Blob(folder / "blob", diff_id, len(data))
        try:
            blob.append(data)
            blob.finish()
            unpacked = layers.unpack(BlobReader(blob), folder / "layer", diff_id, budget)
            inheritance.complete(folder / "layer", unpacked, [below], budget)
        finally:
            blob.close()
        assert {path.name for path in folder.iterdir()} == {"below", "blob", "layer"}
        assert (below / "below").read_text() == "below"


def image_archive(data: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="na-fuzz-") as folder:
        spooled = archive.spool(
            io.BytesIO(with_checksums(data)), Path(folder) / "files", max_bytes=1 << 20
        )
        spooled.images()


def image_archives() -> Iterator[bytes]:
    config = json.dumps(IMAGE_CONFIG).encode()
    layer = tars.archive(tars.file("f"))
    docker = [{"Config": "c.json", "RepoTags": ["a:b"], "Layers": ["l/layer.tar"]}]
    yield tars.archive(
        tars.file("manifest.json", json.dumps(docker).encode()),
        tars.file("c.json", config),
        tars.file("m/layer.tar", layer),
        tars.symlink("l/layer.tar", "../m/layer.tar"),
    )
    blob = {"mediaType": manifest.OCI_MANIFEST, "annotations": {"io.containerd.image.name": "a:b"}}
    document = json.dumps(
        MANIFEST
        | {
            "config": descriptor("", digest=manifest.digest(config), size=len(config)),
            "layers": MANIFEST["layers"][:1],  # type: ignore[index]
        }
    ).encode()
    blob |= {"digest": manifest.digest(document), "size": len(document)}  # type: ignore[dict-item]
    yield tars.archive(
        tars.file(f"blobs/sha256/{tars.digest(config)[7:]}", config),
        tars.file(f"blobs/sha256/{tars.digest(document)[7:]}", document),
        tars.file("index.json", json.dumps({"manifests": [blob]}).encode()),
    )


def compressed(data: bytes) -> None:
    for chunk in itertools.islice(decompressed(io.BytesIO(data)), 100):
        assert 0 < len(chunk) <= CHUNK_BYTES


COMPRESSED = (
    gzip.compress(b"one", mtime=0) + gzip.compress(bytes(1000), mtime=0),
    zstandard.compress(b"one") + zstandard.compress(bytes(1000)),
    b"\x28\xb5\x2f\xfd",
    b"plain",
)


# --- registries -----------------------------------------------------------------------------------------------------


def hosts_toml(data: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="na-fuzz-") as folder:
        file = Path(folder) / DOMAIN / "hosts.toml"
        file.parent.mkdir()
        file.write_bytes(data)
        for host in hosts.hosts_of(DOMAIN, Path(folder)):
            assert host.name
            unasked: Any = None
            client = Client(unasked, host, Tls(), floor=Scope.PRIVATE)
            Endpoint(client, host, ANONYMOUS, domain=DOMAIN, repository="a")


HOSTS = (
    b"""server = "https://registry.example"
ca = "/etc/ca.pem"
[host."https://one.example:8443/docker"]
capabilities = ["pull", "resolve"]
client = [["c.pem", "k.pem"], "both.pem"]
skip_verify = true
dial_timeout = "1m1.5s"
proxy = "http://proxy:3128"
[host."https://one.example:8443/docker".header]
x-one = "a"
x-two = ["b", "c"]
""",
    b'[host."http://[::1]:80/api/"]\noverride_path = true\nclient = "pair.pem"\n',
)


def challenge(data: bytes) -> None:
    """Header lines, as aiohttp gives them."""
    lines = data.decode("utf-8", "surrogateescape").split("\n")
    known = Credentials("user", "secret")
    for found in auth.parse_challenges(lines):
        asked = auth.token_request(found, known, "repository:a:pull", root=REGISTRY.root)
        assert asked.realm.lower().startswith(("http://", "https://"))
        URL(asked.realm, encoded=True).update_query(asked.query)


CHALLENGES = (
    b'Bearer realm="https://auth.example/token",service="s",scope="repository:a:pull"',
    b'Basic realm="a\\"b", charset=UTF-8, Bearer realm=http://auth.example/t',
    b"Negotiate\nBasic",
)


def token_answer(data: bytes) -> None:
    auth.parse_token(data)


def registry_answers(data: bytes) -> None:
    """A registry, and its token service, that say what they like; the answers are separated by a line."""
    known = Credentials("user", "secret")
    asyncio.run(_ask(known, *data.split(b"\n----\n")))


ANSWERS = (
    b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nConnection: close\r\n\r\n"
    + json.dumps(MANIFEST).encode(),
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    (
        b'HTTP/1.1 401 No\r\nWWW-Authenticate: Bearer realm="http://t.example/t",service="s"\r\n'
        b'Content-Length: 0\r\n\r\n\n----\nHTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"token":"t"}'
        b"\n----\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    ),
    b'HTTP/1.1 404 No\r\nContent-Length: 49\r\n\r\n{"errors":[{"code":"UNKNOWN","message":"what?"}]}',
    (
        b"HTTP/1.1 307 There\r\nLocation: http://b.example/x?s=%2F\r\nContent-Length: 0\r\n\r\n"
        b"\n----\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    ),
)


def pull_request(data: bytes) -> None:
    """Whatever credentials come with it, a registry that wants them is asked."""
    request = pb.PullImageRequest.FromString(data)
    translate_images.check(request.image, "image", ("",))
    found = reference.parse(request.image.image)
    host = Host(root=f"http://{found.domain}/v2")
    known = auth.credentials(image_service._auth(request.auth), found.domain, host)
    wanted = b'HTTP/1.1 401 No\r\nWWW-Authenticate: %s realm="http://t.example/"\r\nContent-Length: 0\r\n\r\n'
    token = b'HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"token":"t"}'
    asyncio.run(_ask(known, wanted % b"Bearer", token, ANSWERS[0]))
    asyncio.run(_ask(known, wanted % b"Basic", ANSWERS[0]))


def pull_requests() -> Iterator[bytes]:
    for given in (
        {"username": "u", "password": "p"},
        {"auth": "dTpw", "server_address": "https://index.docker.io/v1/"},
        {"identity_token": "i", "server_address": "registry.example:5000"},
        {"registry_token": "r"},
    ):
        image = pb.ImageSpec(image="registry.example:5000/a:b")
        yield pb.PullImageRequest(image=image, auth=pb.AuthConfig(**given)).SerializeToString()


async def _ask(known: Credentials, *answers: bytes) -> None:
    async with _answering(answers) as session:
        client = Client(session, REGISTRY, Tls(), floor=Scope.PRIVATE)
        endpoint = Endpoint(client, REGISTRY, known, domain=DOMAIN, repository="a")
        manifest.parse_manifest(*await endpoint.manifest("b"))


@asynccontextmanager
async def _answering(answers: tuple[bytes, ...]) -> AsyncIterator[Session]:
    """A session of which every connection, whoever is meant, gets the next answer, and is closed."""
    left = iter(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(next(left, b""))
            writer.write_eof()
            await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
            pass
        finally:
            writer.close()

    with tempfile.TemporaryDirectory(prefix="na-fuzz-") as folder:
        path = f"{folder}/registry.sock"
        async with await asyncio.start_unix_server(serve, path), open_session() as session:
            assert session.http.connector is not None
            await session.http.connector.close()
            session.http._connector = aiohttp.UnixConnector(path, force_close=True)
            yield session


DOCUMENT_REFUSALS = (InvalidArgument, Unsupported, NotFound)
TARGETS = (
    Target(image_name, (InvalidArgument,), IMAGE_NAMES),
    Target(image_manifest, DOCUMENT_REFUSALS, MANIFESTS),
    Target(image_config, DOCUMENT_REFUSALS, IMAGE_CONFIGS),
    Target(profile_manifest, (SecurityProfileInvalid,), PROFILE_MANIFESTS),
    Target(seccomp_profile, (InvalidArgument, Unsupported), SECCOMP_PROFILES),
    Target(tar_entries, (), tuple(b"\x07" + data for data in LAYERS)),
    Target(layer, (InvalidArgument, Unsupported, DataLoss, ResourceExhausted), LAYERS),
    Target(
        image_archive,
        (*DOCUMENT_REFUSALS, DataLoss, ResourceExhausted),
        tuple(image_archives()),
    ),
    Target(compressed, (InvalidArgument,), COMPRESSED),
    Target(hosts_toml, (InvalidArgument,), HOSTS),
    Target(challenge, (PermissionDenied,), CHALLENGES),
    Target(token_answer, (PermissionDenied,), (b'{"token":"t"}', b'{"access_token":"t","x":[]}')),
    Target(registry_answers, (NodeAgentError,), ANSWERS),
    Target(pull_request, (NodeAgentError, DecodeError), tuple(pull_requests())),
)
