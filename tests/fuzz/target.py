"""What a fuzz target is, and what every one of them may use."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

STEP_BYTES = 4096


@dataclass(frozen=True)
class Target:
    """A parser of foreign bytes, called as the product calls it.

    refuses: the errors that it documents; any other is a finding. seeds: what it takes, to be changed at random.
    """

    parse: Callable[[bytes], object]
    refuses: tuple[type[Exception], ...]
    seeds: tuple[bytes, ...] = field(repr=False)

    @property
    def name(self) -> str:
        return self.parse.__name__

    def __call__(self, data: bytes) -> None:
        try:
            self.parse(data)
        except self.refuses:
            pass


def in_steps(data: bytes) -> Iterator[bytes]:
    """The first byte decides how much comes at a time."""
    step = (data[0] if data else 0) or STEP_BYTES
    for start in range(1, len(data), step):
        yield data[start : start + step]
