"""Objects without a reference count, for processes that are forked and shall go on sharing their memory.

CPython counts references in the object itself, so that a child which merely uses an object writes to it, and the kernel
copies the page. An immortal object (PEP 683) has no count. It is for a process that ends by _exit(2) or execve(2):
whatever is immortal is never freed, and nothing happens at its end.
"""

import ctypes
import gc
import sys
from types import CodeType

_IMMORTAL = 0xFFFFFFFF  # in the lower half of ob_refcnt: so Python 3.12 and 3.13 spell it, and 3.14 takes it
_CountedHalf = ctypes.c_uint32  # little-endian, as all that we run on


def immortalize() -> bool:
    """Make all that there is immortal; False, and nothing done, where the interpreter cannot (before 3.12)."""
    if not _is_supported():
        return False
    todo = [*gc.get_objects(), *sys.modules.values()]
    while todo:
        thing = todo.pop()
        if thing is todo or sys.getrefcount(thing) >= _IMMORTAL:
            continue
        _make_immortal(thing)
        todo.extend(_parts(thing))
    return True


def _parts(thing: object) -> list[object]:
    """What an object refers to. Code does not tell the collector, since it is in no circle."""
    if isinstance(thing, CodeType):
        names = (thing.co_name, thing.co_qualname, thing.co_filename, thing.co_names)
        return [thing.co_consts, thing.co_linetable, thing.co_exceptiontable, *names]
    return gc.get_referents(thing)


def _is_supported() -> bool:
    """Ask a probe whether references to it are still counted."""
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
