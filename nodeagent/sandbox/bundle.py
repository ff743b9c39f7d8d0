"""The OCI bundle of a container that has hooks: what they expect to find in its directory."""

import os

from nodeagent import files
from nodeagent.sandbox.spec import ContainerPlan

OCI_VERSION = "1.2.0"
CONFIG = "config.json"
ROOTFS = "rootfs"


def write_bundle(plan: ContainerPlan) -> None:
    """Write it on the node, until the container is removed; for root alone, as it has the container's environment."""
    bundle = plan["hooks"]["bundle"]
    os.mkdir(bundle, 0o700)
    files.write_atomic(f"{bundle}/{CONFIG}", plan["hooks"]["config"].encode(), 0o600, sync=False)
