"""`nodeagent serve` that has imported everything before it begins, and begins when a byte comes through a pipe.

    python -m tests.chaos.inject.serve GATE serve …

So the calls of a start are those of the agent, not of the interpreter that reads its modules.
"""

import importlib
import pkgutil
import sys
import traceback  # noqa: F401 what the interpreter and asyncio import when they have to report something

import nodeagent
from nodeagent import cli


def main() -> int:
    for module in pkgutil.walk_packages(nodeagent.__path__, "nodeagent."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    gate, *arguments = sys.argv[1:]
    with open(gate, "rb") as pipe:
        pipe.read(1)
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
