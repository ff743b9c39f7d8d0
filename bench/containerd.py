"""containerd and runc with the CNI bridge, for comparison: started on the side, and gone without a trace.

    python -m bench.containerd      runs it until it is interrupted, and prints the address of its socket

It lives in mount, network and PID namespaces of its own, so everything but its cgroups goes with its first process.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support import images
from tests.support.registry import Registry, registry_command, running_registry

PROGRAMS = Path(__file__).parent.parent / ".tools/peer"
START_SECONDS = 30.0
STOP_SECONDS = 10.0
CGROUP = "k8s.io"  # where containerd puts containers that name no parent

CONFIG = """version = 3
root = "{root}/lib"
state = "{root}/run"
[grpc]
address = "{root}/cri.sock"
[plugins."io.containerd.internal.v1.opt"]
path = "{root}/opt"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{registry}/pause:3.10"
[plugins."io.containerd.cri.v1.runtime"]
# Root may lack CAP_SYS_RESOURCE, which lowering an oom_score_adj takes.
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "{programs}/runc"
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{programs}"]
conf_dir = "{root}/cni"
"""

NETWORK = {
    "cniVersion": "1.0.0",
    "name": "peer",
    "plugins": [
        {
            "type": "bridge",
            "bridge": "peer0",
            "isGateway": True,
            "ipMasq": True,
            "ipMasqBackend": "nftables",
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": "10.97.0.0/16"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        },
        {"type": "portmap", "backend": "nftables", "capabilities": {"portMappings": True}},
    ],
}

# The registry's storage is served again at the same address, which in these namespaces is still free.
SCRIPT = """
mount -t tmpfs none /run && mount -t tmpfs none /var/lib && ip link set lo up || exit
{registry} >{root}/registry.log 2>&1 &
{programs}/containerd --config {root}/config.toml >{root}/containerd.log 2>&1
:
"""


@contextmanager
def running_containerd(root: Path, registry: Registry) -> Iterator[str]:
    """The address of its CRI socket. What it pulls must be in `registry`; its pause image is pushed there."""
    registry.push(images.pause())
    before = _cgroups()
    process = _start(root, registry)
    try:
        _wait_for_socket(process, root)
        yield f"unix://{root}/cri.sock"
    finally:
        process.kill()
        process.wait()
        for cgroup in _cgroups() - before:
            _remove_cgroup(cgroup)


def _start(root: Path, registry: Registry) -> subprocess.Popen[bytes]:
    (root / "cni").mkdir(parents=True)
    (root / "cni/peer.conflist").write_text(json.dumps(NETWORK))
    text = CONFIG.format(root=root, registry=registry.host, programs=PROGRAMS)
    (root / "config.toml").write_text(text)
    command = shlex.join(registry_command(root, registry.host, registry.storage))
    script = SCRIPT.format(root=root, registry=command, programs=PROGRAMS)
    namespaces = "unshare --mount --net --pid --fork --kill-child --mount-proc".split()
    path = f"{PROGRAMS}:{os.environ['PATH']}"  # containerd looks for its shim there
    return subprocess.Popen([*namespaces, "sh", "-c", script], env={**os.environ, "PATH": path})


def _wait_for_socket(process: subprocess.Popen[bytes], root: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not (root / "cri.sock").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            log = root / "containerd.log"
            tail = log.read_text()[-2000:] if log.exists() else ""
            raise RuntimeError(f"containerd did not start:\n{tail}")
        time.sleep(0.05)


def _cgroups() -> set[Path]:
    roots = (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir())
    return {root / CGROUP for root in roots if (root / CGROUP).is_dir()}


def _remove_cgroup(cgroup: Path) -> None:
    """Bottom up, as soon as the last killed process has left."""
    deadline = time.monotonic() + STOP_SECONDS
    while cgroup.exists() and time.monotonic() < deadline:
        for folder, _, _ in os.walk(cgroup, topdown=False):
            with suppress(OSError):
                os.rmdir(folder)
        time.sleep(0.02)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="na-peer-") as folder:
        root = Path(folder)
        with running_registry(root / "registry") as registry:
            registry.push(images.busybox())
            with (
                running_containerd(root / "peer", registry) as address,
                suppress(KeyboardInterrupt),
            ):
                print(f"{address} (an image to run: {registry.host}/library/busybox)", flush=True)
                signal.pause()


if __name__ == "__main__":
    main()
