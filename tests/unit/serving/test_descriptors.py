"""Descriptors that are kept back."""

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from nodeagent.serving import descriptors


@pytest.fixture(autouse=True)
def limits() -> Iterator[tuple[int, int]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_is_raised(limits: tuple[int, int]) -> None:
    _, hard = limits
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))
    descriptors.raise_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)


@pytest.mark.parametrize(
    ("limit", "first"),
    [(1024, 768), (16384, 12288), (20000, 15904)],
    ids=["low", "border", "high"],
)
def test_the_last_numbers_are_reserved(limits: tuple[int, int], limit: int, first: int) -> None:
    if limit > limits[1]:
        pytest.skip(f"the hard limit is {limits[1]}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    assert not descriptors.is_reserved(first - 1)
    assert descriptors.is_reserved(first)


def test_who_stops_at_a_reserved_one_leaves_a_quarter(limits: tuple[int, int]) -> None:
    """Also where others have taken and closed descriptors in between."""
    limit = 400
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    with ExitStack() as held:
        others = [os.open("/dev/null", os.O_RDONLY) for _ in range(100)]
        while True:
            one = held.enter_context(socket.socket())
            if descriptors.is_reserved(one.fileno()):
                break
            if others:
                os.close(others.pop())
        for _ in range(limit // 4 - 1):
            held.enter_context(socket.socket())
        with pytest.raises(OSError, match="Too many open files"):
            socket.socket()
