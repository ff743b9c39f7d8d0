"""The end of the agent's process."""

import signal
import subprocess
import sys

PROGRAM = """
import asyncio, time
from nodeagent import agent

agent.STOP_SECONDS = 0.5

async def main():
    ending = agent._Ending()
    try:
        with ending.cancels():
            print("ready", flush=True)
            {what}
    except asyncio.CancelledError:
        assert ending.has_begun
        print("cancelled", flush=True)

asyncio.run(main())
"""


def ended_by_sigterm(what: str) -> tuple[int, str, str]:
    """The exit code and the output of an agent that does this when it is told to end."""
    command = [sys.executable, "-c", PROGRAM.format(what=what)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=60)
    return process.returncode, rest, errors


def test_a_blocked_loop_does_not_keep_the_agent() -> None:
    """The signal is heard by a thread, and the traceback says where the loop is."""
    code, _, errors = ended_by_sigterm("time.sleep(3600)")
    assert code == 1
    assert "gave up after 0.5 s" in errors
    assert "in main" in errors


def test_a_start_is_cut_off() -> None:
    assert ended_by_sigterm("await asyncio.sleep(3600)")[:2] == (0, "cancelled\n")


def test_a_start_that_does_not_end_is_given_up() -> None:
    what = "await asyncio.to_thread(time.sleep, 3600)"
    code, rest, errors = ended_by_sigterm(what)
    assert (code, rest) == (1, "cancelled\n")
    assert "gave up after 0.5 s" in errors
