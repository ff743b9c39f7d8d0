"""The suite as it is run on this machine: its images, the agent under test, and the specs that can't pass here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nodeagent.check import features
from nodeagent.config import Config
from tests.conformance import critest
from tests.conformance.critest import Spec
from tests.node import RunningAgent
from tests.registry import Registry

UPSTREAM = ("docker.io", "registry.k8s.io", "k8s.gcr.io", "gcr.io", "quay.io", "public.ecr.aws")

# Specs of parts that are not there yet, by a regular expression of their names, and why.
NOT_YET: dict[str, str] = {}
# Specs that need something of the kernel that critest does not look for itself.
NEEDS = {r"port mapping": "nf_tables"}
# Specs that leave something on the machine.
GUEST_ONLY = {r"^\[k8s\.io\] AppArmor ": "it loads profiles into the kernel: only in a guest"}


def absences() -> dict[str, str]:
    """Which specs can't pass on this machine, by a regular expression of their names, and why."""
    present = {feature.name: feature.present for feature in features(Config())}
    missing = {
        pattern: f"the kernel has no {feature}"
        for pattern, feature in NEEDS.items()
        if not present[feature]
    }
    elsewhere = {} if "NODEAGENT_GUEST" in os.environ else GUEST_ONLY
    return NOT_YET | missing | elsewhere


def split(names: list[str], absent: dict[str, str]) -> tuple[list[str], list[Spec]]:
    """Those to run, and those to skip."""
    skipped = [
        Spec(name, critest.SKIPPED, 0.0, reason)
        for name in names
        for pattern, reason in absent.items()
        if re.search(pattern, name)
    ]
    return sorted(set(names) - {spec.name for spec in skipped}), skipped


@contextmanager
def agent_with_mirrors(root: Path, registry: Registry, config: str = "") -> Iterator[RunningAgent]:
    """An agent that pulls everything from `registry`; what the suite leaves behind is removed."""
    agent = RunningAgent(root, config=config)
    agent.trust(registry.host, *UPSTREAM)
    agent.start()
    try:
        yield agent
        agent.remove_pods()
    finally:
        code = agent.stop()
    if code != 0:
        raise RuntimeError(f"the agent ended with {code}:\n{agent.log.read_text()[-2000:]}")
