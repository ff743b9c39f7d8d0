"""What systemd hears."""

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.serving import service_manager


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listening


def test_it_is_told_a_state(manager: socket.socket) -> None:
    service_manager.notify("READY=1")
    assert manager.recv(100) == b"READY=1"


def test_one_that_does_not_read_is_no_reason_not_to_serve(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service_manager, "_PATIENCE_SECONDS", 0.001)
    while not caplog.messages:
        service_manager.notify("READY=1\nSTATUS=serving")
    assert caplog.messages == ["the service manager does not hear READY=1: timed out"]


def test_nobody_is_told_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    service_manager.notify("READY=1")


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        ("30000000", str(os.getpid()), 30.0),
        ("30000000", None, 30.0),
        ("30000000", "1", 0.0),
        (None, None, 0.0),
        ("0", None, 0.0),
        ("soon", None, 0.0),
    ],
)
def test_the_period_of_the_watchdog(
    monkeypatch: pytest.MonkeyPatch, usec: str | None, pid: str | None, seconds: float
) -> None:
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert service_manager.watchdog_seconds() == seconds


async def test_the_watchdog_is_fed_twice_in_a_period(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await service_manager.feed_watchdog(30)
    assert pauses == [15, 15, 15]
    assert [manager.recv(100) for _ in pauses] == [b"WATCHDOG=1"] * 3
