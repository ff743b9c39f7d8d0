"""Cuts recorded bytes where a network might."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TypeVar

from hypothesis import strategies as st

T = TypeVar("T")


def pieces(data: bytes) -> st.SearchStrategy[list[bytes]]:
    """All ways to receive `data` in pieces, none of them empty."""

    def cut(borders: set[int]) -> list[bytes]:
        return [data[start:end] for start, end in pairwise([0, *sorted(borders), len(data)])]

    return st.sets(st.integers(1, len(data) - 1)).map(cut)


def each_byte(data: bytes) -> list[bytes]:
    return [data[index : index + 1] for index in range(len(data))]


def feed(receive: Callable[[bytes], Iterable[T]], parts: list[bytes]) -> list[T]:
    """All that comes of receiving the parts one after the other."""
    return [item for part in parts for item in receive(part)]
