"""Parsers of cgroup control files (Documentation/admin-guide/cgroup-v2.rst, "Interface Files").

Text in, values out. A text of another form raises `ValueError`.
"""

from typing import NamedTuple

_MAX_CPUS = 1 << 16


class PressureLine(NamedTuple):
    """Shares of time in percent over 10, 60 and 300 s, and the sum of stalls."""

    avg10: float
    avg60: float
    avg300: float
    total_usec: int


class Pressure(NamedTuple):
    """The time for which some, or all, of the tasks waited (Documentation/accounting/psi.rst)."""

    some: PressureLine
    full: PressureLine


NO_PRESSURE = PressureLine(0.0, 0.0, 0.0, 0)


def flat_keyed(data: bytes) -> dict[bytes, bytes]:
    """``KEY VALUE`` lines, as of memory.stat; values are left as text because few of them are wanted."""
    words = data.split()
    if len(words) % 2:
        raise ValueError(f"not pairs of key and value: {data[:200]!r}")
    return dict(zip(words[::2], words[1::2], strict=True))


def nested_keyed(data: bytes) -> dict[bytes, dict[bytes, bytes]]:
    """``KEY SUB=VALUE SUB=VALUE`` lines, as of io.stat."""
    result = {}
    for line in data.splitlines():
        key, *pairs = line.split()
        result[key] = dict(_pair(pair) for pair in pairs)
    return result


def _pair(pair: bytes) -> tuple[bytes, bytes]:
    key, equals, value = pair.partition(b"=")
    if not equals:
        raise ValueError(f"not KEY=VALUE: {pair!r}")
    return key, value


def device_operations(data: bytes) -> dict[tuple[bytes, bytes], int]:
    """``MAJOR:MINOR OPERATION NUMBER`` lines of blkio.* files; the last one, ``Total N``, is left out."""
    result = {}
    for line in data.splitlines():
        words = line.split()
        if len(words) == 3:
            result[words[0], words[1]] = int(words[2])
    return result


def device_number(text: bytes) -> tuple[int, int]:
    """``MAJOR:MINOR``."""
    major, minor = text.split(b":")
    return int(major), int(minor)


def pressure(data: bytes) -> Pressure:
    """The values of a PSI file. Before Linux 5.13 cpu.pressure had no line ``full``."""
    words = data.replace(b"=", b" ").split()
    full = _pressure_line(b"full", words[9:]) if len(words) > 9 else NO_PRESSURE
    return Pressure(_pressure_line(b"some", words[:9]), full)


def _pressure_line(name: bytes, words: list[bytes]) -> PressureLine:
    """``NAME avg10 0.00 avg60 0.00 avg300 0.00 total 0``."""
    if len(words) != 9 or words[0] != name:
        raise ValueError(f"not a line of a pressure file: {words!r}")
    return PressureLine(float(words[2]), float(words[4]), float(words[6]), int(words[8]))


def number_list(text: str) -> frozenset[int]:
    """The "list format" of cpuset(7): ``0-4,9``. Strides (``0-8:1/2``) are left to the kernel's own tools."""
    numbers: set[int] = set()
    for item in text.split(","):
        first, dash, last = item.partition("-")
        low = _cpu(first, text)
        high = _cpu(last, text) if dash else low
        if high < low:
            raise ValueError(f'"{text}" is not a list of numbers and ranges')
        numbers.update(range(low, high + 1))
    return frozenset(numbers)


def _cpu(digits: str, text: str) -> int:
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 5 or int(digits) >= _MAX_CPUS:
        raise ValueError(f'"{text}" is not a list of numbers and ranges')
    return int(digits)
