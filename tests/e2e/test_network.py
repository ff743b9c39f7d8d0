"""Pods on the bridge, on the node's network, and their ports on the node."""

import socket
import urllib.request

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.support.cri import Cri, Pod, pod_options, refused
from tests.support.node import free_port, wait_for

PAGE = ("sh", "-c", "echo page > /index.html; exec httpd -f -p 8080 -h /")


def fetch(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=60) as answer:
        return str(answer.read().decode())


def serves(url: str) -> bool:
    try:
        return fetch(url) == "page\n"
    except OSError:
        return False


def test_node_and_pods_reach_each_other(cri: Cri) -> None:
    server = cri.run(*PAGE)
    url = f"http://{server.pod.ip}:8080/"
    wait_for("the page", lambda: serves(url))
    client = cri.run()
    assert client.shell(f"wget -q -O - {url}") == "page"
    assert client.pod.ip != server.pod.ip
    for container in (server, client):
        container.pod.remove()


def test_host_port(cri: Cri) -> None:
    tcp = free_port()
    mapping = pb.PortMapping(protocol=pb.TCP, container_port=8080, host_port=tcp)
    unmapped = pb.PortMapping(protocol=pb.TCP, container_port=9090, host_port=0)
    pod = cri.pod(port_mappings=[mapping, unmapped])
    pod.run(*PAGE)
    wait_for("the page on the host port", lambda: serves(f"http://127.0.0.1:{tcp}/"))
    refused(grpc.StatusCode.ALREADY_EXISTS, str(tcp), lambda: cri.pod(port_mappings=[mapping]))
    pod.remove()
    assert not serves(f"http://127.0.0.1:{tcp}/")
    again = cri.pod(port_mappings=[mapping])
    again.remove()


def test_host_network(cri: Cri) -> None:
    pod = cri.pod(linux=pod_options(network=pb.NODE))
    assert not pod.ip
    container = pod.run()
    assert container.shell("hostname") == socket.gethostname()
    assert "lo" in container.shell("ls /sys/class/net")
    pod.remove()


def test_resolv_conf_hosts_and_hostname(cri: Cri) -> None:
    dns = pb.DNSConfig(
        servers=["192.0.2.53"], searches=["a.example", "b.example"], options=["ndots:3"]
    )
    pod = cri.pod(dns_config=dns)
    container = pod.run()
    assert container.shell("cat /etc/resolv.conf").splitlines() == [
        "search a.example b.example",
        "nameserver 192.0.2.53",
        "options ndots:3",
    ]
    assert container.shell("cat /etc/hostname") == pod.config.hostname
    assert f"{pod.ip}\t{pod.config.hostname}" in container.shell("cat /etc/hosts")
    pod.remove()


def test_a_full_name_with_a_dot_at_its_end(cri: Cri) -> None:
    """The kubelet sends such a name for setHostnameAsFQDN; it is as long as sethostname(2) accepts."""
    name = "web-0." + "x" * 53 + ".svc."
    assert len(name) == 64
    pod = cri.pod(hostname=name)
    container = pod.run()
    assert container.shell("hostname; cat /etc/hostname; echo $HOSTNAME").split() == [name] * 3
    assert f"{pod.ip}\t{name}\t{name[:-1]}" in container.shell("cat /etc/hosts")
    pod.remove()


def test_sysctls(cri: Cri) -> None:
    pod = cri.pod(linux=pb.LinuxPodSandboxConfig(sysctls={"net.ipv4.ip_forward": "1"}))
    container = pod.run()
    assert container.shell("cat /proc/sys/net/ipv4/ip_forward") == "1"
    assert container.shell("cat /proc/sys/net/ipv4/ip_unprivileged_port_start") == "0"
    pod.remove()


def test_a_sysctl_that_a_pod_can_only_read(cri: Cri) -> None:
    name = "net.ipv4.tcp_available_congestion_control"
    linux = pb.LinuxPodSandboxConfig(sysctls={name: "reno"})
    text = f'sysctl "{name}": the kernel lets no pod write it'
    refused(grpc.StatusCode.UNIMPLEMENTED, text, lambda: cri.pod(linux=linux))


@pytest.mark.parametrize("name", ["kernel.core_pattern", "net.ipv4/../../kernel.core_pattern"])
def test_sysctls_of_the_node_are_refused(cri: Cri, name: str) -> None:
    with open("/proc/sys/kernel/core_pattern") as file:
        before = file.read()
    linux = pb.LinuxPodSandboxConfig(sysctls={name: "|/bin/evil"})
    refused(grpc.StatusCode.INVALID_ARGUMENT, "sysctl", lambda: cri.pod(linux=linux))
    with open("/proc/sys/kernel/core_pattern") as file:
        assert file.read() == before


def test_every_pod_is_of_the_pod_cidr(own_cri: Cri) -> None:
    """Also those that were prepared before it was told."""
    agent = own_cri.agent
    metrics = f"http://{agent.metrics}/metrics"
    wait_for("a warm slot", lambda: "nodeagent_warm_slots 0.0" not in fetch(metrics))
    config = pb.RuntimeConfig(network_config=pb.NetworkConfig(pod_cidr="10.233.77.0/24"))
    agent.runtime.UpdateRuntimeConfig(pb.UpdateRuntimeConfigRequest(runtime_config=config))
    for _ in range(6):
        assert own_cri.pod().ip.startswith("10.233.77.")


def test_pod_gives_its_address_back(cri: Cri) -> None:
    pods: list[Pod] = [cri.pod() for _ in range(3)]
    assert len({pod.ip for pod in pods}) == 3
    for pod in pods:
        pod.remove()
