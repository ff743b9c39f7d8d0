"""The memory of an agent whose tenants ask for much of it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nodeagent.api import runtime_pb2 as pb
from tests.e2e.conftest import own_agent, own_cri
from tests.support.cri import Cri

__all__ = ["own_agent", "own_cri"]

COMMANDS = 20
BOUND_MIB = 200  # what the agent keeps at once, thrice: as it is captured, encoded, and sent
MUCH = "head -c 16777216 /dev/zero & head -c 16777216 /dev/zero >&2; wait"


def test_many_commands_with_much_output(own_cri: Cri) -> None:
    """20 captured 2 × 16 MiB each at once, and took the agent from 80 MiB to 800."""
    container = own_cri.run()
    container.exec("true")
    agent = own_cri.agent
    before = mib(agent.pid, "VmRSS")
    with ThreadPoolExecutor(COMMANDS) as threads:
        calls = [
            threads.submit(container.exec, "sh", "-c", MUCH, timeout=200) for _ in range(COMMANDS)
        ]
        agent.runtime.ListContainers(pb.ListContainersRequest(), timeout=60)
        answers = [call.result() for call in calls]
    assert {answer.exit_code for answer in answers} == {0}
    assert min(len(stream) for answer in answers for stream in (answer.stdout, answer.stderr)) >= (
        16 << 10
    )
    assert mib(agent.pid, "VmHWM") < before + BOUND_MIB
    alone = container.exec("head", "-c", "10000000", "/dev/zero")
    assert len(alone.stdout) == 10_000_000  # there is room again
    container.pod.remove()


def mib(pid: int, name: str) -> int:
    """A value of proc_pid_status(5)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [value] = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(value) // 1024
