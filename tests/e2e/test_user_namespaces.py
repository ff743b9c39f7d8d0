"""Pods whose ids are not the node's."""

import os
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.support.cri import Cri, Pod, options, pod_options, refused
from tests.support.node import wait_for

FIRST, LENGTH = 200_000, 65_536
MAP = [pb.IDMapping(host_id=FIRST, container_id=0, length=LENGTH)]
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def user_namespace(
    uids: list[pb.IDMapping] = MAP, gids: list[pb.IDMapping] = MAP
) -> pb.UserNamespace:
    return pb.UserNamespace(mode=pb.POD, uids=uids, gids=gids)


def mapped_pod(cri: Cri, sysctls: dict[str, str] | None = None, **fields: Any) -> Pod:
    fields.setdefault("pid", pb.CONTAINER)
    linux = pod_options(userns_options=user_namespace(), **fields)
    linux.sysctls.update(sysctls or {})
    return cri.pod(linux=linux)


def mapped_mount(source: Path | str, target: str, **fields: Any) -> pb.Mount:
    return pb.Mount(
        host_path=str(source), container_path=target, uidMappings=MAP, gidMappings=MAP, **fields
    )


def test_ids_inside_and_on_the_node(cri: Cri) -> None:
    as_app = options(run_as_user=pb.Int64Value(value=1000))
    made = mapped_pod(cri).run("sh", "-c", "cat /proc/self/uid_map; exec sleep 1000", linux=as_app)
    assert made.shell("cat /proc/self/uid_map /proc/self/gid_map").split() == (
        ["0", str(FIRST), str(LENGTH)] * 2
    )
    assert made.shell("id -u") == "1000"
    procs = [
        path
        for path in Path("/proc").glob("[0-9]*")
        if (path / "status").exists() and f"Uid:\t{FIRST + 1000}\t" in _read(path / "status")
    ]
    assert [path for path in procs if "sleep" in _read(path / "comm")]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def test_files_belong_to_the_ids_inside(cri: Cri) -> None:
    made = mapped_pod(cri).run()
    paths = "/ /bin/sh /etc/hosts /etc/hostname /etc/resolv.conf /dev/shm /dev/null"
    assert set(made.shell(f"stat -c %u:%g {paths}").split()) == {"0:0"}
    assert made.shell("touch /new /dev/shm/new && stat -c %u:%g /new /dev/shm/new") == "0:0\n0:0"


@pytest.mark.parametrize("readonly", [False, True])
def test_a_mapped_volume(cri: Cri, tmp_path: Path, readonly: bool) -> None:
    (tmp_path / "file").touch()
    os.chown(tmp_path, 1000, 1000)
    mount = mapped_mount(tmp_path, "/v", readonly=readonly)
    made = mapped_pod(cri).run(mounts=[mount])
    assert made.shell("stat -c %u:%g /v /v/file") == "1000:1000\n0:0"
    written = made.exec("sh", "-c", "touch /v/new").exit_code == 0
    assert written is not readonly
    assert not written or (tmp_path / "new").stat().st_uid == 0


def test_a_volume_without_mapping_keeps_the_node_s_ids(cri: Cri, tmp_path: Path) -> None:
    os.chown(tmp_path, FIRST + 7, 0)
    made = mapped_pod(cri).run(mounts=[pb.Mount(host_path=str(tmp_path), container_path="/v")])
    assert made.shell("stat -c %u:%g /v") == "7:65534"
    assert made.exec("touch", "/v/new").exit_code != 0


def test_a_file_system_that_cannot_be_mapped_is_named(cri: Cri) -> None:
    pod = mapped_pod(cri)
    refused(
        grpc.StatusCode.UNIMPLEMENTED,
        'host path "/proc/sys" for /v: proc',
        lambda: pod.container(mounts=[mapped_mount("/proc/sys", "/v")]),
    )


def test_namespaces_are_the_pod_s(cri: Cri) -> None:
    """Whoever has rights in the namespaces of the pod has none on the node."""
    rights = options(capabilities=pb.Capability(add_capabilities=["SYS_ADMIN", "NET_ADMIN"]))
    made = mapped_pod(cri).run(linux=rights)
    assert made.exec("hostname", "changed").exit_code == 0
    assert made.exec("ip", "link", "set", "lo", "down").exit_code == 0
    assert made.exec("mknod", "/tmp/disk", "b", "8", "0").exit_code != 0
    assert made.exec("sh", "-c", "echo 1 > /proc/sys/kernel/panic").exit_code != 0


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [(None, "0 65535"), ("0 2147483647", "0 65535"), ("1000\t1001", "1000 1001")],
)
def test_groups_that_may_ping_are_the_pod_s(cri: Cri, asked: str | None, wanted: str) -> None:
    """The supervisor writes the range from the node's user namespace, whose groups have other numbers."""
    sysctls = {"net.ipv4.ping_group_range": asked} if asked else {}
    made = mapped_pod(cri, sysctls=sysctls).run()
    found = made.shell("cat /proc/sys/net/ipv4/ping_group_range")
    assert found.split() == wanted.split()


def test_sysctls(cri: Cri) -> None:
    """One of each kind of namespace can be set: who may write a file of procfs is asked in another way for each."""
    wanted = {
        "kernel.shm_rmid_forced": "1",
        "fs.mqueue.msg_max": "11",
        "net.ipv4.ip_forward": "1",
        "kernel.domainname": "here",
    }
    made = mapped_pod(cri, sysctls=wanted).run()
    files = " ".join(f"/proc/sys/{name.replace('.', '/')}" for name in wanted)
    assert made.shell(f"cat {files}").split() == list(wanted.values())
    assert made.shell("cat /proc/sys/net/ipv4/ip_unprivileged_port_start") == "0"


def test_a_network_like_any_other_pod_s(cri: Cri) -> None:
    pod = mapped_pod(cri)
    assert pod.ip in pod.run().shell("ip -4 addr show eth0")


def test_on_the_network_of_the_node(cri: Cri) -> None:
    made = mapped_pod(cri, network=pb.NODE).run()
    assert made.shell("cat /proc/self/uid_map").split()[1] == str(FIRST)
    assert made.shell("readlink /proc/self/ns/net") == os.readlink("/proc/self/ns/net")
    assert made.shell("ls -d /sys/class/net/lo") == "/sys/class/net/lo"
    assert made.exec("touch", "/sys/kernel/new").exit_code != 0
    assert made.exec("ip", "link", "set", "lo", "mtu", "65000").exit_code != 0


def test_a_shared_pid_namespace(cri: Cri) -> None:
    pod = mapped_pod(cri, pid=pb.POD)
    pod.run(name="one")
    two = pod.run("sleep", "1234", name="two")
    assert "sleep 1234" in two.shell("ps")
    assert two.shell("kill $(pidof sleep | tr ' ' '\\n' | sort -n | head -1); echo $?") == "0"
    assert two.exec("kill", "-9", "1").exit_code in (0, 1)
    assert two.shell("echo alive") == "alive"


def test_a_privileged_container_has_no_right_to_the_node_s_devices(cri: Cri) -> None:
    linux = pod_options(pid=pb.CONTAINER, userns_options=user_namespace())
    linux.security_context.privileged = True
    made = cri.pod(linux=linux).run(linux=options(privileged=True))
    nodes = [
        path
        for path in ("/dev/mem", "/dev/kmsg", "/dev/vda", "/dev/sda", "/dev/loop-control")
        if os.path.exists(path)
    ]
    for path in nodes:
        assert made.exec("dd", f"if={path}", "of=/dev/null", "count=1", "bs=1").exit_code != 0, path
    assert made.exec("sh", "-c", "echo h > /proc/sysrq-trigger").exit_code != 0


def test_mode_node_is_the_node_s(cri: Cri) -> None:
    linux = pod_options(userns_options=pb.UserNamespace(mode=pb.NODE))
    made = cri.pod(linux=linux).run()
    assert made.shell("readlink /proc/self/ns/user") == os.readlink("/proc/self/ns/user")


@pytest.mark.parametrize(
    ("uids", "text"),
    [
        ([], "has 0 mappings"),
        ([*MAP, pb.IDMapping(host_id=1, container_id=70_000, length=1)], "has 2 mappings"),
        ([pb.IDMapping(host_id=FIRST, container_id=1, length=LENGTH)], "must be 0"),
        ([pb.IDMapping(host_id=FIRST, container_id=0, length=0)], "length"),
        ([pb.IDMapping(host_id=2**32 - 5, container_id=0, length=10)], "length"),
    ],
)
def test_refused_maps(cri: Cri, uids: list[pb.IDMapping], text: str) -> None:
    linux = pod_options(userns_options=user_namespace(uids=uids))
    refused(INVALID, text, lambda: cri.pod(linux=linux))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"run_as_user": pb.Int64Value(value=70_000)}, "uid 70000: not mapped"),
        ({"run_as_group": pb.Int64Value(value=70_000)}, "gid 70000: not mapped"),
        ({"supplemental_groups": [5, 70_000]}, "gid 70000: not mapped"),
    ],
    ids=["user", "group", "supplemental"],
)
def test_an_id_that_is_not_mapped(cri: Cri, fields: dict[str, Any], text: str) -> None:
    """A supplemental group is such as an fsGroup."""
    pod = mapped_pod(cri)
    linux = options(**{"run_as_user": pb.Int64Value(value=1), **fields})
    refused(INVALID, text, lambda: pod.container(linux=linux))
    pod.remove()


def test_a_container_may_not_have_another(cri: Cri) -> None:
    pod = mapped_pod(cri)
    other = [pb.IDMapping(host_id=FIRST + LENGTH, container_id=0, length=LENGTH)]
    space = pb.NamespaceOption(pid=pb.CONTAINER, userns_options=user_namespace(uids=other))
    refused(INVALID, "differs", lambda: pod.container(linux=options(namespace_options=space)))


def test_status_says_so(cri: Cri) -> None:
    status = cri.agent.runtime.Status(pb.StatusRequest(), timeout=60)
    assert all(handler.features.user_namespaces for handler in status.runtime_handlers)
    assert status.features.user_namespaces_host_network


def test_it_outlives_its_supervisor(own_cri: Cri) -> None:
    """What a successor starts is in the same user namespace."""
    pod = mapped_pod(own_cri)
    made = pod.run()
    before = made.shell("readlink /proc/self/ns/user")
    lost = pod.supervisor
    os.kill(lost, signal.SIGKILL)
    wait_for("a successor", lambda: pod.supervisor not in (0, lost))
    assert made.shell("readlink /proc/self/ns/user") == before
    assert pod.run(name="later").shell("readlink /proc/self/ns/user") == before
