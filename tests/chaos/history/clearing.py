"""The end of a run, without a fault and with one client: everything answers, can be removed, and leaves nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from functools import partial

from nodeagent.api import runtime_pb2 as pb
from tests.chaos.history.client import Client, Places
from tests.chaos.history.events import Reader
from tests.chaos.history.model import Violation
from tests.chaos.history.record import Ending, History
from tests.support.node import RunningAgent, wait_for

RETRIED = 30
POLL_SECONDS = 0.2
TRAP_SECONDS = 30  # for a program that heeds SIGTERM, and then writes its code


class Clearing:
    """Uses, stops and removes all that there is, in several ways, and uses the names again."""

    def __init__(
        self, agent: RunningAgent, history: History, places: Places, patience: float
    ) -> None:
        self._places = places
        self._patience = patience
        self._client = Client(-1, agent.endpoint, history, places)
        self._client.quiet = True

    def run(self, readers: Sequence[Reader]) -> Iterator[Violation]:
        with closing(self._client):
            self._wait_for_ends()
            pods = [pod.id for pod in self._client.list_pods().items]
            containers = list(self._client.list_containers().containers)
            self._use(pods, containers)
            self._remove(pods, containers)
            last = self._use_names_again()
            self._client.list_containers()
            left_over = self._client.list_pods().items
        for pod in left_over:
            yield Violation("left", pod.id, "is listed after all was removed")
        for reader in readers:
            with suppress(AssertionError):
                wait_for("the last event", partial(reader.has_told_end_of, last), self._patience)
            if not reader.has_told_end_of(last):
                yield Violation("events", last, "its deletion is not told")

    def _wait_for_ends(self) -> None:
        """Programs that have written their code are known to have ended; the model says so if they are not."""
        deadline = time.monotonic() + self._patience + 1
        while time.monotonic() < deadline:
            listed = self._client.list_containers().containers
            running = [item for item in listed if item.state == pb.CONTAINER_RUNNING]
            if not any(self._has_written(item) for item in running):
                return
            time.sleep(POLL_SECONDS)

    def _has_written(self, item: pb.Container) -> bool:
        return (self._places.codes / item.labels["token"]).exists()

    def _use(self, pods: list[str], containers: list[pb.Container]) -> None:
        client = self._client
        for pod in pods:
            client.pod_status(pod)
        for item in containers:
            client.container_status(item.id)
            if item.labels["token"].startswith("sleeps-") and item.state == pb.CONTAINER_RUNNING:
                client.exec(item.id, 0)

    def _remove(self, pods: list[str], containers: list[pb.Container]) -> None:
        """Some are stopped before, some are removed with their pods."""
        client = self._client
        for item in containers[::2]:
            client.stop(item.id, TRAP_SECONDS if item.labels["token"].startswith("traps-") else 0)
            client.container_status(item.id)
        for pod in pods[::2]:
            client.stop_pod(pod)
            client.pod_status(pod)
        for item in containers[::3]:
            client.remove(item.id)
        for pod in pods:
            client.remove_pod(pod)

    def _use_names_again(self) -> str:
        """Returns the id of the last pod that was removed."""
        last = ""
        for name, attempt in sorted(self._places.identities)[-RETRIED:]:
            self._client.run_pod(name, attempt)
            last = self._places.ids[name]
            self._client.remove_pod(last)
        return last


def ending(places: Places, token: str) -> Ending:
    """What a program has left on the host."""
    written, log = places.codes / token, places.logs / f"{token}.log"
    text = written.read_text().strip() if written.exists() else ""
    return Ending(
        token=token,
        code=int(text) if text else None,
        at=written.stat().st_mtime_ns if text else 0,
        logged=log.exists() and f"last {token}\n" in log.read_text(),
    )
