"""Runs critest, the public validation suite of the CRI, and says how each spec ended.

    python -m tests.conformance [--focus REGEX] [--config TOML] [--endpoint unix://SOCKET]

An agent of its own is started under a temporary root, beside a registry with all images. With --endpoint another
runtime is asked, which must find registry.k8s.io and gcr.io by itself. The exit status is 1 if a spec failed.
"""

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from nodeagent.api import runtime_pb2 as pb
from nodeagent.api import runtime_pb2_grpc as rpc
from nodeagent.files import remove_tree
from tests.conformance import apparmor, critest, suite
from tests.conformance.critest import FAILED, PASSED, SKIPPED, Critest, Spec
from tests.support import images
from tests.support.images import PROJECT
from tests.support.registry import fill, running_registry

PROGRAM = PROJECT / ".tools/bin/critest"
TIMEOUT_SECONDS = 600.0
MARKS = {PASSED: "ok", FAILED: "FAILED", SKIPPED: "skipped"}


def main() -> int:
    options = _parser().parse_args()
    if not PROGRAM.exists():
        sys.exit("critest is not there: `make tools` builds it with Go 1.26 or newer")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with temporary_folder() as root:
        if "NODEAGENT_GUEST" in os.environ:
            apparmor.put_in_path(root / "bin")
        names = [name for name in critest.names(PROGRAM) if re.search(options.focus, name)]
        wanted, skipped = suite.split(names, suite.absences())
        started = time.monotonic()
        with _runtime(root, options) as endpoint:
            print(describe(endpoint), flush=True)
            ended = Critest(PROGRAM, root / "critest").run(endpoint, wanted, options.timeout)
        return report([*ended, *skipped], time.monotonic() - started)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Kept after an error; removed without crossing the mounts that an agent may have left."""
    folder = tempfile.mkdtemp(prefix="na-conformance-")
    yield Path(folder)
    remove_tree(folder)


def describe(endpoint: str) -> str:
    """What is being asked, by its own words."""
    with grpc.insecure_channel(endpoint) as channel:
        stub = rpc.RuntimeServiceStub(channel)
        version = stub.Version(pb.VersionRequest(), timeout=60)
        driver = stub.RuntimeConfig(pb.RuntimeConfigRequest(), timeout=60).linux.cgroup_driver
    hierarchy = "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1"
    return (
        f"{version.runtime_name} {version.runtime_version} on Linux {os.uname().release}, "
        f"cgroup {hierarchy}, driver {pb.CgroupDriver.Name(driver).lower()}"
    )


def report(specs: list[Spec], seconds: float) -> int:
    for spec in sorted(specs, key=lambda spec: (list(MARKS).index(spec.state), spec.name)):
        print(f"{MARKS[spec.state]:8}{spec.seconds:6.1f} s  {spec.name}")
        for line in [*spec.reason.splitlines(), *spec.timeline.splitlines()]:
            print(f"{'':18}{line}")
    counts = Counter(spec.state for spec in specs)
    print(", ".join(f"{counts[state]} {state}" for state in MARKS), f"in {seconds:.0f} s")
    return 1 if counts[FAILED] else 0


@contextmanager
def _runtime(root: Path, options: argparse.Namespace) -> Iterator[str]:
    """The socket of the runtime under test."""
    if options.endpoint:
        yield options.endpoint
        return
    with running_registry(root / "registry") as registry:
        fill(registry, images.catalog())
        config = Path(options.config).read_text() if options.config else ""
        with suite.agent_with_mirrors(root / "agent", registry, config) as agent:
            yield agent.endpoint
            if options.log:
                print(agent.log.read_text(), file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="conformance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--focus", default="", metavar="REGEX", help="only specs of such names")
    parser.add_argument("--config", metavar="TOML", help="the agent's configuration file")
    parser.add_argument("--endpoint", metavar="URL", help="of another runtime")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_SECONDS, help="seconds")
    parser.add_argument("--log", action="store_true", help="print the agent's log at the end")
    return parser


if __name__ == "__main__":
    sys.exit(main())
