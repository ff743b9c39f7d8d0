"""Makes a failing script shorter: without some clients, faults and steps it is tried again, and kept if it still fails.

A run depends on the machine, so that one which passes proves little, and one which fails all: the result fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from tests.chaos.history.faults import Plan
from tests.chaos.history.program import Step
from tests.chaos.history.run import Script

T = TypeVar("T")

FIRST_PIECES = 2


class Budget:
    """How many runs are left, and what a script must do to be kept."""

    def __init__(self, runs: int, fails: Callable[[Script], bool]) -> None:
        self.left = runs
        self._fails = fails

    def fails(self, script: Script) -> bool:
        if self.left <= 0:
            return False
        self.left -= 1
        return self._fails(script)


def shrink(script: Script, budget: Budget) -> Script:
    """Clients first, then faults, then the steps of each client."""
    clients = _reduced(
        sorted(script.programs), lambda kept: budget.fails(_with_clients(script, kept))
    )
    script = _with_clients(script, clients)
    plans = _reduced(script.plans, lambda kept: budget.fails(_with(script, plans=kept)))
    script = _with(script, plans=plans)
    for client in clients:
        script = _with_steps(script, client, _reduced_steps(script, client, budget))
    return script


def _reduced_steps(script: Script, client: int, budget: Budget) -> list[Step]:
    return _reduced(
        script.programs[client],
        lambda kept: budget.fails(_with_steps(script, client, kept)),
    )


def _reduced(items: Sequence[T], fails: Callable[[list[T]], bool]) -> list[T]:
    """Leave out pieces of what still fails, which become smaller (Zeller, "delta debugging")."""
    kept, pieces = list(items), FIRST_PIECES
    while len(kept) > 1:
        size = -(-len(kept) // pieces)
        rests = (kept[:start] + kept[start + size :] for start in range(0, len(kept), size))
        shorter = next((rest for rest in rests if rest and fails(rest)), None)
        if shorter is not None:
            kept, pieces = shorter, max(pieces - 1, FIRST_PIECES)
        elif size == 1:
            break
        else:
            pieces = min(2 * pieces, len(kept))
    return kept


def _with(script: Script, *, plans: list[Plan]) -> Script:
    return Script(programs=script.programs, plans=plans)


def _with_clients(script: Script, clients: Sequence[int]) -> Script:
    """Fewer clients make fewer calls: the faults come earlier by as much."""
    programs = {client: script.programs[client] for client in clients}
    share = sum(map(len, programs.values())) / max(script.calls, 1)
    plans = [
        msgspec.structs.replace(plan, after=round(plan.after * share)) for plan in script.plans
    ]
    return Script(programs=programs, plans=plans)


def _with_steps(script: Script, client: int, steps: list[Step]) -> Script:
    return Script(programs={**script.programs, client: steps}, plans=script.plans)
