"""hosts, hostname and resolv.conf."""

import os
import stat
from pathlib import Path

from nodeagent.lifecycle.plan import etc_files
from nodeagent.requests import DNS, SandboxConfig
from nodeagent.sandbox import paths


def test_everybody_reads_them_whatever_the_umask(tmp_path: Path) -> None:
    config = SandboxConfig(name="n", uid="u", namespace="ns", hostname="pod")
    old = os.umask(0o077)
    try:
        etc_files.write(tmp_path, config, ("192.0.2.1",))
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"hosts": 0o644, "hostname": 0o644, "resolv.conf": 0o644}
    assert (tmp_path / "hostname").read_text() == "pod\n"


def test_a_file_of_the_node_may_have_bytes_of_any_kind(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"192.0.2.1 caf\xe9\n")
    assert etc_files.node_file(str(tmp_path / "hosts"), "") == b"192.0.2.1 caf\xe9\n"
    assert etc_files.node_file(str(tmp_path / "absent"), "fallback") == b"fallback"


def test_where_they_are(tmp_path: Path) -> None:
    """An earlier version, whose pods may still run, had them in the pod's directory itself."""
    assert paths.shared(str(tmp_path)) == str(tmp_path)
    (tmp_path / "shared").mkdir()
    assert paths.shared(str(tmp_path)) == str(tmp_path / "shared")


def test_resolv_conf() -> None:
    dns = DNS(servers=("192.0.2.1", "192.0.2.2"), searches=("a", "b"), options=("ndots:3",))
    assert etc_files.resolv_conf(dns) == (
        "search a b\nnameserver 192.0.2.1\nnameserver 192.0.2.2\noptions ndots:3\n"
    )


def test_the_node_s_resolv_conf_without_dns() -> None:
    assert etc_files.resolv_conf(None) == etc_files.resolv_conf(DNS()) == ""


def test_hosts_has_every_address() -> None:
    text = etc_files.hosts("pod", ("10.1.2.3", "fd00::3"))
    assert text.endswith("10.1.2.3\tpod\nfd00::3\tpod\n")
    assert text.startswith("127.0.0.1\tlocalhost\n")


def test_a_full_name_is_found_with_and_without_its_dot() -> None:
    """What the kubelet sends for setHostnameAsFQDN where it has no cluster domain."""
    name = "web-0.sub.ns.svc."
    assert etc_files.hosts(name, ("10.1.2.3",)).endswith(
        "10.1.2.3\tweb-0.sub.ns.svc.\tweb-0.sub.ns.svc\n"
    )
    assert etc_files.hosts(".", ("10.1.2.3",)).endswith("10.1.2.3\t.\n")
