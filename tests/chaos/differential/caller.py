"""A client of one runtime whose answers can be compared with those of another one: a code, and fields by their paths.

Ids, times, addresses, digests and amounts become words, texts of errors are left out: what is compared is which call
succeeds, with which code it fails, and what is told where.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from nodeagent.api import runtime_pb2 as pb
from nodeagent.api import runtime_pb2_grpc as rpc

DEADLINE_SECONDS = 120.0
NAMESPACE = "differential"

# What containerd collects every ten seconds, and where each of the two keeps it.
_UNSTEADY = re.compile(r"writable_layer\.(timestamp|.*value|fs_id\.mountpoint)$")
_TIMES = re.compile(r"(_at|timestamp|At)$")
_AMOUNTS = re.compile(r"(value|size|_bytes|inodes_used)$")
_WORDS = (
    (re.compile(r"\b[0-9a-f]{64}\b"), "ID"),
    (re.compile(r"sha256:ID"), "DIGEST"),
    (re.compile(r"\b\d+\.\d+\.\d+\.\d+(:\d+)?\b"), "ADDRESS"),
    (re.compile(r"^(http://\S+)/[^/]*$"), "URL"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a call has come to. fields: by path, empty for an error."""

    label: str
    code: str
    fields: dict[str, str] = field(default_factory=dict)


class Caller:
    """Makes calls, and keeps their answers in order. places: paths that differ between runtimes."""

    def __init__(self, name: str, endpoint: str, image: str, places: Path) -> None:
        self.name = name
        self.image = image
        self.places = places
        places.mkdir()
        self.answers: list[Answer] = []
        self._names: dict[str, str] = {str(places): "PLACES"}
        self._numbers = itertools.count()
        self._channel = grpc.insecure_channel(endpoint)
        self._stubs = (
            rpc.RuntimeServiceStub(self._channel),
            rpc.ImageServiceStub(self._channel),
        )

    def close(self) -> None:
        self._channel.close()

    # --- calls ------------------------------------------------------------------------------------------------------

    def call(self, method: str, request: Message, label: str = "", *, only: str = "") -> Any:
        """The answer, None for an error. It is kept if it has a label; only: the fields that are, as a pattern."""
        answer = None
        try:
            answer = self._method(method)(request, timeout=DEADLINE_SECONDS)
            code = "OK"
        except grpc.RpcError as error:
            code = error.code().name
        if label:
            shown = dict(self.flatten(answer)) if answer is not None else {}
            kept = {
                path: text
                for path, text in shown.items()
                if re.search(only, path) and not _UNSTEADY.search(path)
            }
            self.answers.append(Answer(label=f"{method} {label}", code=code, fields=kept))
        return answer

    def note(self, label: str, text: str) -> None:
        """Keep what is no answer to a call."""
        self.answers.append(Answer(label=label, code="OK", fields={"told": text}))

    def _method(self, name: str) -> Any:
        return next(getattr(stub, name) for stub in self._stubs if hasattr(stub, name))

    def events(self) -> Any:
        """A stream of events from now on."""
        stream = self._stubs[0].GetContainerEvents(pb.GetEventsRequest())
        time.sleep(0.5)  # nothing tells that it is open
        return stream

    # --- objects ----------------------------------------------------------------------------------------------------

    def pod_config(self, name: str = "", **fields: Any) -> pb.PodSandboxConfig:
        name = name or f"pod{next(self._numbers)}"
        config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace=NAMESPACE),
            log_directory=str(self.places / name),
            labels={"of": name},
            linux=pb.LinuxPodSandboxConfig(),
        )
        config.MergeFrom(pb.PodSandboxConfig(**fields))
        return config

    def pod(self, label: str = "", **fields: Any) -> Pod:
        config = self.pod_config(**fields)
        request = pb.RunPodSandboxRequest(config=config)
        answer = self.call("RunPodSandbox", request, label)
        pod = Pod(self, config, answer.pod_sandbox_id if answer else "")
        self.name_it(pod.id, "POD")
        return pod

    def name_it(self, name: str, word: str) -> None:
        if name:
            self._names[name] = word

    # --- answers ----------------------------------------------------------------------------------------------------

    def flatten(self, message: Message) -> Iterator[tuple[str, str]]:
        body = MessageToDict(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        yield from self._flatten("", body)

    def _flatten(self, path: str, value: Any) -> Iterator[tuple[str, str]]:
        match value:
            case dict() if path == "info" or path.endswith(".info"):
                return
            case dict():
                for key, inner in value.items():
                    yield from self._flatten(f"{path}.{key}" if path else key, inner)
            case list() if value:
                yield path, f"{len(value)} of them"
                for inner in value[:1]:
                    yield from self._flatten(f"{path}[0]", inner)
            case _:
                yield path, self._word(path, value)

    def _word(self, path: str, value: Any) -> str:
        text = "none" if value in ("", [], None) else str(value)
        if path.endswith("message") and text != "none":
            return "a text"
        for name, word in self._names.items():
            text = text.replace(name, word)
        if _TIMES.search(path):
            return "none" if text == "0" else "TIME"
        if _AMOUNTS.search(path) and text.isdecimal():
            return text if text == "0" else "AMOUNT"
        for pattern, word in _WORDS:
            text = pattern.sub(word, text)
        return text


@dataclass(slots=True)
class Pod:
    """A pod of one runtime."""

    caller: Caller
    config: pb.PodSandboxConfig
    id: str

    def stop(self, label: str = "") -> None:
        request = pb.StopPodSandboxRequest(pod_sandbox_id=self.id)
        self.caller.call("StopPodSandbox", request, label)

    def remove(self, label: str = "") -> None:
        request = pb.RemovePodSandboxRequest(pod_sandbox_id=self.id)
        self.caller.call("RemovePodSandbox", request, label)

    def status(self, label: str) -> None:
        request = pb.PodSandboxStatusRequest(pod_sandbox_id=self.id)
        self.caller.call("PodSandboxStatus", request, label)

    def create(self, *command: str, label: str = "", name: str = "c", **fields: Any) -> Container:
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name),
            image=pb.ImageSpec(image=self.caller.image),
            command=command or ("sleep", "100000"),
            log_path=f"{name}.log",
            labels={"name": name},
        )
        config.MergeFrom(pb.ContainerConfig(**fields))
        request = pb.CreateContainerRequest(
            pod_sandbox_id=self.id, config=config, sandbox_config=self.config
        )
        answer = self.caller.call("CreateContainer", request, label)
        container = Container(self.caller, answer.container_id if answer else "")
        self.caller.name_it(container.id, "CONTAINER")
        return container

    def run(self, *command: str, **fields: Any) -> Container:
        container = self.create(*command, **fields)
        container.start()
        return container

    def ended(self, *command: str, **fields: Any) -> Container:
        container = self.run(*command, **fields)
        container.wait()
        return container


@dataclass(slots=True)
class Container:
    """A container of one runtime."""

    caller: Caller
    id: str

    def start(self, label: str = "") -> None:
        request = pb.StartContainerRequest(container_id=self.id)
        self.caller.call("StartContainer", request, label)

    def stop(self, label: str = "", timeout: int = 0) -> None:
        request = pb.StopContainerRequest(container_id=self.id, timeout=timeout)
        self.caller.call("StopContainer", request, label)

    def remove(self, label: str = "") -> None:
        request = pb.RemoveContainerRequest(container_id=self.id)
        self.caller.call("RemoveContainer", request, label)

    def status(self, label: str = "", only: str = "") -> Any:
        request = pb.ContainerStatusRequest(container_id=self.id)
        return self.caller.call("ContainerStatus", request, label, only=only)

    def exec(self, label: str, *command: str, timeout: int = 0) -> None:
        request = pb.ExecSyncRequest(container_id=self.id, cmd=command, timeout=timeout)
        self.caller.call("ExecSync", request, label)

    def wait(self) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self.status().status.state != pb.CONTAINER_EXITED:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.caller.name}: a container does not end")
            time.sleep(0.05)


def clear(caller: Caller) -> None:
    """Remove every pod: they are all this client's."""
    for pod in caller.call("ListPodSandbox", pb.ListPodSandboxRequest()).items:
        for verb, request in (
            ("StopPodSandbox", pb.StopPodSandboxRequest(pod_sandbox_id=pod.id)),
            ("RemovePodSandbox", pb.RemovePodSandboxRequest(pod_sandbox_id=pod.id)),
        ):
            caller.call(verb, request)
