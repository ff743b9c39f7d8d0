"""How pulls together heed a server that asks for a pause."""

import asyncio
from itertools import pairwise

import pytest
from yarl import URL

from nodeagent.errors import RegistryUnavailable
from nodeagent.images.remote import throttling
from nodeagent.images.remote.throttling import Throttled, Throttles, pause_asked_for

PLACE = URL("https://registry.example/v2/a/manifests/1")
DATE = "Sun, 29 Nov 2026 00:00:00 GMT"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("5", 5),
        (" 120 ", 120),
        ("0", 0),
        ("9" * 400, 999_999_999),
        ("Sun, 29 Nov 2026 00:00:30 GMT", 30),
        ("Sunday, 29-Nov-26 00:00:30 GMT", 30),
        ("Sat, 28 Nov 2026 00:00:00 GMT", 0),
        ("", None),
        ("soon", None),
        ("-1", None),
        ("1.5", None),
        ("٣", None),
    ],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    assert pause_asked_for({"Retry-After": value, "Date": DATE}) == seconds


@pytest.mark.parametrize("headers", [{}, {"Retry-After": DATE}, {"Retry-After": DATE, "Date": "x"}])
def test_without_retry_after_or_a_clock(headers: dict[str, str]) -> None:
    assert pause_asked_for(headers) is None


async def refused(throttles: Throttles, url: URL = PLACE, **headers: str) -> Throttled:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        async with throttles.turn(url) as turn:
            turn.answered(429, sent)
            raise RegistryUnavailable("429")
    except Throttled as error:
        return error


async def answered(throttles: Throttles, status: int = 200) -> None:
    async with throttles.turn(PLACE) as turn:
        turn.answered(status, {})


async def test_one_refusal_holds_all_requests_to_the_server() -> None:
    throttles = Throttles()
    error = await refused(throttles, Retry_After="30")
    assert error.sent
    assert str(error) == "429: asks for a pause of 30 s"
    with pytest.raises(Throttled, match=r"registry\.example: has asked for a pause") as caught:
        await answered(throttles)
    assert not caught.value.sent
    assert caught.value.until == error.until
    async with throttles.turn(URL("https://other.example/")):
        pass


def test_several_refusals_at_once_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the server does not say how long, the pause grows with each one that did not help."""
    now = 100.0
    monkeypatch.setattr(throttling, "_now", lambda: now)
    throttle = throttling._Throttle(PLACE.origin())
    pauses = []
    for _ in range(8):
        assert throttle.hold(None) == throttle.hold(0) == throttle.hold(None)
        pauses.append(throttle.hold(None) - now)
        now += pauses[-1]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    throttle.widen()
    assert throttle.hold(None) == now + 1
    assert throttle.hold(7) == now + 7
    assert throttle.hold(3) == now + 7


async def test_after_a_pause_one_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttling, "FIRST_SECONDS", 0.02)
    throttles = Throttles()
    error = await refused(throttles)
    await asyncio.sleep(error.until - asyncio.get_running_loop().time() + 0.001)
    under_way = 0
    widths = []

    async def ask() -> None:
        nonlocal under_way
        async with throttles.turn(PLACE) as turn:
            under_way += 1
            widths.append(under_way)
            await asyncio.sleep(0.01)
            under_way -= 1
            turn.answered(200, {})

    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(ask())
    assert widths[0] == 1
    assert widths[1:3] == [1, 2]
    assert all(later <= 2 * before + 1 for before, later in pairwise(widths))


async def test_a_server_that_does_not_answer_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttling, "FIRST_SECONDS", 0.01)
    throttles = Throttles()
    error = await refused(throttles)
    await asyncio.sleep(error.until - asyncio.get_running_loop().time() + 0.001)
    with pytest.raises(RegistryUnavailable):
        async with throttles.turn(PLACE):
            raise RegistryUnavailable("connection refused")
    assert throttles._throttles == {}


async def test_one_who_gives_up_waiting_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttling, "FIRST_SECONDS", 0.01)
    throttles = Throttles()
    error = await refused(throttles)
    await asyncio.sleep(error.until - asyncio.get_running_loop().time() + 0.001)
    async with throttles.turn(PLACE) as first:
        waiting = [asyncio.create_task(answered(throttles)) for _ in range(2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
        first.answered(200, {})
        await asyncio.wait_for(waiting[1], 60)


async def test_one_who_does_not_wait_for_an_answer_lets_one_other_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(throttling, "FIRST_SECONDS", 0.01)
    throttles = Throttles()
    error = await refused(throttles)
    await asyncio.sleep(error.until - asyncio.get_running_loop().time() + 0.001)
    under_way = 0

    async def ask() -> None:
        nonlocal under_way
        async with throttles.turn(PLACE):
            under_way += 1
            await asyncio.sleep(10)

    asking = [asyncio.create_task(ask()) for _ in range(4)]
    await asyncio.sleep(0)
    asking[0].cancel()
    await asyncio.wait(asking[:1])
    await asyncio.sleep(0.01)
    assert under_way == 2
    for task in asking:
        task.cancel()
    await asyncio.wait(asking)


def test_a_later_pause_may_be_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(throttling, "_now", lambda: now)
    throttle = throttling._Throttle(PLACE.origin())
    assert throttle.hold(3600) == now + 3600
    now += throttling.LONGEST_SECONDS
    assert throttle.hold(5) == now + 5


async def test_a_long_pause_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttling, "LONGEST_SECONDS", 0.01)
    throttles = Throttles()
    error = await refused(throttles, Retry_After="999999999")
    assert throttling.is_too_long(error.until)
    await asyncio.sleep(0.012)
    await answered(throttles)


async def test_only_servers_that_may_be_asked_for_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(throttling, "LONGEST_SECONDS", 0.001)
    throttles = Throttles()
    for number in range(3 * throttling._MANY):
        if number == throttling._MANY - 1:
            await asyncio.sleep(0.01)
        await refused(throttles, URL(f"https://{number}.example/"))
    assert len(throttles._throttles) <= 2 * throttling._MANY + 1
