"""Requests that use every field of the contract, and walks over their fields."""

from collections.abc import Iterator
from typing import Any

from google.protobuf import text_format
from google.protobuf.message import Message

from nodeagent.api import runtime_pb2 as pb

OVERHEAD = "cpu_period: 50000 cpu_quota: 25000 cpu_shares: 512 memory_limit_in_bytes: 1048576"

POD_RESOURCES = f"""
    {OVERHEAD} memory_swap_limit_in_bytes: 2097152 cpuset_cpus: "0-3,7" cpuset_mems: "0"
    hugepage_limits {{ page_size: "2MB" limit: 4096 }}
    unified {{ key: "memory.high" value: "max" }}
"""

RESOURCES = f"{POD_RESOURCES} oom_score_adj: -5"

SANDBOX = f"""
    metadata {{ name: "web" uid: "u-1" namespace: "default" attempt: 3 }}
    hostname: "web-0" log_directory: "/var/log/pods/web"
    dns_config {{ servers: "10.0.0.10" searches: "svc.local" options: "ndots:5" }}
    port_mappings {{ protocol: UDP container_port: 53 host_port: 5353 host_ip: "127.0.0.1" }}
    labels {{ key: "app" value: "web" }}
    annotations {{ key: "note" value: "two\\nlines" }}
    linux {{
      cgroup_parent: "/kubepods/podu-1"
      security_context {{
        namespace_options {{
          network: POD pid: CONTAINER ipc: POD
          userns_options {{
            mode: POD
            uids {{ container_id: 0 host_id: 65536 length: 65536 }}
            gids {{ container_id: 0 host_id: 131072 length: 65536 }}
          }}
        }}
        selinux_options {{ user: "u" role: "r" type: "t" level: "s0:c1,c2" }}
        run_as_user {{ value: 1000 }} run_as_group {{ value: 1001 }}
        readonly_rootfs: true supplemental_groups: [5, 6] supplemental_groups_policy: Strict
        privileged: true
        seccomp {{ profile_type: Localhost localhost_ref: "/p.json" }}
        apparmor {{ profile_type: Localhost localhost_ref: "mine" }}
      }}
      sysctls {{ key: "net.ipv4.tcp_syncookies" value: "1" }}
      overhead {{ {OVERHEAD} }}
      resources {{ {POD_RESOURCES} }}
    }}
"""

CONTAINER = f"""
    metadata {{ name: "main" attempt: 2 }}
    image {{
      image: "sha256:abc" user_specified_image: "busybox" runtime_handler: "h"
      annotations {{ key: "i" value: "j" }}
    }}
    command: "/bin/sh" args: "-c" working_dir: "/srv" envs {{ key: "LANG" value: "\\xff" }}
    mounts {{
      container_path: "/data" host_path: "/srv/data" readonly: true selinux_relabel: true
      propagation: PROPAGATION_PRIVATE recursive_read_only: true mount_options: "noexec"
      uidMappings {{ container_id: 0 host_id: 65536 length: 65536 }}
      gidMappings {{ container_id: 0 host_id: 65536 length: 65536 }}
    }}
    mounts {{
      container_path: "/model" readonly: true image_sub_path: "weights"
      image {{
        image: "sha256:def" user_specified_image: "model:1" runtime_handler: "h"
        annotations {{ key: "k" value: "v" }}
      }}
    }}
    devices {{ container_path: "/dev/a" host_path: "/dev/b" permissions: "rw" }}
    CDI_devices {{ name: "vendor.com/gpu=0" }}
    labels {{ key: "tier" value: "front" }}
    annotations {{ key: "hash" value: "1f" }}
    log_path: "main/2.log" stdin: true stdin_once: true tty: true stop_signal: SIGNAL_SIGQUIT
    linux {{
      resources {{ {RESOURCES} }}
      security_context {{
        capabilities {{
          add_capabilities: "NET_ADMIN" drop_capabilities: "ALL" add_ambient_capabilities: "CHOWN"
        }}
        privileged: true
        namespace_options {{ pid: TARGET target_id: "t-1" cgroupns_options {{ mode: NODE }} }}
        selinux_options {{ user: "u" role: "r" type: "t" level: "s0" }}
        run_as_user {{ value: 7 }} run_as_group {{ value: 8 }}
        readonly_rootfs: true supplemental_groups: 9 supplemental_groups_policy: Strict
        no_new_privs: true masked_paths: "/proc/keys" readonly_paths: "/proc/sys"
        seccomp {{
          profile_type: OCI oci_ref: "reg/p@sha256:1"
          base_profile {{ type: Localhost localhost_ref: "/base.json" }}
        }}
        apparmor {{ profile_type: Unconfined }}
        cgroup_mount_mode: CGROUP_MOUNT_MODE_READ_WRITE
      }}
    }}
"""


def sandbox(text: str = SANDBOX) -> pb.PodSandboxConfig:
    return text_format.Parse(text, pb.PodSandboxConfig())


def container(text: str = CONTAINER) -> pb.ContainerConfig:
    return text_format.Parse(text, pb.ContainerConfig())


def simple_sandbox(**fields: object) -> pb.PodSandboxConfig:
    config = pb.PodSandboxConfig(
        metadata=pb.PodSandboxMetadata(name="web", uid="u-1", namespace="default")
    )
    config.MergeFrom(pb.PodSandboxConfig(**fields))  # type: ignore[arg-type]
    return config


def simple_container(**fields: object) -> pb.ContainerConfig:
    config = pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name="main"), image=pb.ImageSpec(image="busybox")
    )
    config.MergeFrom(pb.ContainerConfig(**fields))  # type: ignore[arg-type]
    return config


def in_container(**fields: object) -> pb.ContainerConfig:
    """A container with these fields of its security context."""
    context = pb.LinuxContainerSecurityContext(**fields)  # type: ignore[arg-type]
    return simple_container(linux=pb.LinuxContainerConfig(security_context=context))


def in_sandbox(**fields: object) -> pb.PodSandboxConfig:
    """A pod with these fields of its security context."""
    context = pb.LinuxSandboxSecurityContext(**fields)  # type: ignore[arg-type]
    return simple_sandbox(linux=pb.LinuxPodSandboxConfig(security_context=context))


def leaves(descriptor: Any, prefix: str = "") -> Iterator[str]:
    """Paths of all fields that hold values, those of repeated messages once."""
    for field in descriptor.fields:
        path = f"{prefix}{field.name}"
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            yield path
        else:
            yield from leaves(field.message_type, f"{path}.")


def without(message: Message, path: str) -> bool:
    """Clear one field wherever it is set. False: it was set nowhere."""
    head, _, rest = path.partition(".")
    field = message.DESCRIPTOR.fields_by_name[head]
    value = getattr(message, head)
    if rest:
        children = list(value) if field.is_repeated else [value]
        return sum(without(child, rest) for child in children) > 0
    was = message.HasField(head) if field.has_presence else bool(value)
    message.ClearField(head)
    return was
