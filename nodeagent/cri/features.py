"""What Status promises about this node, beyond what every runtime does."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """user_namespaces: with idmapped mounts. The names are the CRI's."""

    recursive_read_only_mounts: bool = True
    user_namespaces: bool = False
    user_namespaces_host_network: bool = False
    supplemental_groups_policy: bool = True
    mount_options: bool = True
