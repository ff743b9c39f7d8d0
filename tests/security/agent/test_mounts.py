"""Images and volumes whose links, pipes and races lead mounts, masks, consoles and writes elsewhere."""

import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.security.agent.conftest import PullHostile, attempted
from tests.support import tars
from tests.support.cri import SLEEP, Container, Cri, options, refused

UP = "../" * 12
VICTIMS = 16

SWAP = """
mkdir /v/target
ln -s {link} /v/link
echo up
while :; do
    mv /v/target /v/aside; mv /v/link /v/target
    mv /v/target /v/link; mv /v/aside /v/target
done
"""


def at(path: Path | str, target: str) -> pb.Mount:
    return pb.Mount(host_path=str(path), container_path=target)


def host_pid(container: Container) -> int:
    request = pb.ContainerStatusRequest(container_id=container.id, verbose=True)
    answer = container.pod.cri.agent.runtime.ContainerStatus(request, timeout=60)
    return int(json.loads(answer.info["info"])["pid"])


# ---- where mounts land ----


@pytest.mark.parametrize("climb", ["/", UP], ids=["absolute", "relative"])
def test_cve_2021_30465_a_volume_swaps_links_while_others_start(
    cri: Cri, volume: Path, outside: Path, climb: str
) -> None:
    pod = cri.pod()
    script = SWAP.format(link=f"{climb}{outside}".replace("//", "/"))
    attacker = pod.run("sh", "-c", script, name="attacker", mounts=[at(volume, "/v")])
    attacker.said("up")
    look = f"cat {outside}/precious /v/target/precious /v/link/precious; ls -d {outside}/new"

    def start(number: int) -> None:
        victim = pod.container(
            "sh",
            "-c",
            look,
            name=f"victim-{number}",
            mounts=[at(volume, "/v"), at("/dev/null", "/v/target/new")],
        )
        victim.start()
        victim.ended()
        assert "precious" not in victim.output.splitlines()

    with ThreadPoolExecutor(4) as pool:
        refusals = list(pool.map(lambda n: attempted(lambda: start(n)), range(VICTIMS)))
    assert "" in refusals
    pod.remove()


@pytest.mark.parametrize("name", ["proc", "sys"])
def test_cve_2019_19921_a_link_in_the_place_of_procfs(
    cri: Cri, hostile: PullHostile, volume: Path, name: str
) -> None:
    pod = cri.pod()
    image = hostile(tars.symlink(name, "/v"))
    refusal = attempted(lambda: pod.container(image=image, mounts=[at(volume, "/v")]))
    assert f"on /{name}" in refusal
    assert os.listdir(volume) == []
    pod.remove()


@pytest.mark.parametrize("target", ["/link/made/deep", "/link", "/v/link/made", "/loop/x"])
def test_cve_2024_45310_nothing_is_made_outside(
    cri: Cri, hostile: PullHostile, volume: Path, outside: Path, target: str
) -> None:
    (volume / "link").symlink_to(f"{UP}{outside}")
    image = hostile(tars.symlink("link", f"{UP}{outside}"), tars.symlink("loop", "loop"))
    pod = cri.pod()
    refusal = attempted(
        lambda: pod.run(
            image=image, mounts=[at(volume, "/v"), at("/dev/shm", target)], working_dir=target
        ).shell("pwd")
    )
    assert ("symbolic links" in refusal) is ("loop" in target)
    pod.remove()


# ---- masks, consoles, and writes to procfs ----


def test_cve_2025_31133_a_null_device_that_is_a_link(
    cri: Cri, hostile: PullHostile, volume: Path, outside: Path
) -> None:
    """What masks a path is never taken from the container; standard input is only a true null device."""
    (volume / "null").symlink_to("/precious")
    fields: dict[str, Any] = {
        "image": hostile(tars.symlink("dev/null", "/precious")),
        "linux": options(masked_paths=["/proc/keys"]),
        "mounts": [at(outside / "precious", "/precious"), at(volume, "/dev")],
    }
    pod = cri.pod()
    refusal = attempted(lambda: pod.container(**fields))
    assert "not the device that belongs there" in refusal
    script = "stat -c %t:%T /proc/keys; echo x > /proc/keys; echo done"
    container = pod.run("sh", "-c", script, name="reader", stdin=True, **fields)
    container.said("done")
    assert container.output.split() == ["1:3", "done"]
    pod.remove()


@pytest.mark.parametrize("target", ["/proc/sysrq-trigger", f"{UP}proc/sys/kernel/core_pattern"])
def test_cve_2025_52565_a_console_that_is_a_link(
    cri: Cri, hostile: PullHostile, target: str
) -> None:
    image = hostile(tars.symlink("dev/console", target), tars.symlink("dev/pts", "/proc"))
    container = cri.pod().run(*SLEEP, image=image, tty=True)
    assert container.shell("stat -c %t /dev/console; ls -d /dev/pts/0") == "88\n/dev/pts/0"
    container.pod.remove()


def test_cve_2025_52565_a_terminal_of_a_volume(cri: Cri, volume: Path) -> None:
    (volume / "pts").symlink_to("/proc")
    (volume / "console").symlink_to("/proc/sysrq-trigger")
    pod = cri.pod()
    call = partial(pod.container, mounts=[at(volume, "/dev")], tty=True)
    refused(grpc.StatusCode.FAILED_PRECONDITION, 'device "/dev/pts/ptmx"', call)
    pod.remove()


FAKES = (
    "oom_score_adj",
    "attr/exec",
    "attr/apparmor/exec",
    "attr/keycreate",
    "uid_map",
    "setgroups",
)


def test_cve_2025_52881_a_procfs_that_is_a_volume(cri: Cri, volume: Path) -> None:
    """Neither a container's first process nor an exec says to it what is meant for the kernel."""
    for name in ("self", "thread-self", "1"):
        for fake in FAKES:
            (volume / name / fake).parent.mkdir(parents=True, exist_ok=True)
            (volume / name / fake).touch()
    resources = pb.LinuxContainerResources(oom_score_adj=777)
    linux = pb.LinuxContainerConfig(resources=resources)
    linux.security_context.capabilities.add_capabilities.append("SYS_ADMIN")
    pod = cri.pod()
    for target in ("/proc", "/proc/self", "/proc/self/attr"):
        call = partial(pod.container, mounts=[at(volume, target)], linux=linux)
        refused(grpc.StatusCode.INVALID_ARGUMENT, f"on {target}: ", call)
    container = pod.run(
        "sh",
        "-c",
        "mount --bind /v /proc; echo covered; sleep 1000",
        name="covering",
        mounts=[at(volume, "/v")],
        linux=linux,
    )
    container.said("covered")
    assert container.exec("true").exit_code == 0
    assert Path(f"/proc/{host_pid(container)}/oom_score_adj").read_text() == "777\n"
    assert not any(path.read_bytes() for path in volume.rglob("*") if path.is_file())
    pod.remove()


@pytest.mark.parametrize("link", ["/v/d", f"{UP}v/d"])
def test_cve_2026_41579_dev_of_the_image_is_a_link(
    cri: Cri, hostile: PullHostile, volume: Path, link: str
) -> None:
    """No device of the node's root, which anybody may use, is made in a volume."""
    (volume / "d").mkdir()
    image = hostile(tars.symlink("dev", link))
    pod = cri.pod()
    linux = options(run_as_user=pb.Int64Value(value=65534))
    call = partial(pod.container, image=image, mounts=[at(volume, "/v")], linux=linux)
    refused(grpc.StatusCode.INVALID_ARGUMENT, "tmpfs on /dev: ", call)
    device = pb.Device(container_path="/v/d/null", host_path="/dev/null", permissions="rw")
    call = partial(pod.container, mounts=[at(volume, "/v")], devices=[device])
    refused(grpc.StatusCode.INVALID_ARGUMENT, "device /v/d/null: ", call)
    assert os.listdir(volume / "d") == []
    pod.remove()


# ---- the image's users ----

PASSWD = {
    "fifo": (tars.member("etc/passwd", tarfile.FIFOTYPE), "not a regular file"),
    "device": (tars.char("etc/passwd", 1, 5), "not a regular file"),
    "huge": (tars.file("etc/passwd", b"#" * (2 << 20)), "larger than"),
    "loop": (tars.symlink("etc/passwd", "passwd"), "symbolic links"),
    "of the node": (tars.symlink("etc/passwd", f"{UP}proc/1/root/etc/passwd"), "symbolic links"),
}


@pytest.mark.parametrize("kind", PASSWD)
def test_a_passwd_of_an_image(cri: Cri, hostile: PullHostile, kind: str) -> None:
    member, text = PASSWD[kind]
    image = hostile(member)
    pod = cri.pod()
    for user in ({"run_as_username": "daemon"}, {"run_as_user": pb.Int64Value(value=1)}):
        call = partial(pod.container, image=image, linux=options(**user))
        refused(grpc.StatusCode.INVALID_ARGUMENT, text, call)
    pod.remove()
