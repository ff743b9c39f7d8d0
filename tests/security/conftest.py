"""The containers of the kernel tests, for attacks on them."""

from tests.kernel.sandbox.conftest import layer, plan

__all__ = ["layer", "plan"]
