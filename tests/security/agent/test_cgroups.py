"""Attacks on cgroup v2 from inside a container: its limits, its device rules, the way out of its group.

Five attackers: a default container; one whose groups are its own to manage (cgroup_mount_mode); one with SYS_ADMIN,
which mounts cgroup2 for itself; a privileged one; and root of a user namespace, privileged as well. None has a seccomp
filter or an AppArmor profile.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cgroups.v2 import DESCENDANTS
from tests.e2e.test_user_namespaces import user_namespace
from tests.security.agent.conftest import PullHostile
from tests.support import images, tars
from tests.support.cri import Container, Cri, options

ROOT = Path("/sys/fs/cgroup")

pytestmark = pytest.mark.skipif(
    not (ROOT / "cgroup.controllers").exists(), reason="no machine with cgroup v2 alone"
)

# bpf detach DIRECTORY, bpf replace DIRECTORY: takes the device programs of a group away, or puts one that allows all
# in their place; says of how many.
BPF = r"""
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
static union bpf_attr a;
static int call(int command) { return syscall(SYS_bpf, command, &a, sizeof a); }
static void *fresh(void) { return memset(&a, 0, sizeof a); }
static int load(void)
{
	static struct bpf_insn yes[] = {{.code = 0xb7, .imm = 1}, {.code = 0x95}};
	fresh();
	a.prog_type = BPF_PROG_TYPE_CGROUP_DEVICE;
	a.insn_cnt = 2;
	a.insns = (__u64)yes;
	a.license = (__u64)"GPL";
	return call(BPF_PROG_LOAD);
}
int main(int argc, char **argv)
{
	__u32 ids[64], count;
	int program, group = open(argv[2], O_RDONLY | O_DIRECTORY);
	if (group < 0) { perror(argv[2]); return 1; }
	fresh();
	a.query.target_fd = group;
	a.query.attach_type = BPF_CGROUP_DEVICE;
	a.query.prog_ids = (__u64)ids;
	a.query.prog_cnt = 64;
	if (call(BPF_PROG_QUERY)) { perror("query"); return 1; }
	count = a.query.prog_cnt;
	for (__u32 i = 0; i < count; i++) {
		fresh();
		a.prog_id = ids[i];
		program = call(BPF_PROG_GET_FD_BY_ID);
		if (program < 0) { perror("get"); return 1; }
		fresh();
		a.target_fd = group;
		a.attach_type = BPF_CGROUP_DEVICE;
		if (!strcmp(argv[1], "detach")) {
			a.attach_bpf_fd = program;
			if (call(BPF_PROG_DETACH)) { perror("detach"); return 1; }
		} else {
			int other = load();
			if (other < 0) { perror("load"); return 1; }
			fresh();
			a.target_fd = group;
			a.attach_type = BPF_CGROUP_DEVICE;
			a.attach_bpf_fd = other;
			a.attach_flags = BPF_F_ALLOW_MULTI | BPF_F_REPLACE;
			a.replace_bpf_fd = program;
			if (call(BPF_PROG_ATTACH)) { perror("replace"); return 1; }
		}
	}
	printf("%s of %u\n", argv[1], count);
	return 0;
}
"""


KINDS = ["default", "delegated", "admin", "privileged", "userns"]
NO_PROFILE = pb.SecurityProfile(profile_type=pb.SecurityProfile.Unconfined)
LIMITS = pb.LinuxContainerResources(
    memory_limit_in_bytes=64 << 20, cpu_period=100_000, cpu_quota=50_000, unified={"pids.max": "50"}
)
IN_FORCE = {"memory.max": str(64 << 20), "cpu.max": "50000 100000", "pids.max": "50"}
# Where the attacker's own group can be written to, as far as he gets it.
MOUNTED = """
g=/sys/fs/cgroup; mkdir -p /mnt
[ -e /mnt/cgroup.procs ] || mount -t cgroup2 none /mnt 2> /dev/null
[ -e /mnt/cgroup.procs ] && g=/mnt"""


class Attacker:
    """A container of one of the kinds."""

    def __init__(self, cri: Cri, image: pb.ImageSpec, kind: str, *mounts: pb.Mount) -> None:
        self.kind = kind
        privileged = kind in ("privileged", "userns")
        space = pb.NamespaceOption(pid=pb.CONTAINER)
        if kind == "userns":
            space.userns_options.CopyFrom(user_namespace())
        context = pb.LinuxSandboxSecurityContext(privileged=privileged, namespace_options=space)
        self.pod = cri.pod(linux=pb.LinuxPodSandboxConfig(security_context=context))
        added = ["SYS_ADMIN", "BPF"] if kind == "admin" else []
        linux = options(
            privileged=privileged,
            namespace_options=space,
            apparmor=NO_PROFILE,
            capabilities=pb.Capability(add_capabilities=added),
            cgroup_mount_mode=pb.CGROUP_MOUNT_MODE_READ_WRITE if kind == "delegated" else None,
        )
        linux.resources.CopyFrom(LIMITS)
        self.container: Container = self.pod.run(image=image, linux=linux, mounts=mounts)

    def does(self, command: str) -> bool:
        """Whether it succeeds; $g is the attacker's own group."""
        return self.container.exec("sh", "-c", f"{MOUNTED}; {command}").exit_code == 0

    def group(self) -> Path:
        """Its group on the node."""
        (found,) = ROOT.glob(f"**/*{self.container.id}*/container")
        return found


@pytest.fixture
def image(hostile: PullHostile) -> pb.ImageSpec:
    return hostile(tars.file("bin/bpf", images.compiled(BPF), mode=0o755))


@pytest.fixture(params=KINDS)
def attacker(cri: Cri, image: pb.ImageSpec, request: pytest.FixtureRequest) -> Iterator[Attacker]:
    attacker = Attacker(cri, image, request.param)
    yield attacker
    attacker.pod.remove()


def test_limits_cannot_be_lifted(attacker: Attacker) -> None:
    """They belong to the node at the root of a cgroup namespace, where cgroup2 is mounted with nsdelegate."""
    for name, value in IN_FORCE.items():
        assert attacker.does(f"[ \"$(cat $g/{name})\" = '{value}' ]"), name
        assert not attacker.does(f"echo max > $g/{name}"), name
        assert (attacker.group() / name).read_text() == f"{value}\n"


def test_a_group_below_has_the_limits_of_the_one_above(attacker: Attacker) -> None:
    """Whoever may make groups moves into them, and nowhere else; a user namespace owns none."""
    made = attacker.does(
        "mkdir $g/x && echo 0 > $g/x/cgroup.procs && grep -q '^0::/x$' /proc/self/cgroup"
    )
    assert made == (attacker.kind in ("admin", "privileged", "delegated"))
    assert not attacker.does("echo +memory > $g/cgroup.subtree_control")
    assert attacker.container.id in attacker.group().parent.name


def test_the_node_s_groups_cannot_be_used_up(cri: Cri, image: pb.ImageSpec) -> None:
    """The limit is that of a group that the container does not see, so that it cannot be lifted from inside."""
    attacker = Attacker(cri, image, "admin")
    assert attacker.does("[ $(cat $g/cgroup.max.descendants) = max ]")
    pile = f"{MOUNTED}; cd $g; mkdir $(seq 1 {DESCENDANTS + 100}) 2>&1 | head -n 1"
    said = attacker.container.exec("sh", "-c", pile, timeout=100).stdout.decode()
    assert "Resource temporarily unavailable" in said
    group = attacker.group()
    assert len([path for path in group.iterdir() if path.is_dir()]) <= DESCENDANTS
    attacker.pod.remove()
    assert not group.parent.exists()


def test_nobody_gets_out_of_his_group(attacker: Attacker) -> None:
    """What is above is not there, neither in the mount nor in a cgroup namespace that is entered once more."""
    assert not attacker.does("[ -e $g/../cgroup.procs ]")
    assert not attacker.does(
        "nsenter --cgroup=/proc/self/ns/cgroup true && grep -q '^0::/[.][.]' /proc/self/cgroup"
    )
    assert attacker.does("! grep -v '^0::/exec-' /proc/self/cgroup")


def test_all_groups_of_the_node_as_a_volume(cri: Cri, image: pb.ImageSpec) -> None:
    """The pod's author gives them away; nsdelegate still keeps the processes and the limits where they are."""
    volume = pb.Mount(host_path=str(ROOT), container_path="/node")
    attacker = Attacker(cri, image, "default", volume)
    own = f"/node/{attacker.group().relative_to(ROOT)}"
    assert attacker.does(f"[ -w {own}/memory.max ]")
    for target in ("/node", f"{own}/../..", f"{own}/.."):
        assert not attacker.does(f"echo 0 > {target}/cgroup.procs"), target
    assert not attacker.does(f"echo max > {own}/memory.max")
    attacker.pod.remove()


# ---- devices ----

# /dev/kmsg: readable for who is root and whom the rules allow it.
KMSG = "[ -e /tmp/kmsg ] || mknod /tmp/kmsg c 1 11 && head -c 0 /tmp/kmsg"


def test_the_device_rules_cannot_be_taken_away(attacker: Attacker) -> None:
    """They are those of a group that no container sees, so that SYS_ADMIN and BPF find nothing to detach."""
    allowed = attacker.kind == "privileged"
    assert attacker.does(KMSG) == allowed
    for verb in ("detach", "replace"):
        attacker.does(f"/bin/bpf {verb} $g")
        attacker.does(f"/bin/bpf {verb} /sys/fs/cgroup")
        assert attacker.does(KMSG) == allowed, verb
    if attacker.kind in ("admin", "privileged"):
        assert attacker.container.shell("/bin/bpf detach /sys/fs/cgroup") == "detach of 0"


def test_a_group_of_his_own_has_the_same_device_rules(cri: Cri, image: pb.ImageSpec) -> None:
    attacker = Attacker(cri, image, "admin")
    move = "mkdir -p $g/y && echo 0 > $g/y/cgroup.procs"
    assert not attacker.does(f"{move} && {KMSG}")
    assert attacker.container.shell(f"{MOUNTED}; {move} && /bin/bpf replace $g/y") == "replace of 0"
    assert not attacker.does(f"{move} && {KMSG}")
    attacker.pod.remove()


# ---- what he leaves behind ----

PILES = {
    "many": "cd $g; mkdir $(seq 1 1000)",
    "deep": """
        name=$(printf '%0200d' 0); cd $g; i=0
        while [ $i -lt 40 ]; do mkdir $name && cd -P $name || exit; i=$((i + 1)); done
        sleep 1000 & echo $! > cgroup.procs""",
    "frozen": "mkdir $g/f; sleep 1000 & echo $! > $g/f/cgroup.procs; echo 1 > $g/f/cgroup.freeze",
}


@pytest.mark.parametrize("kind", ["admin", "delegated"])
@pytest.mark.parametrize("pile", PILES)
def test_groups_that_are_left_go_with_the_container(
    cri: Cri, image: pb.ImageSpec, pile: str, kind: str
) -> None:
    attacker = Attacker(cri, image, kind)
    attacker.container.shell(f"{MOUNTED}; {{ {PILES[pile]}; }} > /dev/null")
    outer = attacker.group().parent
    attacker.container.stop()
    attacker.container.remove()
    assert not outer.exists()
    attacker.pod.remove()
