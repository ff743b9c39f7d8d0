"""The timers of the loop that launcher and supervisors run."""

from nodeagent.sandbox.runtime.loop import Loop

HOUR_MS = 3_600_000


def test_timers_are_run_in_order() -> None:
    loop, ran = Loop(), list[int]()
    for delay in (30, 10, 20):
        loop.call_after(delay, lambda delay=delay: ran.append(delay))  # type: ignore[misc]
    loop.call_after(15, lambda: ran.append(15)).cancel()
    loop.call_after(40, loop.stop)
    loop.run()
    assert ran == [10, 20, 30]


def test_cancelled_timers_are_not_kept() -> None:
    loop, kept = Loop(), []
    for number in range(10_000):
        timer = loop.call_after(HOUR_MS + number, loop.stop)
        if number % 100:
            timer.cancel()
        else:
            kept.append(timer)
    assert len(loop._timers) <= 3 * len(kept)
    assert [timer for timer in sorted(loop._timers) if timer.action is not None] == kept
