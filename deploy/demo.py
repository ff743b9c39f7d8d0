"""The demo: an image without a registry, an agent under a temporary root, a pod of two containers, and no trace after.

Everything goes over the CRI socket, as the kubelet would do it. Needs root and a static busybox.
"""

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from nodeagent.api import runtime_pb2 as pb
from nodeagent.api import runtime_pb2_grpc as rpc

REPOSITORY = Path(__file__).resolve().parents[1]
IMAGE = "demo.local/busybox:1"
METRICS = "127.0.0.1:18910"
APPLETS = "sh cat echo sleep wget httpd nc hostname id ps mkdir".split()
SERVER = "mkdir /www; echo hello from the pod > /www/index.html; echo serving on 8080; exec httpd -f -p 8080 -h /www"
CLIENT = "sleep 0.2; wget -q -O - http://127.0.0.1:8080/; exec sleep 1000"
BUSYBOX = [
    REPOSITORY / ".cache/debian/busybox-static" / path
    for path in ("bin/busybox", "usr/bin/busybox")
]


def main() -> None:
    if os.geteuid() != 0:
        sys.exit("demo: needs root: it makes namespaces, mounts and cgroups")
    before = machine()
    with tempfile.TemporaryDirectory(prefix="na-demo-") as name:
        root = Path(name)
        with step("build an OCI image of the static busybox"):
            archive = build_image(root)
        with step("load it: nodeagent image load"):
            run("image load", root, archive)
        with agent(root) as channel:
            Demo(channel, root).run()
    with step("nothing is left: no process, mount, link, cgroup"):
        check_clean(before)


class Demo:
    """The steps between start and end of the agent."""

    def __init__(self, channel: grpc.Channel, root: Path) -> None:
        self.runtime = rpc.RuntimeServiceStub(channel)
        self.root = root
        self.logs = root / "logs"
        self.config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name="demo", uid="demo-uid", namespace="default"),
            hostname="demo",
            log_directory=str(self.logs),
            linux=pb.LinuxPodSandboxConfig(),
        )

    def run(self) -> None:
        with step("RunPodSandbox"):
            answer = self.runtime.RunPodSandbox(pb.RunPodSandboxRequest(config=self.config))
            self.pod = answer.pod_sandbox_id
        ip = self.runtime.PodSandboxStatus(
            pb.PodSandboxStatusRequest(pod_sandbox_id=self.pod)
        ).status.network.ip
        show(f"pod IP {ip}")
        self.server = self.start("server", SERVER)
        self.client = self.start("client", CLIENT)
        with step("the node reaches the pod over the bridge"):
            body = fetch(f"http://{ip}:8080/")
        show(body)
        for name in ("server", "client"):
            with step(f"log of {name}"):
                text = first_line(self.logs / f"{name}.log")
            show(text)
        self.exec()
        self.stats()
        self.metrics()
        self.hint()
        with step("StopPodSandbox, RemovePodSandbox"):
            self.runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=self.pod))
            self.runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=self.pod))

    def start(self, name: str, script: str) -> str:
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name),
            image=pb.ImageSpec(image=IMAGE),
            command=["/bin/sh", "-c", script],
            log_path=f"{name}.log",
            linux=pb.LinuxContainerConfig(
                resources=pb.LinuxContainerResources(
                    cpu_period=100_000, cpu_quota=50_000, memory_limit_in_bytes=32 << 20
                )
            ),
        )
        with step(f"CreateContainer {name} (0.5 CPU, 32 MiB)"):
            container_id = self.runtime.CreateContainer(
                pb.CreateContainerRequest(
                    pod_sandbox_id=self.pod, config=config, sandbox_config=self.config
                )
            ).container_id
        with step(f"StartContainer {name}"):
            self.runtime.StartContainer(pb.StartContainerRequest(container_id=container_id))
        return str(container_id)

    def exec(self) -> None:
        command = ["sh", "-c", "hostname; id; ps"]
        with step("ExecSync in client: hostname; id; ps"):
            answer = self.runtime.ExecSync(
                pb.ExecSyncRequest(container_id=self.client, cmd=command, timeout=5)
            )
        show(answer.stdout.decode())

    def stats(self) -> None:
        with step("PodSandboxStats"):
            stats = self.runtime.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=self.pod))
        for container in stats.stats.linux.containers:
            cpu = container.cpu.usage_core_nano_seconds.value / 1e6
            memory = container.memory.working_set_bytes.value / 1024
            show(f"{container.attributes.metadata.name}: {cpu:.1f} ms CPU, {memory:.0f} KiB")

    def metrics(self) -> None:
        with step("scrape /metrics"):
            lines = fetch(f"http://{METRICS}/metrics").splitlines()
        wanted = [line for line in lines if "memory" in line and 'pod="demo"' in line]
        show("\n".join(line.replace(self.pod, "…") for line in wanted[:4]))

    def hint(self) -> None:
        crictl = shutil.which("crictl") or REPOSITORY / ".tools/bin/crictl"
        if Path(crictl).exists():
            line = f"{crictl} -r unix://{self.root}/cri.sock"
            show(f"the same by hand, while an agent runs:\n{line} pods\n{line} ps\n{line} stats")


# --- the agent ---


@contextmanager
def agent(root: Path) -> Iterator[grpc.Channel]:
    """`nodeagent serve` under a root of its own, ended by SIGTERM."""
    socket = f"unix://{root}/cri.sock"
    with step("start the agent: nodeagent serve"):
        log = (root / "agent.log").open("wb")
        arguments = command("serve", root, "--listen", socket, "--metrics", METRICS)
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        channel = grpc.insecure_channel(socket)
        try:
            grpc.channel_ready_future(channel).result(timeout=10)
        except grpc.FutureTimeoutError:
            process.terminate()
            sys.exit(f"demo: the agent did not start:\n{(root / 'agent.log').read_text()}")
    try:
        yield channel
    finally:
        channel.close()
        with step("stop the agent"):
            process.terminate()
            process.wait(timeout=20)
            log.close()


def command(verb: str, root: Path, *arguments: object) -> list[str]:
    nodeagent = Path(sys.executable).with_name("nodeagent")
    places = ["--root", f"{root}/lib", "--state", f"{root}/run"]
    return [str(nodeagent), *verb.split(), *map(str, arguments), *places]


def run(verb: str, root: Path, *arguments: object) -> None:
    subprocess.run(command(verb, root, *arguments), check=True, stdout=subprocess.DEVNULL)


# --- the image ---


def build_image(root: Path) -> Path:
    """An OCI layout in a tar: one layer, with busybox and links to it."""
    busybox = next((path for path in BUSYBOX if path.exists()), None)
    if busybox is None:
        sys.exit("demo: no static busybox; `make setup` gets it")
    layer = layer_of(busybox.read_bytes())
    blob = gzip.compress(layer, mtime=0)
    config = encode(
        architecture={"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
        os="linux",
        config={"Env": ["PATH=/bin"], "Cmd": ["sh"]},
        rootfs={"type": "layers", "diff_ids": [digest(layer)]},
    )
    kind = "application/vnd.oci.image"
    manifest = encode(
        schemaVersion=2,
        config=descriptor(f"{kind}.config.v1+json", config),
        layers=[descriptor(f"{kind}.layer.v1.tar+gzip", blob)],
    )
    entry = descriptor(f"{kind}.manifest.v1+json", manifest)
    entry["annotations"] = {"io.containerd.image.name": IMAGE}
    contents = {f"blobs/sha256/{digest(b)[7:]}": b for b in (blob, config, manifest)}
    contents["oci-layout"] = encode(imageLayoutVersion="1.0.0")
    contents["index.json"] = encode(schemaVersion=2, manifests=[entry])
    archive = root / "image.tar"
    with tarfile.open(archive, "w") as tar:
        for name, data in contents.items():
            add(tar, name, data)
    return archive


def layer_of(busybox: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        add(tar, "bin/busybox", busybox, mode=0o755)
        for applet in APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        add(tar, "etc/passwd", b"root:x:0:0:root:/:/bin/sh\n")
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    tar.addfile(entry, io.BytesIO(data))


def encode(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def descriptor(media_type: str, data: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digest(data), "size": len(data)}


# --- what is shown ---


@contextmanager
def step(title: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    print(f"\033[1m{title:58}\033[0m {(time.perf_counter() - begin) * 1000:8.1f} ms", flush=True)


def show(text: str) -> None:
    for line in text.strip().splitlines():
        print(f"    {line}")


def fetch(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=5) as answer:
        return str(answer.read().decode())


# --- what is left ---


def machine() -> dict[str, set[str]]:
    """Processes of ours, mounts, links and cgroups of this machine."""
    return {
        "processes": {
            entry.name
            for entry in Path("/proc").iterdir()
            if entry.name.isdecimal() and "na-demo-" in read(entry / "cmdline")
        },
        "mounts": set(Path("/proc/self/mounts").read_text().splitlines()),
        "links": set(os.listdir("/sys/class/net")),
        "cgroups": {str(path) for path in Path("/sys/fs/cgroup").glob("**/nodeagent-*")},
    }


def first_line(path: Path) -> str:
    """Waits for it."""
    for _ in range(100):
        if text := read(path):
            return text
        time.sleep(0.02)
    sys.exit(f"demo: {path} stays empty")


def read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def check_clean(before: dict[str, set[str]]) -> None:
    """Links and namespaces leave asynchronously: give the kernel a moment."""
    deadline = time.monotonic() + 5
    while True:
        left = {kind: now - before[kind] for kind, now in machine().items()}
        if not any(left.values()):
            return
        if time.monotonic() > deadline:
            sys.exit(f"demo: left behind: {left}")
        time.sleep(0.02)


if __name__ == "__main__":
    main()
