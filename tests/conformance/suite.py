"""The suite as it is run on this machine: its images, the agent under test, and the specs that can't pass here."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conformance import critest
from tests.conformance.critest import Spec
from tests.support.node import RunningAgent
from tests.support.registry import Registry

UPSTREAM = ("docker.io", "registry.k8s.io", "k8s.gcr.io", "gcr.io", "quay.io", "public.ecr.aws")

# Specs of parts that are not there yet, by a regular expression of their names, and why.
NOT_YET = {r"^\[k8s\.io\] NRI ": "the agent has no socket of the Node Resource Interface"}
# Specs that need what critest does not look for itself.
NO_HOST_PORTS = "the kernel has no nf_tables with the family inet"
HOST_PORTS = {r"port mapping with host port": NO_HOST_PORTS}
# Specs that leave something on the machine.
GUEST_ONLY = {r"^\[k8s\.io\] AppArmor ": "it loads profiles into the kernel: only in a guest"}


def absences() -> dict[str, str]:
    """Which specs can't pass on this machine, by a regular expression of their names, and why."""
    host_ports = {} if has_nftables() else HOST_PORTS
    elsewhere = {} if "NODEAGENT_GUEST" in os.environ else GUEST_ONLY
    return NOT_YET | host_ports | elsewhere


def has_nftables() -> bool:
    """Whether the kernel has what host ports need."""
    command = ["nft", "--check", "add table inet probe"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


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
