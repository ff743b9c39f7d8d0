"""Memory that a process prepares before it forks, so that its children go on sharing it.

CPython counts references in the object itself, so a child that merely uses an object writes to it, and the kernel
copies the page. An immortal object (PEP 683) has no count. This is for a process that ends by _exit(2) or execve(2):
what is immortal is never freed, and no finaliser runs.

CPython puts new objects where old ones left room, all over the shared memory. Where there is no room, they are side by
side on pages of their own.
"""

import ctypes
import gc
import sys
from collections.abc import Container
from types import CodeType

_IMMORTAL = 0xFFFFFFFF  # in the lower half of ob_refcnt: the value of Python 3.12 and 3.13, which 3.14 accepts
_CountedHalf = ctypes.c_uint32  # on a little-endian machine, see `is_supported`

# CPython's allocator takes objects of up to 512 bytes from pools of 16 KiB, each for one size, a multiple of 16.
_POOL_BITS = 14
_STEP_BYTES, _MAX_SMALL_BYTES = 16, 512
_FLOAT_BYTES, _EMPTY_BYTES = sys.getsizeof(0.0), sys.getsizeof(b"")


def immortalize() -> bool:
    """Make all existing objects immortal; do nothing and return False where Python cannot (before 3.12)."""
    if not is_supported():
        return False
    pools = {0}
    todo = [*gc.get_objects(), *sys.modules.values()]
    while todo:
        thing = todo.pop()
        if thing is todo or sys.getrefcount(thing) >= _IMMORTAL:
            continue
        _make_immortal(thing)
        pools.add(_pool(thing))
        todo.extend(_parts(thing))
    _fill(pools)
    return True


def _fill(pools: Container[int]) -> None:
    """Fill the room between existing objects: make and keep small ones until one is in another pool."""
    for size_bytes in range(_STEP_BYTES, _MAX_SMALL_BYTES + 1, _STEP_BYTES):
        pool = 0
        while pool in pools:
            filler = _filler(size_bytes)
            _make_immortal(filler)
            pool = _pool(filler)


def _filler(size_bytes: int) -> object:
    """An object of that size, or at most one step smaller."""
    if size_bytes < _FLOAT_BYTES:
        return object()
    return float(size_bytes) if size_bytes < _EMPTY_BYTES else bytes(size_bytes - _EMPTY_BYTES)


def _pool(thing: object) -> int:
    return id(thing) >> _POOL_BITS


def _parts(thing: object) -> list[object]:
    """The objects that an object refers to. Code objects do not tell the collector: they are in no cycle."""
    if isinstance(thing, CodeType):
        names = (thing.co_name, thing.co_qualname, thing.co_filename, thing.co_names)
        return [thing.co_consts, thing.co_linetable, thing.co_exceptiontable, *names]
    return gc.get_referents(thing)


def is_supported() -> bool:
    """Whether the interpreter has immortal objects: a probe is asked whether references to it are still counted."""
    if sys.implementation.name != "cpython" or sys.byteorder != "little" or "t" in sys.abiflags:
        return False
    probe = object()
    field = _CountedHalf.from_address(id(probe))
    counted = field.value
    field.value = _IMMORTAL
    more = [probe] * 2
    ignored = field.value == _IMMORTAL
    if not ignored:
        field.value = counted + len(more)
    return ignored


def _make_immortal(thing: object) -> None:
    _CountedHalf.from_address(id(thing)).value = _IMMORTAL
