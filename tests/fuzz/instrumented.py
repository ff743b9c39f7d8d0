"""One target under `atheris`: ``python -m tests.fuzz.instrumented TARGET [options of libFuzzer]``."""

import importlib
import logging
import sys
from random import Random

from tests.fuzz import mutation

# What is counted as covered: the product, and the parsers of others that it feeds.
MODULES = ["nodeagent", "tomllib", "h11", "websockets", "ipaddress", "urllib.parse"]


def main(name: str, *options: str) -> None:
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=MODULES):
        targets = importlib.import_module("tests.fuzz.targets").TARGETS
    logging.disable()

    def mutate(data: bytes, max_bytes: int, seed: int) -> bytes:
        """Mostly as libFuzzer does, now and then with a knowledge of JSON."""
        random = Random(seed)
        if random.randrange(4):
            mutated: bytes = atheris.Mutate(data, max_bytes)
            return mutated
        return mutation.rewritten(data, random)[:max_bytes]

    atheris.Setup([sys.argv[0], *options], targets[name], custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
