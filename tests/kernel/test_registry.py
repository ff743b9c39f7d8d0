"""The registry of the tests serves what it was given, under the digests that it was given it."""

import pytest

from tests.support import images
from tests.support.registry import Registry


def test_serves_an_image_by_tag(registry: Registry) -> None:
    answer = registry.request(
        "HEAD", "/v2/e2e-test-images/nginx/manifests/1.14-2", headers=_accept()
    )
    assert answer.headers["Docker-Content-Digest"] == images.digest(images.nginx().top()[0])


def test_layers_are_what_they_were_before() -> None:
    rebuilt = images.layer(images.busybox_tree())
    assert rebuilt == images.busybox().layers[0]


def test_asks_for_a_password(private_registry: Registry) -> None:
    stranger = Registry(private_registry.host, private_registry.storage)
    with pytest.raises(OSError, match="401"):
        stranger.request("GET", "/v2/")
    assert private_registry.request("GET", "/v2/").status == 200


def _accept() -> dict[str, str]:
    return {"Accept": f"{images.DOCKER.index}, {images.OCI.index}"}
