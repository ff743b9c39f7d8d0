"""Gray failures hurt who asks for what hangs, and nobody else; when they end, all goes on."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.chaos.gray import trial
from tests.chaos.gray.faults import FAULTS, Fault
from tests.chaos.gray.trial import Report, complaints
from tests.chaos.gray.world import Outcome, World, world
from tests.support.registry import Registry


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, registry: Registry) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("agent"), registry) as made:
        yield made


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_gray_failure(
    fault: Fault, request: pytest.FixtureRequest, tmp_path: Path, registry: Registry
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    if fault.on_disk:
        with world(tmp_path / "agent", registry, on_disk=True) as made:
            report = trial.run(fault, made, volume, rounds=2, hold=1)
    else:
        node = request.getfixturevalue("node")
        report = trial.run(fault, node, volume, rounds=2, hold=1)
    assert report.complaints == []


def test_what_is_complained_of() -> None:
    report = Report(FAULTS[0])
    assert complaints(report) == []
    report.meanwhile.seconds["List"] = [0.1, 30.0]
    report.memory_mib = 60.0
    unknown = Outcome("Exec", grpc.StatusCode.INTERNAL, "KeyError", 0.1)
    silent = Outcome("Stop", grpc.StatusCode.UNAVAILABLE, "", 0.1)
    waits = Outcome("Start", None, "", 1.0)
    report.during = [unknown, silent, waits]
    report.after = [waits]
    assert [line.partition(":")[0] for line in complaints(report)] == [
        "a neighbour's call took 30.0 s",
        "the agent takes 60 MiB more",
        "no clear answer",
        "no clear answer",
        "no answer after the end of the fault",
    ]
