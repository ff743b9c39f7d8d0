"""A node for the charts: an agent on a machine that is its own as far as a pod can see.

It has the machine's files below a copy-on-write layer, and namespaces of its own for mounts, processes, network and
name, so that requests name the paths that a kubelet names (/var/lib/kubelet, /etc/cni, /run, /sys/fs/bpf), a pod on the
node's network takes the ports that it takes, and process 1 may be entered. All its mounts are shared, as systemd makes
them. Only cgroups are the machine's, and what devices lead to. Where the machine's systemd manages the cgroups, it does
so for this node as well, and can be seen there: the agent's driver is systemd.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.images import PAUSE, PROJECT, compiled
from tests.support.node import RunningAgent

NAME = "node-1"

# What is there on the node of a cluster before its first pod; the rest of what charts name is absent.
DIRECTORIES = (
    "/etc/cni/net.d",
    "/opt/cni/bin",
    "/run/netns",
    "/var/lib/kubelet/device-plugins",
    "/var/lib/kubelet/plugins",
    "/var/lib/kubelet/plugins_registry",
    "/var/lib/kubelet/pods",
    "/var/log/pods",
)

# Arguments: a directory of the test's own, that of the project, and the name of the node.
SET_UP = f"""set -e
top=$1 project=$2 root=$1/node/root
mount -t tmpfs node "$top/node"
mkdir "$top/node/upper" "$top/node/work" "$root"
mount -t overlay node "$root" -o "lowerdir=/,upperdir=$top/node/upper,workdir=$top/node/work"
mount -t tmpfs -o mode=755 run "$root/run"
if [ -d /run/systemd/system ]; then
	mkdir "$root/run/systemd"
	mount --bind /run/systemd "$root/run/systemd"
fi
mount -t tmpfs -o mode=755 dev "$root/dev"
cp -ax /dev/. "$root/dev/"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
mount -t tmpfs shm "$root/dev/shm"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
if [ -e /sys/fs/selinux/enforce ]; then
	mount --bind /sys/fs/selinux "$root/sys/fs/selinux"
fi
if [ -d /sys/fs/bpf ]; then
	mount --rbind /sys/fs/cgroup "$root/sys/fs/cgroup"
else # a kernel without BPF has no place for its file system
	mount -t tmpfs fs "$root/sys/fs"
	mkdir "$root/sys/fs/bpf" "$root/sys/fs/cgroup"
	mount --rbind /sys/fs/cgroup "$root/sys/fs/cgroup"
fi
mkdir -p "$root/var/lib/kubelet"
for path in "$top" "$project"; do
	mkdir -p "$root$path"
	mount --bind "$path" "$root$path"
done
mount -t tmpfs kubelet "$root/var/lib/kubelet" # which can be seen through the ids of a pod
hostname "$3"
ip link set lo up
cd "$root"
mkdir -p .machine {" ".join(name[1:] for name in DIRECTORIES)}
ln -sfn /run var/run
mkdir -p "lib/modules/$(uname -r)"
echo 0123456789abcdef0123456789abcdef > etc/machine-id.new
mv etc/machine-id.new etc/machine-id
pivot_root . .machine
umount -l /.machine
mount --make-rshared /
cd /
echo ready
exec "$top/init"
"""


class Node(RunningAgent):
    """`root` is on a file system of the machine's, where layers may be."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        (root / "node").mkdir()
        init = root / "init"
        init.write_bytes(compiled(PAUSE))
        init.chmod(0o755)
        namespaces = "--mount --propagation private --pid --net --uts --fork --kill-child=KILL"
        self._machine = subprocess.Popen(
            ["unshare", *namespaces.split(), "sh", "-c", SET_UP, "sh", root, PROJECT, NAME],
            stdout=subprocess.PIPE,
        )
        assert self._machine.stdout is not None
        said = self._machine.stdout.readline()
        assert said == b"ready\n", f"the node could not be made: {said!r}"
        self.first = _child(self._machine.pid)

    def shut_down(self) -> None:
        """End every process of the node, and with them its mounts."""
        self._machine.kill()
        self._machine.wait()
        assert self._machine.stdout is not None
        self._machine.stdout.close()

    @property
    def pid(self) -> int:
        """The agent's pid on the machine."""
        return _child(super().pid)

    def command(self, verb: str, *arguments: str) -> list[str]:
        return self._on_node(*super().command(verb, *arguments))

    def load(self, archive: Path) -> None:
        """Images, before the agent runs."""
        command = self.command("image load", str(archive))
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def run(self, *command: str, stdin: str = "") -> str:
        """What a command prints on the node; it must succeed."""
        done = subprocess.run(
            self._on_node(*command), input=stdin, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.returncode, done.stdout, done.stderr)
        return done.stdout

    def shell(self, script: str) -> str:
        """What a shell on the node prints; it must succeed."""
        return self.run("sh", "-e", stdin=script).strip()

    def read(self, path: str) -> str:
        """The content of a file of the node, which no link leads to."""
        return Path(f"/proc/{self.first}/root{path}").read_text()

    def mounts(self) -> list[str]:
        """Mount points, roots and file systems of the node, but for what the agent has in its own directories."""
        table = (
            line.split() for line in Path(f"/proc/{self.first}/mountinfo").read_text().splitlines()
        )
        return sorted(
            f"{line[4]} {line[3]} {line[line.index('-') + 1]}"
            for line in table
            if not line[4].startswith(f"{self.root}/")
        )

    @property
    def capabilities(self) -> str:
        """Those that the agent has, as /proc writes them."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return status.partition("CapEff:")[2].split()[0]

    def namespace(self, kind: str) -> str:
        return str(Path(f"/proc/{self.first}/ns/{kind}").readlink())

    def _on_node(self, *command: str) -> list[str]:
        namespaces = "--mount --pid --net --uts --wd=/"
        return ["nsenter", f"--target={self.first}", *namespaces.split(), "--", *command]


def _child(pid: int) -> int:
    """The only child of a process."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)
