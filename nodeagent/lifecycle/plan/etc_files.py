"""The files that a pod's containers find under /etc: hosts, hostname and resolv.conf.

They live in the pod's own small file system, belong to its root and are bound into every container that does not
bring its own.
"""

import os
import socket
from pathlib import Path

from nodeagent.requests import DNS, SandboxConfig
from nodeagent.sandbox import paths

MODE = 0o644  # all users of the containers read them, whatever our umask
HOSTS_HEAD = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::0\tip6-localnet
ff00::0\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
"""


def directory(pod: Path) -> Path:
    """The directory of these files and of the pod's shared memory. pod: the pod's own directory."""
    return Path(paths.shared(str(pod)))


def write(pod: Path, config: SandboxConfig, addresses: tuple[str, ...]) -> None:
    """Write all three, which do not exist yet; a pod on the node's network sees the node's hosts."""
    name = hostname(config)
    names = hosts(name, addresses).encode()
    if config.namespaces.network == "node":
        names = node_file("/etc/hosts", HOSTS_HEAD)
    contents = {
        "hosts": names,
        "hostname": f"{name}\n".encode(),
        "resolv.conf": resolv_conf(config.dns).encode() or node_file("/etc/resolv.conf", ""),
    }
    where = directory(pod)
    for file_name, content in contents.items():
        with open(where / file_name, "xb") as file:
            os.fchown(file.fileno(), *config.namespaces.on_node(0, 0))
            os.fchmod(file.fileno(), MODE)
            file.write(content)


def hostname(config: SandboxConfig) -> str:
    """The pod's own name, or the node's where the pod has none."""
    return config.hostname or socket.gethostname()


def hosts(name: str, addresses: tuple[str, ...]) -> str:
    """The content of hosts(5). A full name that ends with a dot is found with it and without it."""
    names = "\t".join(dict.fromkeys((name, name.rstrip(".") or name)))
    return HOSTS_HEAD + "".join(f"{address}\t{names}\n" for address in addresses)


def resolv_conf(dns: DNS | None) -> str:
    """resolv.conf(5) of a DNS configuration; empty where there is none, which means the node's."""
    if dns is None or not (dns.servers or dns.searches or dns.options):
        return ""
    lines = [f"search {' '.join(dns.searches)}"] if dns.searches else []
    lines += [f"nameserver {server}" for server in dns.servers]
    lines += [f"options {' '.join(dns.options)}"] if dns.options else []
    return "\n".join(lines) + "\n"


def node_file(path: str, fallback: str) -> bytes:
    """The content of the node's own file, byte for byte; the fallback where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return fallback.encode()
