"""What Status promises about this node, beyond what every runtime does."""

from collections.abc import Iterable
from dataclasses import dataclass

from nodeagent.api import runtime_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Features by the CRI's names. user_namespaces: with idmapped mounts. cgroup_mount_mode: also read-write."""

    recursive_read_only_mounts: bool = True
    user_namespaces: bool = False
    user_namespaces_host_network: bool = False
    supplemental_groups_policy: bool = True
    mount_options: bool = True
    cgroup_namespaces: bool = False
    cgroup_mount_mode: bool = False
    seccomp_profile_oci: bool = False

    def message(self) -> pb.RuntimeFeatures:
        return pb.RuntimeFeatures(
            supplemental_groups_policy=self.supplemental_groups_policy,
            user_namespaces_host_network=self.user_namespaces_host_network,
            mount_options=self.mount_options,
            cgroup_mount_mode=self.cgroup_mount_mode,
            seccomp_profile_oci=self.seccomp_profile_oci,
        )

    def handlers(self, names: Iterable[str]) -> list[pb.RuntimeHandler]:
        """The default handler and those of these names: all of them are this runtime, with the same features."""
        features = pb.RuntimeHandlerFeatures(
            recursive_read_only_mounts=self.recursive_read_only_mounts,
            user_namespaces=self.user_namespaces,
            cgroup_namespaces=self.cgroup_namespaces,
        )
        return [pb.RuntimeHandler(name=name, features=features) for name in ("", *names)]
