"""The OCI bundle of a container that has hooks: what they expect to find in its directory."""

import os

from nodeagent import files
from nodeagent.sandbox.spec import ContainerPlan

OCI_VERSION = "1.2.0"
CONFIG = "config.json"
ROOTFS = "rootfs"


def write_bundle(plan: ContainerPlan) -> None:
    """On the node, for as long as anything is known of the container; for root alone, as its environment is in it."""
    bundle = plan["hooks"]["bundle"]
    os.mkdir(bundle, 0o700)
    files.write_atomic(f"{bundle}/{CONFIG}", plan["hooks"]["config"].encode(), 0o600, sync=False)
