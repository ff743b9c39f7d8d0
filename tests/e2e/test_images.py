"""Images over the CRI, from a real registry, and from a file."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.support import images
from tests.support.cri import Cri, refused
from tests.support.node import RunningAgent
from tests.support.registry import PASSWORD, USERNAME, Registry


def pull(agent: RunningAgent, reference: str, **auth: str) -> str:
    request = pb.PullImageRequest(
        image=pb.ImageSpec(image=reference), auth=pb.AuthConfig(**auth) if auth else None
    )
    return str(agent.images.PullImage(request, timeout=60).image_ref)


def status(agent: RunningAgent, reference: str) -> pb.ImageStatusResponse:
    request = pb.ImageStatusRequest(image=pb.ImageSpec(image=reference))
    answer: pb.ImageStatusResponse = agent.images.ImageStatus(request, timeout=60)
    return answer


def remove(agent: RunningAgent, reference: str) -> None:
    agent.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=reference)))


def test_one_image_by_every_name(agent: RunningAgent, registry: Registry) -> None:
    reference = f"{registry.host}/k8s-staging-cri-tools/test-image-1"
    image_id = pull(agent, reference)
    image = status(agent, reference).image
    assert image.id == image_id
    assert list(image.repo_tags) == [f"{reference}:latest"]
    assert image.size > 0
    for name in (image_id, f"{reference}:latest", image.repo_digests[0]):
        assert status(agent, name).image.id == image_id
    remove(agent, image_id)
    assert not status(agent, reference).HasField("image")
    remove(agent, image_id)


def test_mirror(agent: RunningAgent) -> None:
    image_id = pull(agent, "registry.k8s.io/pause:3.9")
    assert status(agent, "registry.k8s.io/pause:3.9").image.id == image_id
    remove(agent, image_id)


def test_unknown_image(agent: RunningAgent, registry: Registry) -> None:
    reference = f"{registry.host}/no/such:image"
    refused(grpc.StatusCode.NOT_FOUND, "no/such", lambda: pull(agent, reference))


def test_registry_that_is_down(agent: RunningAgent) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        pull(agent, "127.0.0.1:1/some/image:1")
    assert str(caught.value.details()).startswith("RegistryUnavailable")


def test_credentials(agent: RunningAgent, private_registry: Registry) -> None:
    agent.trust(private_registry.host)
    reference = f"{private_registry.host}/library/busybox:1"
    for auth in ({}, {"username": USERNAME, "password": "wrong"}):
        with pytest.raises(grpc.RpcError) as caught:
            pull(agent, reference, **auth)
        assert PASSWORD not in str(caught.value.details())
    assert pull(agent, reference, username=USERNAME, password=PASSWORD)


def test_two_pulls_fetch_once(agent: RunningAgent, registry: Registry) -> None:
    reference = f"{registry.host}/bench/pull:1"
    with ThreadPoolExecutor() as pool:
        ids = set(pool.map(lambda _: pull(agent, reference), range(4)))
    assert len(ids) == 1
    remove(agent, reference)


def test_load_into_a_running_agent(agent: RunningAgent, tmp_path: Path) -> None:
    archive = tmp_path / "image.tar"
    images.write_archive(images.pause(), archive)
    done = subprocess.run(
        agent.command("image load", str(archive)), capture_output=True, text=True, check=True
    )
    name = f"{images.pause().repository}:{images.pause().tags[0]}"
    assert name in done.stdout
    assert status(agent, name).image.id
    listing = subprocess.run(agent.command("image ls"), capture_output=True, text=True, check=True)
    assert name in listing.stdout
    remove(agent, name)


def test_load_beside_an_agent_that_was_killed(own_agent: RunningAgent, tmp_path: Path) -> None:
    archive = tmp_path / "image.tar"
    images.write_archive(images.pause(), archive)
    own_agent.kill()
    subprocess.run(own_agent.command("image load", str(archive)), check=True)
    own_agent.start()
    assert status(own_agent, f"{images.pause().repository}:{images.pause().tags[0]}").image.id


def test_images_survive_a_crash(own_agent: RunningAgent, registry: Registry) -> None:
    image_id = pull(own_agent, f"{registry.host}/k8s-staging-cri-tools/test-image-2")
    own_agent.restart()
    assert status(own_agent, image_id).image.id == image_id


def test_file_system_usage(agent: RunningAgent) -> None:
    usage = agent.images.ImageFsInfo(pb.ImageFsInfoRequest()).image_filesystems[0]
    assert Path(usage.fs_id.mountpoint).is_dir()
    assert usage.HasField("used_bytes")
    assert usage.timestamp > 0


def test_an_image_without_layers(cri: Cri, registry: Registry) -> None:
    """It has what is mounted into it; a program that is not there is named."""
    registry.push(images.Image("test/empty", ("1",), (), {}, indexed=False))
    name = f"{registry.host}/test/empty:1"
    image_id = pull(cri.agent, name)
    assert status(cri.agent, name).image.size > 0
    folder = images.static_busybox()
    mount = pb.Mount(container_path="/bin", host_path=str(folder.parent), readonly=True)
    spec, pod = pb.ImageSpec(image=image_id), cri.pod()
    volume = pb.Mount(container_path="/volume", image=spec, readonly=True)
    program = f"/bin/{folder.name}"
    container = pod.run(program, "sleep", "1000", image=spec, mounts=[mount, volume])
    listed = set(container.exec(program, "ls", "/").stdout.decode().split())
    assert listed - {"etc"} == {"bin", "dev", "proc", "sys", "volume"}
    assert container.exec(program, "ls", "/volume").stdout == b""
    lone = pod.container("/bin/sh", name="lone", image=spec)
    with pytest.raises(grpc.RpcError, match=r"/bin/sh.*[Nn]o such file"):
        lone.start()
    pod.remove()
    remove(cri.agent, image_id)


def test_an_image_volume_outlives_its_image(cri: Cri, registry: Registry) -> None:
    agent = cri.agent
    image_id = pull(agent, f"{registry.host}/k8s-staging-cri-tools/test-image-3")
    volume = pb.Mount(container_path="/volume", image=pb.ImageSpec(image=image_id), readonly=True)
    container = cri.pod().run(mounts=[volume])
    remove(agent, image_id)
    assert "test-image-3" in container.shell("ls /volume")
    assert container.exec("touch", "/volume/x").exit_code != 0
    agent.restart()
    assert "test-image-3" in container.shell("ls /volume")
    container.pod.remove()
