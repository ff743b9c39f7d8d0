"""The machine of the present run, for what is patched, and for what stands for the kernel."""

from typing import Any

from tests.chaos.simulation.machine import Machine

_NOT_THERE: Any = None
machine: Machine = _NOT_THERE
