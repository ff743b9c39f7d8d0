"""Where something has run out, who asks for more is told what; what runs goes on, and ends rightly."""

from pathlib import Path

import grpc
import pytest

from tests.chaos.scarce import trial
from tests.chaos.scarce.node import Outcome
from tests.chaos.scarce.shortages import SHORTAGES, Shortage
from tests.support.registry import Registry


@pytest.mark.parametrize(
    "shortage", [s for s in SHORTAGES if not s.is_rare], ids=lambda shortage: shortage.name
)
def test_a_shortage(shortage: Shortage, tmp_path: Path, registry: Registry) -> None:
    assert trial.run(shortage, tmp_path / "agent", registry).complaints == []


@pytest.mark.parametrize(
    ("code", "text", "wrong"),
    [
        (grpc.StatusCode.OK, "", False),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "the disk is full", False),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "no", True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "[Errno 28] the disk is full", True),
        (grpc.StatusCode.INTERNAL, "the disk is full", True),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "the disk is full", True),
    ],
)
def test_what_is_complained_of(code: grpc.StatusCode, text: str, *, wrong: bool) -> None:
    assert bool(Outcome("ExecSync", code, text).complaint(("disk",))) is wrong
