"""Runs the public validation suite of the CRI, critest, against a socket and reads its report.

Which specs there are, and how each of them ended; nothing about the runtime behind the socket.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.support.images import patch_critest

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
BENCHMARK = "benchmark"  # in the names of the specs that measure instead of validating
STREAMS = "[k8s.io] Streaming "  # how the names of those begin that run on both wires
OVER_WEBSOCKET = " (WebSocket)"
WEBSOCKET_OPTIONS = ("--websocket-exec", "--websocket-attach", "--websocket-portforward")
TIMELINE_LINES = 40


@dataclass(frozen=True, slots=True)
class Spec:
    """One spec and how it ended. `reason` is why it failed or was skipped; `timeline` what it did before it failed."""

    name: str
    state: str
    seconds: float
    reason: str = ""
    timeline: str = ""


class Critest:
    """A critest that pulls our own image where upstream's would be pulled by digest."""

    def __init__(self, program: Path, folder: Path) -> None:
        self._program = folder / "critest"
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        patch_critest(program, self._program)

    @property
    def log(self) -> Path:
        return self._folder / "critest.log"

    def run(self, endpoint: str, wanted: Collection[str], timeout_seconds: float) -> list[Spec]:
        """Runs the specs of these names: those of the streams first over SPDY, then over WebSocket."""
        again = {name for name in wanted if name.endswith(OVER_WEBSOCKET)}
        names = {name.removesuffix(OVER_WEBSOCKET) for name in again}
        first = self._run(endpoint, set(wanted) - again, timeout_seconds)
        second = self._run(endpoint, names, timeout_seconds, WEBSOCKET_OPTIONS)
        return [*first, *(replace(spec, name=renamed(spec.name)) for spec in second)]

    def _run(
        self,
        endpoint: str,
        wanted: Collection[str],
        timeout_seconds: float,
        options: tuple[str, ...] = (),
    ) -> list[Spec]:
        """In one process, one after the other, in random order."""
        if not wanted:
            return []
        report = self._folder / "report.json"
        temporary = self._folder / "tmp"  # log directories and volumes of the specs
        temporary.mkdir(exist_ok=True)
        arguments = [
            *("--runtime-endpoint", endpoint, "--image-endpoint", endpoint),
            f"--ginkgo.focus={focus(wanted)}",
            f"--ginkgo.timeout={timeout_seconds}s",
            f"--ginkgo.json-report={report}",
            "--ginkgo.no-color",
            *options,
        ]
        with self.log.open("ab") as log:
            subprocess.run(
                [self._program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "TMPDIR": str(temporary)},
                check=False,
            )
        if not report.exists():
            raise RuntimeError(f"critest did not run:\n{self.log.read_text()[-2000:]}")
        return [spec for spec in read(report) if spec.name in wanted]


def names(program: Path) -> list[str]:
    """The names of all specs and of their variants, without running any."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "specs.json")
        arguments = ["--ginkgo.dry-run", f"--ginkgo.json-report={report}"]
        subprocess.run([program, *arguments], capture_output=True, check=True)
        once = [spec.name for spec in read(report)]
    return once + [renamed(name) for name in once if STREAMS in name]


def renamed(name: str) -> str:
    """The name of a spec of the streams when it runs over WebSocket."""
    return name + OVER_WEBSOCKET


def focus(wanted: Collection[str]) -> str:
    """A regular expression for exactly these specs. Ginkgo puts the suite's name before theirs."""
    return f"^CRI validation (?:{'|'.join(map(re.escape, wanted))})$"


def read(report: Path) -> Iterator[Spec]:
    """The validation specs of one of ginkgo's JSON reports."""
    for suite in json.loads(report.read_text()):
        for entry in suite["SpecReports"]:
            if entry["LeafNodeType"] == "It" and BENCHMARK not in entry["LeafNodeText"]:
                yield _spec(entry)


def _spec(entry: dict[str, Any]) -> Spec:
    """Whatever ginkgo knows besides (panicked, interrupted, timed out …) is a failure."""
    failure = entry.get("Failure", {})
    place = failure.get("Location", {})
    reason = failure.get("Message", "")
    state = entry["State"] if entry["State"] in {PASSED, SKIPPED} else FAILED
    if state == FAILED:
        file = place.get("FileName", "").rpartition("/")[2]
        reason = f"{entry['State']} at {file}:{place.get('LineNumber')}: {reason}"
    written = entry.get("CapturedGinkgoWriterOutput", "").splitlines() if state == FAILED else []
    return Spec(
        name=" ".join([*entry["ContainerHierarchyTexts"], entry["LeafNodeText"]]),
        state=state,
        seconds=entry["RunTime"] / 1e9,
        reason=reason,
        timeline="\n".join(line for line in written[-TIMELINE_LINES:] if line),
    )
