"""Translation of PodSandboxConfig to `SandboxConfig`: each field is mapped, or refused by its name."""

import ipaddress
import re
from collections.abc import Sequence

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri import translate_security as security
from nodeagent.cri import validate
from nodeagent.cri.translate_namespaces import pod_namespaces
from nodeagent.cri.translate_resources import overhead, pod_resources
from nodeagent.errors import InvalidArgument, Unsupported
from nodeagent.linux import sysctls
from nodeagent.net import hostports
from nodeagent.requests import DNS, Namespaces, PortMapping, SandboxConfig, Transport

_HOSTNAME_BYTES = 64  # HOST_NAME_MAX
_WORD = re.compile(r"\S+")
_MAX_SYSCTLS = 256

_PROTOCOLS: dict[int, Transport] = {
    pb.TCP: "tcp",
    pb.UDP: "udp",
    pb.SCTP: "sctp",
}


def sandbox_config(message: pb.PodSandboxConfig) -> SandboxConfig:
    if message.HasField("windows"):
        raise Unsupported("config.windows: this is a Linux node")
    linux, context = message.linux, message.linux.security_context
    field = "config.linux.security_context"
    user = security.user_id(context, field)
    namespaces = pod_namespaces(context.namespace_options, f"{field}.namespace_options")
    return SandboxConfig(
        name=validate.name(message.metadata.name, "config.metadata.name"),
        uid=validate.name(message.metadata.uid, "config.metadata.uid"),
        namespace=validate.name(message.metadata.namespace, "config.metadata.namespace"),
        attempt=message.metadata.attempt,
        hostname=_hostname(message.hostname, namespaces),
        log_directory=validate.optional_path(message.log_directory, "config.log_directory"),
        dns=_dns(message.dns_config) if message.HasField("dns_config") else None,
        port_mappings=_port_mappings(message.port_mappings, namespaces),
        labels=validate.metadata(message.labels, "config.labels"),
        annotations=validate.metadata(message.annotations, "config.annotations"),
        cgroup_parent=validate.optional_path(
            _rooted(linux.cgroup_parent), "config.linux.cgroup_parent"
        ),
        namespaces=namespaces,
        sysctls=_sysctls(linux, namespaces),
        privileged=context.privileged,
        readonly_rootfs=context.readonly_rootfs,
        run_as_user=user,
        run_as_group=security.group_id(context, field, has_user=user is not None),
        supplemental_groups=security.groups(context, field),
        groups_policy=security.groups_policy(context, field),
        seccomp=security.seccomp(context, field),
        apparmor=security.apparmor(context, field),
        selinux=security.selinux(context, field),
        overhead=(
            overhead(linux.overhead, "config.linux.overhead")
            if linux.HasField("overhead")
            else None
        ),
        resources=(
            pod_resources(linux.resources, "config.linux.resources")
            if linux.HasField("resources")
            else None
        ),
    )


def _rooted(cgroup_parent: str) -> str:
    """An absolute path; a slice may come by its name alone, as systemd names it."""
    is_name = cgroup_parent.endswith(".slice") and "/" not in cgroup_parent
    return f"/{cgroup_parent}" if is_name else cgroup_parent


def _hostname(value: str, namespaces: Namespaces) -> str:
    """A name that sethostname(2) takes; a final dot is allowed, which the kubelet leaves without a cluster domain."""
    if not value:
        return ""
    if namespaces.network == "node":
        validate.refuse("config.hostname", "a pod on the node's network has the node's hostname")
    validate.text(value, "config.hostname", max_bytes=_HOSTNAME_BYTES)
    return validate.matching(value, _WORD, "config.hostname", "one word, as /etc/hosts needs it")


def _dns(message: pb.DNSConfig) -> DNS:
    for index, server in enumerate(message.servers):
        try:
            ipaddress.ip_address(server)
        except ValueError:
            validate.refuse(f"config.dns_config.servers[{index}]", f'"{server}" is no IP address')
    return DNS(
        servers=_words(message.servers, "config.dns_config.servers"),
        searches=_words(message.searches, "config.dns_config.searches"),
        options=_words(message.options, "config.dns_config.options"),
    )


def _words(values: Sequence[str], field: str) -> tuple[str, ...]:
    """Parts of a line of resolv.conf(5), each one word: a blank or line end in one would begin another option."""
    for index, value in enumerate(validate.bounded(values, field)):
        validate.text(value, f"{field}[{index}]")
        validate.matching(value, _WORD, f"{field}[{index}]", "one word")
    return tuple(values)


def _port_mappings(
    messages: Sequence[pb.PortMapping], namespaces: Namespaces
) -> tuple[PortMapping, ...]:
    """Translate all mappings; host port 0 means not published."""
    field = "config.port_mappings"
    validate.bounded(messages, field)
    mappings = tuple(_port_mapping(m, f"{field}[{index}]") for index, m in enumerate(messages))
    if namespaces.network == "node":
        for index, mapping in enumerate(mappings):
            _already_published(mapping, f"{field}[{index}]")
    return mappings


def _already_published(mapping: PortMapping, field: str) -> None:
    """Refuse a mapping that would have to be forwarded: on the node's network nothing is."""
    if mapping.host_port not in (0, mapping.container_port):
        validate.refuse(
            f"{field}.host_port",
            f"{mapping.host_port} is not the container's {mapping.container_port},"
            " and the pod is on the node's network",
        )


def _port_mapping(message: pb.PortMapping, field: str) -> PortMapping:
    mapping = PortMapping(
        protocol=validate.word(message.protocol, _PROTOCOLS, f"{field}.protocol"),
        container_port=message.container_port,
        host_port=message.host_port,
        host_ip=message.host_ip,
    )
    hostports.check(mapping, field)
    return mapping


def _sysctls(linux: pb.LinuxPodSandboxConfig, namespaces: Namespaces) -> dict[str, str]:
    """Translate sysctls of namespaces that the pod has of its own; any other would change the node."""
    field = "config.linux.sysctls"
    if len(linux.sysctls) > _MAX_SYSCTLS:
        validate.refuse(field, f"has more than {_MAX_SYSCTLS} entries")
    try:
        sysctls.check(linux.sysctls, namespaces.owned)
    except InvalidArgument as error:
        validate.refuse(field, str(error))
    return dict(linux.sysctls)
