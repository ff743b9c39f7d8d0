"""Container images made of Debian programs: what the tests, critest and the benchmarks run.

The repositories and tags are those of the upstream images, so that a mirror table which sends their registries to
one of ours serves them. Everything is deterministic for given programs (fixed times, sorted entries), so digests stay
the same between runs; finished layers are kept below `.cache`. Nothing here pushes: see `tests.support.registry`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
DEBIAN = PROJECT / ".cache/debian"
LAYERS = PROJECT / ".cache/layers"

CREATED = "2024-01-01T00:00:00Z"
MTIME = 1704067200
ARCHITECTURES = ("amd64", "arm64")
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SHELL = {"Env": [PATH], "Cmd": ["sh"]}

# The one digest that a critest spec pulls by name; only upstream's bytes have it.
UPSTREAM_DIGEST = b"9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf"


@dataclass(frozen=True, slots=True)
class MediaTypes:
    index: str
    manifest: str
    config: str
    layer: str


OCI = MediaTypes(
    index="application/vnd.oci.image.index.v1+json",
    manifest="application/vnd.oci.image.manifest.v1+json",
    config="application/vnd.oci.image.config.v1+json",
    layer="application/vnd.oci.image.layer.v1.tar+gzip",
)
DOCKER = MediaTypes(
    index="application/vnd.docker.distribution.manifest.list.v2+json",
    manifest="application/vnd.docker.distribution.manifest.v2+json",
    config="application/vnd.docker.container.image.v1+json",
    layer="application/vnd.docker.image.rootfs.diff.tar.gzip",
)


# --- layers -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layer:
    """A gzipped tar, and the digest of the tar inside."""

    blob: bytes
    diff_id: str


class Tree:
    """The entries of a layer; parents come by themselves."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[tarfile.TarInfo, bytes]] = {}

    def directory(self, path: str, mode: int = 0o755, owner: int = 0) -> Tree:
        return self._add(path, tarfile.DIRTYPE, mode=mode, owner=owner)

    def file(self, path: str, data: bytes | str, mode: int = 0o644) -> Tree:
        raw = data.encode() if isinstance(data, str) else data
        return self._add(path, tarfile.REGTYPE, data=raw, mode=mode)

    def capable(self, path: str, data: bytes, capability: bytes) -> Tree:
        """A program with file capabilities: the value of its security.capability (capabilities(7))."""
        self.file(path, data, 0o755)
        value = capability.decode("utf-8", "surrogateescape")
        self._entries[path][0].pax_headers = {"SCHILY.xattr.security.capability": value}
        return self

    def hard_link(self, path: str, target: str) -> Tree:
        return self._add(path, tarfile.LNKTYPE, target=target, mode=0o755)

    def symlink(self, path: str, target: str) -> Tree:
        return self._add(path, tarfile.SYMTYPE, target=target, mode=0o777)

    def program(self, path: str, host: Path) -> Tree:
        """A dynamic executable of the host, with the libraries that ldd names."""
        self.file(path, host.read_bytes(), 0o755)
        listing = subprocess.run(["ldd", host], capture_output=True, text=True, check=True).stdout
        for library in re.findall(r"(?:=> )?(/\S+) \(0x", listing):
            self.file(library.strip("/"), Path(library).read_bytes(), 0o755)
        return self

    def tar(self) -> bytes:
        raw = io.BytesIO()
        extended = any(info.pax_headers for info, _ in self._entries.values())
        kind = tarfile.PAX_FORMAT if extended else tarfile.GNU_FORMAT
        with tarfile.open(fileobj=raw, mode="w", format=kind) as archive:
            for info, data in sorted(self._entries.values(), key=_extraction_order):
                archive.addfile(info, io.BytesIO(data))
        return raw.getvalue()

    def _add(
        self,
        path: str,
        kind: bytes,
        *,
        mode: int,
        data: bytes = b"",
        target: str = "",
        owner: int = 0,
    ) -> Tree:
        parent = path.rpartition("/")[0]
        if parent and parent not in self._entries:
            self.directory(parent)
        info = tarfile.TarInfo(path)
        info.type, info.mode, info.mtime = kind, mode, MTIME
        info.size, info.linkname, info.uid, info.gid = len(data), target, owner, owner
        self._entries[path] = (info, data)
        return self


def _extraction_order(entry: tuple[tarfile.TarInfo, bytes]) -> tuple[bool, str]:
    """By name, except that a hard link follows the file that it names."""
    info, _ = entry
    return info.islnk(), info.name


def layer(tree: Tree) -> Layer:
    tar = tree.tar()
    return Layer(gzip.compress(tar, compresslevel=6, mtime=0), digest(tar))


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _cached(name: str, make: Callable[[], Tree]) -> Layer:
    """The layer `name` as made before from the same recipe and programs, or made now."""
    recipe = hashlib.sha256(Path(__file__).read_bytes() + _programs_identity()).hexdigest()[:16]
    blob, diff_id = LAYERS / recipe / f"{name}.tar.gz", LAYERS / recipe / f"{name}.diff_id"
    if diff_id.exists():
        return Layer(blob.read_bytes(), diff_id.read_text())
    made = layer(make())
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(made.blob)
    diff_id.write_text(made.diff_id)
    return made


# --- programs ---------------------------------------------------------------------------------------


def debian_program(package: str, name: str) -> Path:
    """A program of a Debian package: as unpacked by `make`, else as installed."""
    for folder in ("bin", "usr/bin", "usr/sbin"):
        for root in (DEBIAN / package, Path("/")):
            if (root / folder / name).is_file():
                return root / folder / name
    raise FileNotFoundError(f"{name} (Debian package {package}); `make test-setup` unpacks it")


def static_busybox() -> Path:
    return debian_program("busybox-static", "busybox")


def _programs_identity() -> bytes:
    programs = (
        static_busybox(),
        debian_program("busybox", "busybox"),
        debian_program("nginx", "nginx"),
    )
    return repr([(str(path), path.stat().st_size) for path in programs]).encode()


def compiled(source: str, kind: str = "-static") -> bytes:
    """What gcc makes of `source`: a static program, or a library; no build ID, so the same bytes each time."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "main.c").write_text(source)
        command = f"gcc -Os {kind} -s -Wl,--build-id=none -o main main.c"
        subprocess.run(command.split(), cwd=folder, check=True)
        return Path(folder, "main").read_bytes()


PAUSE = r"""
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
static void leave(int signal) { (void)signal; _exit(0); }
static void reap(int signal) { (void)signal; while (waitpid(-1, 0, WNOHANG) > 0) ; }
int main(void)
{
	signal(SIGINT, leave);
	signal(SIGTERM, leave);
	signal(SIGCHLD, reap);
	for (;;)
		pause();
}
"""

EFFECTIVE_UID = r"""
#include <stdio.h>
#include <unistd.h>
int main(void) { printf("Effective uid: %d\n", (int)geteuid()); return 0; }
"""

# Two programs that critest calls in simple ways and that Debian's busybox has no applet for.
IPCS = "#!/bin/sh\ncat /proc/sysvipc/shm\n"
PGREP = """#!/bin/sh
found=1
for process in /proc/[0-9]*; do
	read -r name 2>/dev/null <"$process/comm" || continue
	case "$name" in *"$1"*) pid=${process#/proc/}; [ "$pid" = $$ ] || { echo "$pid"; found=0; } ;; esac
done
exit $found
"""

PASSWD = """root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
bin:x:2:2:bin:/bin:/bin/false
mail:x:8:8:mail:/var/spool/mail:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
"""
GROUP = """root:x:0:
daemon:x:1:
bin:x:2:
tty:x:5:
mail:x:8:
www-data:x:33:
users:x:100:
nogroup:x:65534:
"""

NGINX_CONF = """user nobody nogroup;
worker_processes 1;
pid /run/nginx.pid;
error_log /dev/stderr notice;
events {{ worker_connections 256; }}
http {{
	access_log /dev/stdout combined;
	client_body_temp_path /tmp; fastcgi_temp_path /tmp; proxy_temp_path /tmp;
	scgi_temp_path /tmp; uwsgi_temp_path /tmp;
	server {{ listen {port}; location / {{ default_type text/html; root /srv; index index.html; }} }}
}}
"""
PAGE = "<html><body><h1>It works!</h1></body></html>\n"
HTTPD = (
    "#!/bin/sh\necho 'httpd: starting on port 80'\nexec /bin/busybox httpd -f -vv -p 80 -h /srv\n"
)


def busybox_tree() -> Tree:
    """Applets are hard links, as upstream: a masked /bin/ls must not mask /bin/busybox.

    The shell is that of the dynamic busybox: the static one runs its own `ls` even where /bin/ls is masked.
    """
    program = static_busybox()
    tree = Tree().file("bin/busybox", program.read_bytes(), 0o755)
    applets = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout
    for applet in set(applets.split()) - {"busybox", "sh"}:
        tree.hard_link(f"bin/{applet}", "bin/busybox")
    tree.program("bin/sh", debian_program("busybox", "busybox"))
    tree.file("bin/ipcs", IPCS, 0o755).file("bin/pgrep", PGREP, 0o755)
    tree.symlink("usr/bin/env", "/bin/env").directory("usr/sbin")
    tree.file("etc/passwd", PASSWD).file("etc/group", GROUP)
    tree.directory("tmp", 0o1777).directory("var/tmp", 0o1777).directory("root", 0o700)
    tree.directory("home", owner=65534).directory("var/spool/mail", owner=8)
    tree.directory("var/www", owner=33).symlink("var/run", "/run")
    for name in ("dev", "proc", "sys", "run"):
        tree.directory(name)
    return tree


def _nginx(port: int) -> Tree:
    tree = Tree().program("usr/sbin/nginx", debian_program("nginx", "nginx"))
    tree.file("etc/nginx/nginx.conf", NGINX_CONF.format(port=port)).file("srv/index.html", PAGE)
    return tree.directory("var/log/nginx").directory("var/lib/nginx")


def _httpd() -> Tree:
    return Tree().file("srv/index.html", PAGE).file("usr/local/bin/httpd-foreground", HTTPD, 0o755)


def _group_in_image() -> Tree:
    user = "default-user:x:1000:1000::/home/default-user:/bin/sh\n"
    groups = "default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n"
    tree = Tree().file("etc/passwd", PASSWD + user).file("etc/group", GROUP + groups)
    return tree.directory("home/default-user", owner=1000)


def _incompressible(number: int) -> Tree:
    """A layer of its own for pull timings: 400 files, half of each compressible."""
    randomness, tree = random.Random(number), Tree()
    for i in range(400):
        name = f"data/{number}/{i % 16:02d}/file-{i:04d}"
        tree.file(name, randomness.randbytes(8192) + bytes([i % 251]) * 8192)
    return tree


# --- images -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Image:
    """What one repository holds under some tags: a manifest for each architecture, below an index if there are several.

    All architectures have the same layers: the foreign ones are never run, but make the runtime choose.
    """

    repository: str
    tags: tuple[str, ...]
    layers: tuple[Layer, ...]
    config: dict[str, Any] = field(default_factory=lambda: SHELL)
    media: MediaTypes = OCI
    architectures: tuple[str, ...] = ("amd64",)
    indexed: bool = True

    def blobs(self) -> Iterator[bytes]:
        yield from (layer.blob for layer in self.layers)
        yield from (self._config(architecture) for architecture in self.architectures)

    def manifests(self) -> list[bytes]:
        return [self._manifest(architecture) for architecture in self.architectures]

    def top(self) -> tuple[bytes, str]:
        """What the tags name, and its media type."""
        if not self.indexed:
            return self.manifests()[0], self.media.manifest
        entries = [
            descriptor(manifest, self.media.manifest)
            | {"platform": {"architecture": architecture, "os": "linux"}}
            for architecture, manifest in zip(self.architectures, self.manifests(), strict=True)
        ]
        index = {"schemaVersion": 2, "mediaType": self.media.index, "manifests": entries}
        return encode(index), self.media.index

    def _config(self, architecture: str) -> bytes:
        diff_ids = [layer.diff_id for layer in self.layers]
        return encode(
            {
                "architecture": architecture,
                "os": "linux",
                "created": CREATED,
                "config": self.config,
                "rootfs": {"type": "layers", "diff_ids": diff_ids},
                "history": [{"created": CREATED} for _ in diff_ids],
            }
        )

    def _manifest(self, architecture: str) -> bytes:
        return encode(
            {
                "schemaVersion": 2,
                "mediaType": self.media.manifest,
                "config": descriptor(self._config(architecture), self.media.config),
                "layers": [descriptor(layer.blob, self.media.layer) for layer in self.layers],
            }
        )


def encode(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()


def descriptor(blob: bytes, media_type: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest(blob), "size": len(blob)}


def write_archive(image: Image, path: Path) -> None:
    """The image as a tar of the OCI image layout, named `repository:tag` by the usual annotation."""
    tree = Tree().file("oci-layout", encode({"imageLayoutVersion": "1.0.0"}))
    top, media_type = image.top()
    for blob in (*image.blobs(), *image.manifests(), top):
        tree.file("blobs/" + digest(blob).replace(":", "/"), blob)
    entries = [
        descriptor(top, media_type)
        | {"annotations": {"org.opencontainers.image.ref.name": f"{image.repository}:{tag}"}}
        for tag in image.tags
    ]
    tree.file("index.json", encode({"schemaVersion": 2, "manifests": entries}))
    path.write_bytes(tree.tar())


def busybox() -> Image:
    return Image("library/busybox", ("latest", "1", "1.35"), (_cached("busybox", busybox_tree),))


def nginx() -> Image:
    """Serves `PAGE` on port 80 and logs to its stdout."""
    return _nginx_image("e2e-test-images/nginx", ("1.14-2", "1.14-4"), 80, indexed=True)


def pause() -> Image:
    """Waits for a signal: what other runtimes hold a pod's namespaces with."""
    return _pause("3.10")


def catalog() -> list[Image]:
    """Every image that the tests and critest pull."""
    return [*_kubernetes(), *_cri_tools(), *_docker_hub(), bench_pull()]


def bench_pull() -> Image:
    """An image that shares no layer with another one."""
    layers = tuple(_cached(f"bench-{n}", partial(_incompressible, n)) for n in range(3))
    return Image("bench/pull", ("1",), layers, {"Env": [PATH], "Cmd": ["none"]})


def digest_image() -> Image:
    """Stands in for the image that critest pulls by upstream's digest; see `patch_critest`."""
    return _marked("k8s-staging-cri-tools/test-image-digest", "latest")


def _base() -> Layer:
    return _cached("busybox", busybox_tree)


def _marked(repository: str, *tags: str) -> Image:
    """The busybox image made distinct by an empty file."""
    marker = layer(Tree().file(f"{repository.rpartition('/')[2]}-{tags[0]}", b""))
    return Image(repository, tags, (_base(), marker))


def _pause(version: str) -> Image:
    tree = _cached("pause", lambda: Tree().file("pause", compiled(PAUSE), 0o755))
    config = {
        "Env": [PATH],
        "Entrypoint": ["/pause"],
        "User": "65535:65535",
        "Labels": {"version": version},
    }
    return Image("pause", (version,), (tree,), config, DOCKER, ARCHITECTURES)


def _nginx_image(repository: str, tags: tuple[str, ...], port: int, *, indexed: bool) -> Image:
    config = {
        "Env": [PATH],
        "Cmd": ["nginx", "-g", "daemon off;"],
        "ExposedPorts": {f"{port}/tcp": {}},
        "StopSignal": "SIGTERM",
    }
    layers = (_base(), _cached(f"nginx-{port}", lambda: _nginx(port)))
    architectures = ARCHITECTURES if indexed else ARCHITECTURES[:1]
    return Image(
        repository, tags, layers, config, DOCKER if indexed else OCI, architectures, indexed
    )


def _kubernetes() -> list[Image]:
    """registry.k8s.io; the pauses are different images, as upstream: a spec counts the tags of 3.9."""
    repository = "e2e-test-images/"
    httpd = (_base(), _cached("httpd", _httpd))
    httpd_config = {"Env": [PATH], "Cmd": ["httpd-foreground"], "StopSignal": "SIGKILL"}
    setuid = _cached("nnp", lambda: Tree().file("nnp", compiled(EFFECTIVE_UID), 0o4755))
    return [
        *(_pause(version) for version in ("3.9", "3.10", "3.10.1", "3.10.2")),
        Image(
            repository + "busybox",
            ("1.29-2", "1.29-4", "latest"),
            (_base(),),
            SHELL,
            DOCKER,
            ARCHITECTURES,
        ),
        nginx(),
        Image(repository + "httpd", ("2.4.39-4",), httpd, httpd_config),
        Image(
            repository + "nonewprivs", ("1.3",), (_base(), setuid), {"Env": [PATH], "Cmd": ["/nnp"]}
        ),
    ]


def _cri_tools() -> list[Image]:
    """gcr.io/k8s-staging-cri-tools."""
    repository = "k8s-staging-cri-tools/"
    users = {
        "uid": "1002",
        "username": "www-data",
        "uid-group": "1003:1004",
        "username-group": "www-data:1004",
    }
    grouped = (_base(), layer(_group_in_image()))
    return [
        *(
            Image(
                f"{repository}test-image-user-{name}",
                ("latest",),
                (_base(),),
                {**SHELL, "User": user},
            )
            for name, user in users.items()
        ),
        Image(
            repository + "test-image-predefined-group",
            ("latest",),
            grouped,
            {**SHELL, "User": "1000"},
        ),
        _nginx_image(repository + "hostnet-nginx-amd64", ("latest",), 12003, indexed=False),
        *(
            _marked(f"{repository}test-image-{name}", "latest")
            for name in ("latest", "1", "2", "3")
        ),
        digest_image(),
        _marked(repository + "test-image-tags", "1", "2", "3"),
        _marked(repository + "test-image-tag", "test"),
        _marked(repository + "test-image-tag", "all"),
    ]


def _docker_hub() -> list[Image]:
    """docker.io, and what critest's benchmarks pull from public.ecr.aws."""
    variants = ("1.35.0-glibc", "1-uclibc", "1", "1-glibc", "1-musl")
    return [busybox(), *(_marked("docker/library/busybox", tag) for tag in variants)]


def patch_critest(critest: Path, patched: Path) -> None:
    """Copies critest with our digest in the place of upstream's, which no other image can have."""
    ours = digest(digest_image().top()[0]).removeprefix("sha256:").encode()
    program = critest.read_bytes()
    if UPSTREAM_DIGEST not in program:
        raise ValueError(f"{critest}: does not hold upstream's digest")
    patched.write_bytes(program.replace(UPSTREAM_DIGEST, ours))
    shutil.copymode(critest, patched)
