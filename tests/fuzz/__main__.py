"""Coverage-guided fuzzing of all targets, or of one; ``make fuzz`` runs this where `atheris` is installed.

Every target is a process of its own, which starts from the target's seeds and from what earlier runs have found
interesting. What breaks a target is kept; ``python -m tests.fuzz TARGET FILE`` shows it again, without `atheris`.
"""

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tests.fuzz.targets import TARGETS

PROJECT = Path(__file__).parent.parent.parent
CORPUS = PROJECT / ".cache/fuzz/corpus"
FINDINGS = PROJECT / ".cache/fuzz/findings"

# So long may one input take, so far may the process grow, and so long may an input be.
HANG_SECONDS = 60
MAX_MEMORY_MB = 1024
MAX_INPUT_BYTES = 16 << 10


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", nargs="?", choices=TARGETS, metavar="TARGET")
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE")
    parser.add_argument("--seconds", type=int, default=10, help="for each target")
    arguments = parser.parse_args()
    if arguments.file:
        TARGETS[arguments.target](arguments.file.read_bytes())
        return 0
    FINDINGS.mkdir(parents=True, exist_ok=True)
    names = [arguments.target] if arguments.target else list(TARGETS)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sound = [*pool.map(partial(fuzz, seconds=arguments.seconds), names)]
    return 0 if all(sound) else 1


def fuzz(name: str, seconds: int) -> bool:
    """False at a finding. Prints a line about the target."""
    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(TARGETS[name].seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    log = FINDINGS / f"{name}.log"
    log.unlink(missing_ok=True)
    options = {
        "max_total_time": seconds,
        "timeout": HANG_SECONDS,
        "rss_limit_mb": MAX_MEMORY_MB,
        "max_len": MAX_INPUT_BYTES,
        "artifact_prefix": f"{FINDINGS}/{name}-",
    }
    command = [sys.executable, "-m", "tests.fuzz.instrumented", name, str(corpus)]
    command += [f"-{key}={value}" for key, value in options.items()]
    ended = subprocess.run(
        command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    output = ended.stdout.decode(errors="replace")
    runs, coverage = _last(r"^#(\d+)", output), _last(r" cov: (\d+)", output)
    verdict = "no findings"
    if ended.returncode:
        log.write_text(output)
        verdict = f"FAILED: {_explanation(output)}, see {log.relative_to(PROJECT)}"
    print(f"{name:28}{runs:>9} runs  coverage {coverage:>5}  {verdict}", flush=True)
    return ended.returncode == 0


def _last(pattern: str, output: str) -> str:
    """libFuzzer says now and then how far it is."""
    return next(reversed(re.findall(pattern, output, re.MULTILINE)), "0")


def _explanation(output: str) -> str:
    found = re.search(r"exception: ===\n(.*)|ERROR: libFuzzer: (.*)", output)
    return (found[1] or found[2])[:200] if found else "it could not be run"


if __name__ == "__main__":
    sys.exit(main())
