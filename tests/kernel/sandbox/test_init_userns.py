"""Containers whose ids are not the node's."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nodeagent.linux import capabilities, mounts, syscalls, userns
from nodeagent.sandbox import rootfs_defaults
from nodeagent.sandbox.spec import ContainerPlan, IdMap, Mount
from tests.kernel.sandbox.conftest import Plan
from tests.kernel.sandbox.containers import (
    exec_plan,
    process_plan,
    start,
    start_exec,
    user,
    v1_hierarchies,
)

FIRST, LENGTH = 300_000, 65_536
MAP: list[IdMap] = [{"inside": 0, "outside": FIRST, "length": LENGTH}]
MAPS = {"uid_map": MAP, "gid_map": MAP}
EXTENTS = [userns.Extent(0, FIRST, LENGTH)]
Pod = dict[int, int]

OWNED = syscalls.CLONE_NEWNET | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS


@pytest.fixture
def pod() -> Iterator[Pod]:
    """The namespaces of a pod."""
    made = userns.create(EXTENTS, EXTENTS, OWNED)
    yield made
    for descriptor in made.values():
        os.close(descriptor)


def mapped(plan: Plan, command: str | list[str], **changes: Any) -> ContainerPlan:
    process = {**MAPS, **changes.pop("process", {})}
    return plan(command, process=process, **changes)


def run(plan: ContainerPlan, pod: Pod) -> str:
    with start(plan, pod=pod) as process:
        assert process.ready
        assert process.go() == ""
        return process.output()


def with_mounts(*added: Mount) -> list[Mount]:
    return [*rootfs_defaults.default_mounts(False, v1_hierarchies()), *added]


def test_ids_inside_and_outside(plan: Plan, pod: Pod) -> None:
    made = mapped(
        plan,
        "x=$(cat /proc/self/uid_map); echo $(id -u) $x; exec sleep 100",
        process={"user": user(uid=1000)},
    )
    with start(made, pod=pod) as process:
        process.go()
        assert os.read(process.stdout, 200).split() == [b"1000", b"0", b"300000", b"65536"]
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert "Uid:\t301000\t301000\t301000\t301000" in status
        assert process.ready["identity"]["uid"] == 1000


def test_files_of_the_image_belong_to_its_users(plan: Plan, pod: Pod, layer: Path) -> None:
    output = run(
        mapped(plan, "stat -c %u:%g / /bin/busybox /etc/passwd /dev /dev/null /dev/pts/ptmx /proc"),
        pod,
    )
    assert output.split() == ["0:0"] * 6 + ["65534:65534"]
    assert (layer / "bin" / "busybox").stat().st_uid == 0


def test_what_the_container_writes_is_its_own(plan: Plan, pod: Pod, tmp_path: Path) -> None:
    script = "touch /new; mkdir -p /etc/d; chown 5:6 /etc/group; echo x >> /etc/passwd; stat -c %u:%g /new /etc/group"
    assert run(mapped(plan, script), pod).split() == ["0:0", "5:6"]
    upper = tmp_path / "container" / "upper"
    assert (upper / "new").stat().st_uid == FIRST
    assert (upper / "etc" / "group").stat().st_gid == FIRST + 6


def test_what_is_made_for_the_container_is_its_roots(plan: Plan, pod: Pod, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    made = mapped(
        plan,
        "stat -c %u:%g . /data /data/deep /dev/x",
        mounts=with_mounts(rootfs_defaults.bind(str(volume), "/data/deep", "ro")),
        devices=[rootfs_defaults.character_device("/dev/x", 1, 3)],
        process={"cwd": "/work/dir"},
    )
    assert run(made, pod).split() == ["0:0", "0:0", "65534:65534", "0:0"]


def test_an_idmapped_volume(plan: Plan, pod: Pod, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    os.chown(volume, 1000, 1000)
    mount = rootfs_defaults.bind(str(volume), "/v")
    mount["uid_map"] = mount["gid_map"] = MAP
    made = mapped(
        plan,
        "stat -c %u /v; touch /v/mine",
        mounts=with_mounts(mount),
        process={"user": user(uid=1000)},
    )
    assert run(made, pod) == "1000\n"
    assert (volume / "mine").stat().st_uid == 1000


def test_an_idmapped_volume_without_a_user_namespace(plan: Plan, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    mount = rootfs_defaults.bind(str(volume), "/v")
    mount["uid_map"] = mount["gid_map"] = [{"inside": 0, "outside": 5, "length": 10}]
    with start(plan("stat -c %u /v; touch /v/mine", mounts=with_mounts(mount))) as process:
        assert process.ready
        process.go()
        assert process.output().startswith("5\n")


def test_a_volume_that_cannot_be_mapped_is_named_with_its_file_system(plan: Plan, pod: Pod) -> None:
    mount = rootfs_defaults.bind("/proc/sys", "/v")
    mount["uid_map"] = mount["gid_map"] = MAP
    with start(mapped(plan, "true", mounts=with_mounts(mount)), pod=pod) as process:
        assert process.message["error"] == "Unsupported"
        assert 'host path "/proc/sys" for /v: proc' in process.message["text"]


def test_an_id_that_is_not_mapped_is_named(plan: Plan, pod: Pod) -> None:
    with start(mapped(plan, "true", process={"user": user(uid=70_000)}), pod=pod) as process:
        assert process.message == {
            "error": "InvalidArgument",
            "text": "uid 70000: not mapped in the user namespace of the pod",
        }


def test_image_volumes_are_mapped(plan: Plan, pod: Pod, tmp_path: Path) -> None:
    layers = []
    for number in range(2):
        path = tmp_path / "layers" / str(number)
        path.mkdir(parents=True)
        (path / f"file{number}").touch()
        layers.append(str(path))
    several: Mount = {**rootfs_defaults.bind("", "/several"), "kind": "image", "lower": layers}
    single: Mount = {**rootfs_defaults.bind("", "/single"), "kind": "image", "lower": layers[:1]}
    script = "stat -c %u:%g /several/file0 /several/file1 /single/file0"
    assert (
        run(mapped(plan, script, mounts=with_mounts(several, single)), pod).split() == ["0:0"] * 3
    )


def test_many_layers(plan: Plan, pod: Pod, layer: Path, tmp_path: Path) -> None:
    made = mapped(plan, "stat -c %u:%g /file-0 /file-39")
    for number in range(40):
        path = tmp_path / "layers" / str(number)
        path.mkdir(parents=True)
        (path / f"file-{number}").touch()
        made["rootfs"]["lower"].insert(0, str(path))
    assert run(made, pod).split() == ["0:0", "0:0"]


def test_namespaces_belong_to_it(plan: Plan, pod: Pod) -> None:
    """Root of the container may change what is the pod's, and nothing of the node's."""
    sets = dict.fromkeys(("bounding", "permitted", "effective"), capabilities.known())
    made = mapped(
        plan,
        """
        mount -t tmpfs none /tmp && echo mounted
        echo 1 > /proc/sys/net/ipv4/ip_forward && echo net
        echo 1 > /proc/sys/kernel/panic || echo kernel
        """,
        masked_paths=[],
        readonly_paths=[],
        process={"capabilities": {**sets, "inheritable": 0, "ambient": 0}},
    )
    output = run(made, pod)
    assert [line for line in output.splitlines() if ":" not in line] == ["mounted", "net", "kernel"]


def test_what_the_node_has_masked_stays_masked(plan: Plan, pod: Pod, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "secret").write_text("secret")
    sets = dict.fromkeys(("bounding", "permitted", "effective"), capabilities.known())
    made = mapped(
        plan,
        """
        umount /v/secret; umount -l /v/secret; cat /v/secret
        mount -o remount,bind,rw /v/secret && echo remounted
        mount -o remount,bind,rw /r && echo remounted
        umount -l /v; cat /v/secret; touch /r/x
        """,
        mounts=with_mounts(
            rootfs_defaults.bind(str(volume), "/v"), rootfs_defaults.bind(str(volume), "/r", "ro")
        ),
        masked_paths=["/v/secret"],
        process={"capabilities": {**sets, "inheritable": 0, "ambient": 0}},
    )
    output = run(made, pod)
    assert "secret\n" not in output.replace("/v/secret", "")
    assert "remounted" not in output
    assert os.listdir(volume) == ["secret"]


def test_a_terminal(plan: Plan, pod: Pod) -> None:
    made = mapped(
        plan,
        "tty; stat -c %u:%g /dev/pts/0; echo > /dev/tty && echo ok",
        tty=True,
        process={"user": user(uid=7)},
    )
    with start(made, pod=pod) as process:
        assert process.ready
        process.go()
        assert process.output().split() == ["/dev/pts/0", "7:5", "ok"]


def test_output_can_be_opened_again(plan: Plan, pod: Pod) -> None:
    made = mapped(plan, "echo again > /dev/stdout", process={"user": user(uid=7)})
    assert run(made, pod) == "again\n"


@pytest.mark.parametrize("tty", [False, True])
def test_execs(plan: Plan, pod: Pod, tty: bool) -> None:
    with start(mapped(plan, "exec sleep 100"), pod=pod) as container:
        container.go()
        settings = process_plan(**MAPS, user=user(uid=1000))
        script = [
            "/bin/sh",
            "-c",
            "id -u; cat /proc/self/uid_map; echo > /dev/stdout; touch /tmp/x && stat -c %u /tmp/x",
        ]
        found = pod[syscalls.CLONE_NEWUSER]
        with start_exec(container, exec_plan(script, tty=tty), settings, userns=found) as process:
            assert process.ready
            process.go()
            assert process.output().split() == ["1000", "0", "300000", "65536", "1000"]


def test_privileges_of_execs_end_at_the_namespace(plan: Plan, pod: Pod) -> None:
    everything = dict.fromkeys(("bounding", "permitted", "effective"), capabilities.known())
    with start(mapped(plan, "exec sleep 100"), pod=pod) as container:
        container.go()
        settings = process_plan(**MAPS, capabilities={**everything, "inheritable": 0, "ambient": 0})
        script = [
            "/bin/sh",
            "-c",
            "mknod /tmp/n b 8 0 && echo made; chown 0 /proc/sys && echo owned; true",
        ]
        found = pod[syscalls.CLONE_NEWUSER]
        with start_exec(container, exec_plan(script), settings, userns=found) as process:
            process.go()
            output = process.output()
            assert "made" not in output
            assert "owned" not in output


def test_a_new_namespace_leaves_no_process() -> None:
    before = children()
    made = userns.create(EXTENTS, EXTENTS)
    assert list(made) == [syscalls.CLONE_NEWUSER]
    os.close(made[syscalls.CLONE_NEWUSER])
    assert children() == before


def children() -> str:
    """Pids, those of zombies too."""
    return Path("/proc/thread-self/children").read_text()


@pytest.mark.parametrize(
    "extents", [[], [userns.Extent(0, 0, 0)], [userns.Extent(0, 1, 5), userns.Extent(3, 9, 5)]]
)
def test_maps_that_the_kernel_refuses(extents: list[userns.Extent]) -> None:
    with pytest.raises(OSError, match="map of ids"):
        userns.create(extents, EXTENTS)


def test_file_systems_are_named() -> None:
    proc = os.open("/proc", os.O_PATH)
    assert mounts.filesystem_of(proc) == "proc"
    os.close(proc)
