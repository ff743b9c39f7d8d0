"""The server: its socket, its table of methods, errors, cancelled clients, the end."""

import asyncio
import logging
import os
import socket
import stat
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from nodeagent.api import runtime_pb2_grpc as rpc
from nodeagent.cri import reachability, server
from nodeagent.cri.interceptors import CHANGING
from nodeagent.cri.server import Server, remove_stale_socket
from nodeagent.errors import AlreadyExists, RegistryUnavailable
from nodeagent.lifecycle.creations import Creations
from nodeagent.requests import SandboxConfig
from nodeagent.tasks import Tasks
from tests.unit.cri import samples
from tests.unit.cri.node import FakeNode, serving, until

RUN = pb.RunPodSandboxRequest(config=samples.simple_sandbox())


async def refused(call: object) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call  # type: ignore[misc]
    return error.value


async def test_the_socket_is_for_its_group_and_gone_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "run" / "cri.sock"
    async with serving(path) as client:
        mode = path.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o660
        assert (await client.runtime.Version(pb.VersionRequest())).version == "0.1.0"
    assert not path.exists()


async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "cri.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with serving(path) as client:
        await client.runtime.Version(pb.VersionRequest())


async def test_a_living_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "cri.sock"
    async with serving(path) as client:
        with pytest.raises(AlreadyExists, match="another process listens"):
            async with serving(path):
                pass
        await client.runtime.Version(pb.VersionRequest())


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: os.symlink("/x", path)])
def test_whatever_is_no_socket_is_left_alone(tmp_path: Path, make: object) -> None:
    path = tmp_path / "cri.sock"
    make(path)  # type: ignore[operator]
    with pytest.raises(AlreadyExists, match="is not a socket"):
        remove_stale_socket(path)
    assert path.lstat()


def test_every_changing_call_is_one_of_the_contract() -> None:
    methods = {m.name for s in pb.DESCRIPTOR.services_by_name.values() for m in s.methods}
    assert len(methods) == 46
    assert methods >= CHANGING


async def test_every_call_is_served(tmp_path: Path) -> None:
    """Each answers, if only that it is not supported; none is unknown, none fails inside."""
    async with serving(tmp_path / "s") as client:
        for service in pb.DESCRIPTOR.services_by_name.values():
            stub = client.runtime if service.name == "RuntimeService" else client.images
            for method in service.methods:
                request = getattr(pb, method.input_type.name)()
                code = await outcome(getattr(stub, method.name), request, method.server_streaming)
                assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), method.name
                supported = method.name not in (
                    "CheckpointContainer",
                    "CheckpointPod",
                    "RestorePod",
                )
                assert (code != grpc.StatusCode.UNIMPLEMENTED) == supported, method.name


async def outcome(call: object, request: object, streams: bool) -> grpc.StatusCode:
    try:
        if not streams:
            await call(request)  # type: ignore[operator]
            return grpc.StatusCode.OK
        async with asyncio.timeout(0.2):
            async for _ in call(request):  # type: ignore[operator]
                pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    except TimeoutError:
        pass
    return grpc.StatusCode.OK


async def test_errors_are_codes_and_are_observed(tmp_path: Path) -> None:
    async with serving(tmp_path / "s") as client:
        missing = await refused(
            client.runtime.ContainerStatus(pb.ContainerStatusRequest(container_id="x"))
        )
        assert missing.code() == grpc.StatusCode.NOT_FOUND
        assert missing.details() == 'container "x": not found'
        client.node.images.error = RegistryUnavailable("registry.test: no route")
        pull = await refused(client.images.PullImage(pb.PullImageRequest(image=spec("a"))))
        assert pull.code() == grpc.StatusCode.UNKNOWN
        assert pull.details() == "RegistryUnavailable: registry.test: no route"
        client.node.images.error = ValueError("odd")
        assert (
            await refused(client.images.PullImage(pb.PullImageRequest(image=spec("a"))))
        ).code() == grpc.StatusCode.INTERNAL
        await client.runtime.Version(pb.VersionRequest())
        assert client.observed == [
            ("ContainerStatus", "NOT_FOUND"),
            ("PullImage", "UNKNOWN"),
            ("PullImage", "INTERNAL"),
            ("Version", "OK"),
        ]


def spec(image: str) -> pb.ImageSpec:
    return pb.ImageSpec(image=image)


async def test_the_log_has_names_and_no_secrets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "nodeagent.cri")
    auth = pb.AuthConfig(username="me", password="p4ssw0rd", identity_token="t0ken")
    async with serving(tmp_path / "s") as client:
        await client.images.PullImage(pb.PullImageRequest(image=spec("reg/a:1"), auth=auth))
        await client.runtime.RunPodSandbox(RUN)
        await refused(
            client.runtime.ContainerStatus(pb.ContainerStatusRequest(container_id="a\nb"))
        )
    lines = [record.getMessage() for record in caplog.records]
    assert "rpc=PullImage code=OK" in lines[0]
    assert 'image="reg/a:1"' in lines[0]
    assert 'name="web"' in lines[1]
    assert 'container="a\\nb" error="container' in lines[2]
    assert not any("p4ssw0rd" in line or "t0ken" in line for line in lines)
    assert [record.levelno for record in caplog.records] == [10, 20, 20]


async def test_a_defect_is_logged_with_its_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path / "s") as client:
        client.node.images.error = ZeroDivisionError("odd")
        await refused(client.images.PullImage(pb.PullImageRequest(image=spec("a"))))
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


async def test_a_change_is_finished_when_its_client_is_gone(tmp_path: Path) -> None:
    async with serving(tmp_path / "s") as client:
        client.node.sandboxes.hold = asyncio.Event()
        error = await refused(client.runtime.RunPodSandbox(RUN, timeout=0.1))
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: client.observed == [("RunPodSandbox", "CANCELLED")])
        assert not client.node.sandboxes.records
        client.node.sandboxes.hold.set()
        await until(lambda: client.node.sandboxes.records)


async def test_a_creation_that_no_client_heard_of_is_the_answer_to_the_retry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path / "s") as client:
        sandboxes = client.node.sandboxes
        creations = Creations(Tasks(), "creation", sandboxes.records.__contains__)
        make = sandboxes.run

        async def run(config: SandboxConfig, runtime_handler: str) -> str:
            return await creations.join("key", "pod", lambda: make(config, runtime_handler))

        monkeypatch.setattr(sandboxes, "run", run)
        sandboxes.hold = asyncio.Event()
        await refused(client.runtime.RunPodSandbox(RUN, timeout=0.1))
        await until(lambda: client.observed)
        sandboxes.hold.set()
        await until(lambda: sandboxes.records)
        await asyncio.sleep(0.01)
        answer = await client.runtime.RunPodSandbox(RUN)
    assert [answer.pod_sandbox_id] == [*sandboxes.records]


async def test_a_failure_that_no_client_hears_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path / "s") as client:
        client.node.sandboxes.hold = asyncio.Event()
        client.node.sandboxes.error = AlreadyExists("taken")
        await refused(client.runtime.RunPodSandbox(RUN, timeout=0.1))
        await until(lambda: client.observed)
        client.node.sandboxes.hold.set()
    assert "rpc=RunPodSandbox: failed after its client went away" in caplog.text
    assert "taken" in caplog.text


async def test_leaving_waits_for_changes(tmp_path: Path) -> None:
    async with serving(tmp_path / "s") as client:
        client.node.sandboxes.hold = asyncio.Event()
        await refused(client.runtime.RunPodSandbox(RUN, timeout=0.1))
        asyncio.get_running_loop().call_later(0.2, client.node.sandboxes.hold.set)
    assert client.node.sandboxes.records


async def test_fields_of_a_newer_contract_are_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newer = RUN.SerializeToString() + bytes([200 << 3 & 0x7F | 0x80, 200 >> 4, 1])
    async with serving(tmp_path / "s") as client:
        run = client.channel.unary_unary(
            "/runtime.v1.RuntimeService/RunPodSandbox",
            request_serializer=bytes,
            response_deserializer=pb.RunPodSandboxResponse.FromString,
        )
        for _ in range(2):
            assert (await run(newer)).pod_sandbox_id
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "fields that this agent does not know" in warnings[0].getMessage()


async def test_a_request_that_is_too_large_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path / "s") as client:
        config = pb.ContainerConfig(args=["x" * (17 << 20)])
        error = await refused(
            client.runtime.CreateContainer(pb.CreateContainerRequest(config=config))
        )
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("is_removed", [False, True])
async def test_a_socket_that_nobody_accepts_at_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_removed: bool
) -> None:
    """As gRPC's own after an accept(2) without memory; the connections that there are go on."""
    monkeypatch.setattr(reachability, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(reachability, "ANSWER_SECONDS", 0.5)
    path = tmp_path / "s"
    async with serving(path) as client:
        await client.runtime.Version(pb.VersionRequest())
        path.unlink()
        with socket.socket(socket.AF_UNIX) as deaf:
            if not is_removed:
                deaf.bind(str(path))
                deaf.listen()
            async with grpc.aio.insecure_channel(f"unix://{path}") as channel:
                version = rpc.RuntimeServiceStub(channel).Version
                assert await version(pb.VersionRequest(), wait_for_ready=True, timeout=60)
        assert await client.runtime.Version(pb.VersionRequest())
    assert not path.exists()


async def test_a_call_without_method_fails_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "ImageService", lambda node: SimpleNamespace())
    with pytest.raises(LookupError, match="ListImages"):
        async with Server.open(FakeNode().node, f"unix://{tmp_path}/s", observe=print):
            pass


def test_the_generated_stubs_name_the_same_methods() -> None:
    for service in pb.DESCRIPTOR.services_by_name.values():
        servicer = getattr(rpc, f"{service.name}Servicer")
        assert {m.name for m in service.methods} <= set(dir(servicer))
