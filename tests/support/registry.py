"""A real image registry on loopback: Debian's docker-registry, with a storage that goes away with it."""

from __future__ import annotations

import base64
import http.client
import re
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import images

CONFIG = """version: 0.1
log: {{level: info}}
storage:
  filesystem: {{rootdirectory: "{storage}"}}
  delete: {{enabled: true}}
http: {{addr: "{address}", secret: "none"}}
"""
AUTH = """auth:
  htpasswd: {{realm: registry, path: "{path}"}}
"""
USERNAME, PASSWORD = "user", "secret"  # of a registry that asks for them
HTPASSWD = "user:$2b$05$nodeagentnodeagentnodef6lBI/Wi0lzYfHulIt2adsEK2fwBqc2\n"


@dataclass(slots=True)
class Registry:
    """A running registry. `host` is what stands before the first slash of a reference."""

    host: str
    storage: Path
    authenticated: bool = False
    _present: set[tuple[str, str]] = field(default_factory=set)

    def push(self, image: images.Image) -> str:
        """Uploads the image under all its tags; returns the digest that the tags have."""
        for blob in image.blobs():
            self._push_blob(image.repository, blob)
        for manifest in image.manifests():
            self.put_manifest(
                image.repository, images.digest(manifest), manifest, image.media.manifest
            )
        top, media_type = image.top()
        for tag in image.tags:
            self.put_manifest(image.repository, tag, top, media_type)
        return images.digest(top)

    def put_manifest(
        self, repository: str, reference: str, manifest: bytes, media_type: str
    ) -> None:
        path = f"/v2/{repository}/manifests/{reference}"
        self.request("PUT", path, manifest, {"Content-Type": media_type})

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> http.client.HTTPResponse:
        """One request; an error status raises."""
        connection = http.client.HTTPConnection(self.host, timeout=30)
        try:
            connection.request(method, path, body, {**self._credentials(), **(headers or {})})
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        if response.status >= http.client.BAD_REQUEST:
            raise OSError(f"{method} {path}: {response.status} {text[:300]!r}")
        return response

    def _push_blob(self, repository: str, blob: bytes) -> None:
        name = images.digest(blob)
        if (repository, name) in self._present:
            return
        known = next((other for other, digest in self._present if digest == name), None)
        mount = f"?mount={name}&from={known}" if known else ""
        answer = self.request("POST", f"/v2/{repository}/blobs/uploads/{mount}", b"")
        if answer.status == http.client.ACCEPTED:
            location = answer.headers["Location"].partition(self.host)[2]
            self.request("PUT", f"{location}&digest={name}", blob)
        self._present.add((repository, name))

    def _credentials(self) -> dict[str, str]:
        if not self.authenticated:
            return {}
        token = base64.b64encode(f"{USERNAME}:{PASSWORD}".encode()).decode()
        return {"Authorization": f"Basic {token}"}


@contextmanager
def running_registry(folder: Path, *, authenticated: bool = False) -> Iterator[Registry]:
    """A registry that keeps what it is given below `folder`, on a port that the kernel chose."""
    folder.mkdir(parents=True, exist_ok=True)
    storage, log = folder / "storage", folder / "registry.log"
    command = registry_command(folder, "127.0.0.1:0", storage, authenticated=authenticated)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield Registry(_address(process, log), storage, authenticated)
    finally:
        process.kill()
        process.wait()


def registry_command(
    folder: Path, address: str, storage: Path, *, authenticated: bool = False
) -> list[str]:
    """How to start a registry, with its configuration in `folder`."""
    text = CONFIG.format(storage=storage, address=address)
    if authenticated:
        (folder / "htpasswd").write_text(HTPASSWD)
        text += AUTH.format(path=folder / "htpasswd")
    (folder / "registry.yml").write_text(text)
    program = images.debian_program("docker-registry", "docker-registry")
    return [str(program), "serve", str(folder / "registry.yml")]


def fill(registry: Registry, wanted: Iterable[images.Image]) -> None:
    for image in wanted:
        registry.push(image)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"listening on (127\.0\.0\.1:\d+)", log.read_text())
        if found:
            return found[1]
        time.sleep(0.02)
    raise RuntimeError(f"docker-registry did not start: {log.read_text()[-1000:]}")
