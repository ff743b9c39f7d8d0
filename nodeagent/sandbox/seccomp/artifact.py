"""Compiling seccomp profiles that anybody may have written, in a process of their own.

Four rules can keep libseccomp busy for hours: the ways through conditions on several arguments multiply. Whoever makes
a pod names the artifact, so its cost is bounded by the kernel, in a program (`main`) that a thread of the agent starts
and waits for. There are a few of these threads for the whole agent: requests wait in their queue, and take no thread
that anything else needs. A profile in a file of the node is its administrator's, and is compiled in the agent.
"""

import base64
import functools
import json
import resource
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypedDict

from nodeagent.errors import InvalidArgument, ResourceExhausted, Unavailable, Unsupported
from nodeagent.linux import processes
from nodeagent.sandbox.seccomp import profile
from nodeagent.sandbox.seccomp.profile import Filter

COMPILERS = 2  # at once, whoever asks; each may take all of a processor
CPU_SECONDS = 5  # what engines distribute takes a hundredth
MEMORY_BYTES = 512 << 20
WALL_SECONDS = 60.0
_CACHED = 64

_FIRST_TO_GO = 1000  # OOM_SCORE_ADJ_MAX

# Return codes. The first is that of the OOM killer, which is not the profile's fault.
_SIGKILL, _SIGXCPU = -9, -24
_TOO_MUCH = (
    f"takes more than {CPU_SECONDS} s or {MEMORY_BYTES >> 20} MiB to compile; use fewer conditions"
)


class _Encoded(TypedDict):
    """A `Filter`; program: base64."""

    program: str
    flags: int


class _Order(TypedDict):
    """The input of the program. text: base64."""

    text: str
    held: int
    base: _Encoded | None


# ---- in the agent ----


_threads = ThreadPoolExecutor(COMPILERS, "seccomp")


def compiled(text: bytes, held: int, base: Filter | None = None) -> Future[Filter]:
    """Compile a profile's text, for processes with these capabilities, together with its base.

    The future raises InvalidArgument and Unsupported for the profile's faults, Unavailable and ResourceExhausted for
    others. One that is cancelled before its turn is not compiled; one that has begun keeps its thread to the end.
    """
    return _threads.submit(_compiled, text, held, base)


@functools.lru_cache(_CACHED)
def _compiled(text: bytes, held: int, base: Filter | None) -> Filter:
    order = _Order(
        text=base64.b64encode(text).decode(),
        held=held,
        base=None if base is None else _encoded(base),
    )
    done = _run(json.dumps(order))
    if done.returncode == _SIGXCPU:
        raise InvalidArgument(_TOO_MUCH)
    if done.returncode == _SIGKILL:
        raise ResourceExhausted("the compiler was killed; the node may be out of memory")
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise InvalidArgument(f"the compiler ended with {done.returncode}") from None
    if "error" in answer:
        kind = Unsupported if answer["error"] == Unsupported.__name__ else InvalidArgument
        raise kind(answer["text"])
    return _decoded(answer)


def _run(order: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-I", "-m", __spec__.name]
    try:
        return subprocess.run(
            command,
            input=order,
            text=True,
            capture_output=True,
            timeout=WALL_SECONDS,
            cwd="/",
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"not compiled within {WALL_SECONDS:g} s; the node is busy") from None


def _encoded(found: Filter) -> _Encoded:
    return _Encoded(program=base64.b64encode(found.program).decode(), flags=found.flags)


def _decoded(found: _Encoded) -> Filter:
    return Filter(base64.b64decode(found["program"]), found["flags"])


# ---- in the program ----


def main() -> None:
    """Read an order, write a filter or an error, all of it JSON."""
    # The agent's unit protects it from the OOM killer, and a child inherits that: this one is to be killed first.
    processes.set_oom_score(_FIRST_TO_GO)
    # SIGXCPU at the soft limit tells this end from the OOM killer's; SIGKILL follows at the hard one (setrlimit(2)).
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    order: _Order = json.load(sys.stdin)
    try:
        json.dump(_encoded(_compile(order)), sys.stdout)
    except (InvalidArgument, Unsupported) as error:
        json.dump({"error": type(error).__name__, "text": str(error)}, sys.stdout)
    except (OSError, MemoryError):
        json.dump({"error": InvalidArgument.__name__, "text": _TOO_MUCH}, sys.stdout)


def _compile(order: _Order) -> Filter:
    own = profile.from_json(base64.b64decode(order["text"]), order["held"])
    base = order["base"]
    return own if base is None else profile.intersection(_decoded(base), own)


if __name__ == "__main__":
    main()
