"""A moment of fuzzing in every run; `make fuzz` is the longer one."""

import tracemalloc
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import mutation
from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS

# What one input of some thousand bytes may make the agent hold for a moment.
MAX_PEAK_BYTES = 32 << 20

Mutate = Callable[[bytes, Random], bytes]


def run(target: Target, data: bytes) -> None:
    tracemalloc.start()
    try:
        target(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MAX_PEAK_BYTES


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_examples_are_valid(target: Target) -> None:
    """Or there would be little to find from them on: the first, at least, is taken as it is."""
    target.parse(target.seeds[0])
    for seed in target.seeds:
        run(target, seed)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("mutate", [mutation.changed, mutation.rewritten], ids=["bytes", "values"])
@given(number=st.integers(0, 15), seed=st.integers(0, (1 << 32) - 1))
@settings(
    max_examples=150,
    derandomize=True,  # a run that fails tells of the change; `make fuzz` looks for what is new
)
def test_errors_are_those_that_are_documented(
    target: Target, mutate: Mutate, number: int, seed: int
) -> None:
    run(target, mutate(target.seeds[number % len(target.seeds)], Random(seed)))
