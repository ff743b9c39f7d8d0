"""Each in an interpreter of its own: what is immortal stays so."""

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[3]
IMMORTAL_SINCE = (3, 12)

pytestmark = pytest.mark.skipif(
    sys.version_info < IMMORTAL_SINCE, reason="this interpreter has no immortal objects"
)

PREAMBLE = f"""
import gc, os, sys, weakref
sys.path.insert(0, {str(PROJECT)!r})
from nodeagent.linux.immortal import immortalize
class Thing: pass
def function(): return "constant of a function"
things = [Thing() for _ in range(20000)]
assert immortalize()
"""


def run(script: str) -> str:
    command = [sys.executable, "-I", "-S", "-c", PREAMBLE + script]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def test_references_to_what_was_there_are_not_counted() -> None:
    script = """
for thing in (things, things[7], function, function.__code__, function.__code__.co_consts, Thing, os, os.environ):
    before = sys.getrefcount(thing)
    more = [thing] * 10
    assert sys.getrefcount(thing) == before, thing
    del more
print("so it is")
"""
    assert run(script) == "so it is\n"


def test_what_comes_later_is_freed_as_ever() -> None:
    script = """
thing = Thing()
gone = weakref.ref(thing)
del thing
circle = Thing(); circle.itself = circle
gone_too = weakref.ref(circle)
del circle
gc.collect()
print(gone(), gone_too())
"""
    assert run(script) == "None None\n"


def test_a_child_that_uses_objects_copies_nothing() -> None:
    """20000 objects are more than a megabyte: of that, next to nothing becomes the child's own."""
    script = """
gc.freeze(); gc.disable()
ready, done = os.pipe(), os.pipe()
if not os.fork():
    for _ in range(2):
        for thing in things: pass
        other = [*things]
    os.write(ready[1], b"x"); os.read(done[0], 1); os._exit(0)
os.read(ready[0], 1)
pid = int(open("/proc/self/task/%d/children" % os.getpid()).read())
dirty = sum(int(l.split()[1]) for l in open(f"/proc/{pid}/smaps_rollup") if l.startswith("Private_Dirty"))
os.write(done[1], b"x"); os.wait()
print(dirty)
"""
    assert int(run(script)) < 1500


def test_what_a_child_makes_lies_on_pages_of_its_own() -> None:
    """2000 objects of 64 bytes are 125 KiB; in the room that others left, each would take a page."""
    script = """
room = [bytes(31) for _ in range(40000)]
del room[::20]
immortalize()
gc.freeze(); gc.disable()
more = [None] * 2000
ready = os.pipe()
def dirty():
    return sum(int(l.split()[1]) for l in open("/proc/self/smaps_rollup") if l.startswith("Private_Dirty"))
if not os.fork():
    before = dirty()
    for n in range(2000): more[n] = bytes(31)
    os.write(ready[1], str(dirty() - before).encode()); os._exit(0)
print(os.read(ready[0], 100).decode()); os.wait()
"""
    assert int(run(script)) < 1000
