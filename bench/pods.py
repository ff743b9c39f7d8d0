"""Times pod starts, teardown, exec and pulls over a CRI socket, and what the runtime weighs with 20 pods.

    python -m bench.pods [--pods 100] [--peer] [--shared-pid]

An agent is started under a temporary root. With --peer, containerd and runc run beside it, and the same client takes
turns between the two sockets, so that both see the same machine; the last column is the ratio of the medians.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench import streams
from bench.containerd import running_containerd
from bench.cri import Client
from tests.support import images
from tests.support.node import RunningAgent
from tests.support.registry import running_registry

IDLE_SECONDS = 0.1
DENSITY_PODS = 20
PULLS = 10
HOT, IDLE = "pod start, hot", "pod start, after 100 ms idle"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pods", type=int, default=100, help="starts of each kind (default 100)")
    parser.add_argument("--peer", action="store_true", help="beside containerd and runc")
    parser.add_argument("--shared-pid", action="store_true", help="pods with one PID namespace")
    options = parser.parse_args()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="na-bench-")))
        registry = stack.enter_context(running_registry(root / "registry"))
        busybox, large = images.busybox(), images.bench_pull()
        registry.push(busybox)
        registry.push(large)
        image = f"{registry.host}/{busybox.repository}:{busybox.tags[0]}"
        agent = stack.enter_context(running_agent(root / "agent", registry.host))
        shared = options.shared_pid
        logs = root / "logs"
        clients = [Client("nodeagent", agent.endpoint, image, logs, shared_pid=shared)]
        if options.peer:
            address = stack.enter_context(running_containerd(root / "peer", registry))
            clients.append(Client("containerd+runc", address, image, logs, shared_pid=shared))
        for client in clients:
            stack.callback(client.close)
            client.pull()
        measure(clients, options.pods)
        measure_pulls(clients, f"{registry.host}/{large.repository}:{large.tags[0]}")
        print_times(clients)
        print_streams(clients[0])
        print_density(clients[0], agent)


def measure(clients: list[Client], pods: int) -> None:
    """Rounds of each kind, every client one after the other in each round."""
    for client in clients:
        client.remove_pod(*client.start_pod("warm-up"))
        client.times.clear()
    for number in range(pods):
        for client in clients:
            pod = client.start_pod(HOT)
            client.exec_true(pod[1])
            client.remove_pod(*pod)
        progress(number + 1, 2 * pods)
    for number in range(pods):
        for client in clients:
            time.sleep(IDLE_SECONDS)
            client.remove_pod(*client.start_pod(IDLE))
        progress(pods + number + 1, 2 * pods)


def measure_pulls(clients: list[Client], image: str) -> None:
    for _ in range(PULLS):
        for client in clients:
            client.pull_anew(image)


def print_times(clients: list[Client]) -> None:
    first = clients[0]
    print(f"\nload average {os.getloadavg()[0]:.1f}; ms, p50 / p99 of {len(first.times[HOT])}")
    print(f"{'':40}" + "".join(f"{client.name:>20}" for client in clients))
    for label in first.times:
        cells = [
            f"{statistics.median(client.times[label]):9.1f} /{percentile(client.times[label], 99):8.1f}"
            for client in clients
        ]
        print(f"{label:40}" + "".join(f"{cell:>20}" for cell in cells) + ratio(label, clients))


def ratio(label: str, clients: list[Client]) -> str:
    medians = [statistics.median(client.times[label]) for client in clients]
    return f"{medians[1] / medians[0]:8.1f} ×" if len(medians) > 1 else ""


def print_streams(client: Client) -> None:
    """Of this agent alone: the peer's streams are in a network namespace of its own."""
    print("\nstreams, over SPDY")
    for label, value in asyncio.run(streams.measure(client)).items():
        print(f"{label:40}{value:20.1f}")


def print_density(client: Client, agent: RunningAgent) -> None:
    pods = [client.start_pod("density") for _ in range(DENSITY_PODS)]
    supervisors = [pss_kib(supervisor_of(pod_id)) for pod_id, _ in pods]
    print(f"\nwith {DENSITY_PODS} pods:")
    print(f"  PSS of a supervisor, median   {statistics.median(supervisors) / 1024:.2f} MiB")
    print(f"  RSS of the agent              {rss_kib(agent.pid) / 1024:.1f} MiB")
    for pod in pods:
        client.remove_pod(*pod)


@contextmanager
def running_agent(root: Path, registry: str) -> Iterator[RunningAgent]:
    agent = RunningAgent(root)
    agent.trust(registry)
    agent.start()
    try:
        yield agent
    finally:
        agent.remove_pods()
        agent.stop()


def percentile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def supervisor_of(pod_id: str) -> int:
    """By its command line, as ps shows it."""
    wanted = f"nodeagent.sandbox.supervisor {pod_id}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if (entry / "cmdline").read_bytes().startswith(wanted):
                    return int(entry.name)
            except OSError:
                continue
    raise LookupError(f"pod {pod_id}: no supervisor")


def pss_kib(pid: int) -> int:
    return field(Path(f"/proc/{pid}/smaps_rollup"), "Pss:")


def rss_kib(pid: int) -> int:
    return field(Path(f"/proc/{pid}/status"), "VmRSS:")


def field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise LookupError(f"{path}: no {name}")


def progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
