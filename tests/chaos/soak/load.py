"""Work that is done over and over on a node, and counted."""

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from nodeagent.api import runtime_pb2 as pb
from tests.support.cri import RUNNING, Container, Cri

_CUT_OFF = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class Load:
    """Does a piece of work in some threads. count: of those that went well; failures: the texts of the others."""

    def __init__(self, work: Callable[[], None], threads: int) -> None:
        self._work = work
        self._threads = threads
        self._numbers = itertools.count(1)
        self.count = 0
        self.failures: list[str] = []

    @contextmanager
    def going_on(self) -> Iterator[None]:
        over = threading.Event()
        threads = [threading.Thread(target=self._go_on, args=(over,)) for _ in range(self._threads)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def _go_on(self, over: threading.Event) -> None:
        while not over.is_set():
            try:
                self._work()
                self.count = next(self._numbers)
            except grpc.RpcError as error:
                self.failures.append(f"{error.code().name}: {error.details()}")
            except AssertionError as error:
                self.failures.append(repr(error))


def commands(container: Container) -> Load:
    def work() -> None:
        answer = container.exec("echo", "well")
        assert (answer.exit_code, answer.stdout) == (0, b"well\n")

    return Load(work, threads=2)


def pods(cri: Cri) -> Load:
    def work() -> None:
        pod = cri.pod()
        try:
            container = pod.run("sh", "-c", "echo well; sleep 1000")
            assert container.status.state == RUNNING
            pod.stop()
        finally:
            pod.remove()

    return Load(work, threads=3)


def alone(cri: Cri, container: Container) -> None:
    """What is left after a restart works: one of each."""
    assert container.exec("echo", "well").stdout == b"well\n"
    pods = cri.agent.runtime.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=60).items
    assert {pod.id for pod in pods} == {container.pod.id}
    cri.run().pod.remove()
