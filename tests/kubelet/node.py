"""A real kubelet without an API server: static pods from a directory, on the CRI socket of a runtime.

It has a mount namespace of its own, so that of the machine it changes only what is below its root and its cgroups:
the kernel's parameters that it checks look right to it, and /var/lib/kubelet and /var/log/containers are its own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from tests.support import slices
from tests.support.node import free_port, wait_for

Json = dict[str, Any]

NODE = "node"  # the kubelet adds it to the names of static pods
CGROUPS = Path("/sys/fs/cgroup")
STOP_SECONDS, HTTP_SECONDS = 60.0, 60.0

# Paths that no option of the kubelet moves.
FIXED_PATHS = (Path("/var/lib/kubelet"), Path("/var/log/containers"))
CPU_INFO = Path("/proc/cpuinfo")
# What the kubelet would set [k8s.io/component-helpers/node/util/sysctl].
SYSCTLS = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1000000,
    "kernel/keys/root_maxbytes": 25000000,
}
# Nothing but the kubelet's root propagates to the machine. Arguments: the folder of those files of /proc that are other
# ones to the kubelet, then the command.
ENTER = f"""set -e
for path in /proc /proc/sys {" ".join(map(str, FIXED_PATHS))}; do
	mount --make-private "$(stat -c %m $path)"
done
for path in {" ".join(map(str, FIXED_PATHS))}; do mount -t tmpfs none $path; done
for name in $(cd "$1" && find . -type f); do mount --bind "$1/$name" "/proc/$name"; done
shift
exec "$@"
"""


class LoggedError(NamedTuple):
    at: datetime
    text: str


class Kubelet:
    """`root` must be a shared mount, for the volumes that the kubelet mounts to reach the runtime."""

    def __init__(self, program: Path, root: Path, endpoint: str, cgroup: str) -> None:
        self._program = program
        self.root = root
        self._endpoint = endpoint
        self._cgroup = cgroup
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._manifests = root / "manifests"
        self.log = root / "kubelet.log"
        self._manifests.mkdir()
        (root / "config.json").write_text(json.dumps(self._configuration()))
        for name, text in _files_of_proc().items():
            path = root / "proc" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def start(self) -> None:
        """Return once it answers."""
        root = self.root
        command: list[str | Path] = [
            *("unshare", "--mount", "--propagation", "unchanged"),
            *("sh", "-c", ENTER, "sh", root / "proc"),
            *(self._program, "--config", root / "config.json", "--hostname-override", NODE),
            *("--root-dir", root / "lib", "--cert-dir", root / "pki", "--v", "2"),
        ]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_for(f"the kubelet; see {self.log}", self._answers)

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(STOP_SECONDS)
            self._process = None

    def add(self, pod: Json) -> None:
        name = pod["metadata"]["name"]
        new = self.root / f"{name}.json"
        new.write_text(json.dumps(pod))
        new.rename(self._manifests / f"{name}.json")

    def remove(self, name: str) -> None:
        (self._manifests / f"{name}.json").unlink()

    @property
    def pods(self) -> dict[str, Json]:
        """What it says about its pods, by the names of their manifests."""
        items = json.loads(self.get("/pods"))["items"] or []
        return {pod["metadata"]["name"].removesuffix(f"-{NODE}"): pod for pod in items}

    def wait_for(
        self, name: str, what: str, condition: Callable[[Json], object], seconds: float = 60
    ) -> Json:
        """Return the pod as soon as a condition on it holds."""
        deadline = time.monotonic() + seconds
        while True:
            pod = self.pods.get(name, {})
            with suppress(KeyError, IndexError):
                if pod and condition(pod):
                    return pod
            if time.monotonic() > deadline:
                status = json.dumps(pod.get("status"), indent=1)
                raise AssertionError(f"pod {name} not within {seconds:g} s: {what}\n{status}")
            time.sleep(0.2)

    def url(self, verb: str, pod: str, container: str = "", **query: object) -> str:
        """The URL of exec, attach, portForward or containerLogs; a list of values stands for one parameter each."""
        place = f"{verb}/default/{pod}-{NODE}" + (f"/{container}" if container else "")
        parameters = urllib.parse.urlencode(query, doseq=True)
        return f"https://127.0.0.1:{self._port}/{place}?{parameters}"

    def run(self, pod: str, container: str, *command: str) -> str:
        """What a command in a container prints; the kubelet asks the runtime for it with ExecSync."""
        query = urllib.parse.urlencode({"cmd": " ".join(command)})
        return self._request("POST", f"/run/default/{pod}-{NODE}/{container}?{query}")

    def get(self, path: str) -> str:
        return self._request("GET", path)

    def errors(self) -> list[LoggedError]:
        """The lines of its log that klog marks as errors."""
        lines = re.findall(r"^E(\d{4} \S+) +\d+ (.*)$", self.log.read_text(), re.MULTILINE)
        return [LoggedError(_klog_time(time_), text) for time_, text in lines]

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"the kubelet ended:\n{self.log.read_text()[-3000:]}")
        with suppress(OSError):
            return self.get("/healthz") == "ok"
        return False

    def _request(self, method: str, path: str) -> str:
        request = urllib.request.Request(f"https://127.0.0.1:{self._port}{path}", method=method)
        try:
            answer = urllib.request.urlopen(request, timeout=HTTP_SECONDS, context=self_signed())
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise OSError(f"{method} {path}: {error.code} {text}") from None
        with answer:
            return str(answer.read(), "utf-8")

    def _configuration(self) -> Json:
        return {
            "kind": "KubeletConfiguration",
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "containerRuntimeEndpoint": self._endpoint,
            "staticPodPath": str(self._manifests),
            "podLogsDir": str(self.root / "logs"),
            "volumePluginDir": str(self.root / "plugins"),
            "cgroupRoot": f"/{self._cgroup}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "protectKernelDefaults": True,
            "makeIPTablesUtilChains": False,
            "oomScoreAdj": 0,
            "registerNode": False,
            "address": "127.0.0.1",
            "port": self._port,
            "readOnlyPort": 0,
            "healthzPort": 0,
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "featureGates": {"PodAndContainerStatsFromCRI": True},
            "evictionHard": {"memory.available": "1Mi", "nodefs.available": "0%"},
            "imageGCHighThresholdPercent": 100,
            "crashLoopBackOff": {"maxContainerRestartPeriod": "2s"},
            "syncFrequency": "1s",
            "fileCheckFrequency": "1s",
        }


def _files_of_proc() -> dict[str, str]:
    """The kubelet's, by their names in /proc. It does not start on a processor without a frequency."""
    files = {f"sys/{name}": f"{value}\n" for name, value in SYSCTLS.items()}
    processors = CPU_INFO.read_text()
    if "MHz" not in processors:
        files[CPU_INFO.name] = f"{processors}cpu MHz\t\t: 1000.000\n"
    return files


def self_signed() -> ssl.SSLContext:
    """Takes any certificate: the kubelet has made its own."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _klog_time(text: str) -> datetime:
    """klog leaves the year and the zone out: it means this year, and the machine's zone."""
    return datetime.strptime(f"{datetime.now().year}{text}", "%Y%m%d %H:%M:%S.%f")  # noqa: DTZ005, DTZ007


@contextmanager
def shared_mount(folder: Path) -> Iterator[Path]:
    """`folder` as a mount of its own, whose mounts are seen in all mount namespaces; they end with it."""
    folder.mkdir(parents=True)
    made = [path for path in FIXED_PATHS if not path.exists()]
    for path in made:
        path.mkdir(parents=True)
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "--make-private", folder], check=True)
        subprocess.run(["mount", "--make-shared", folder], check=True)
        yield folder
    finally:
        for mount in reversed(_mounts_below(folder)):
            subprocess.run(["umount", mount], check=True)
        for path in made:
            path.rmdir()


def _mounts_below(folder: Path) -> list[str]:
    fields = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [field[4] for field in fields if Path(field[4]).is_relative_to(folder)]


@contextmanager
def cgroup_root(name: str) -> Iterator[str]:
    """A cgroup in every hierarchy of the machine, `/name`; whatever the kubelet makes below goes with it.

    Where the agent uses the systemd driver, and so the kubelet, it is the slice that stands for it.
    """
    if slices.are_used():
        slices.start(slices.path(name))
        slices.keep_controllers(slices.path(name))
    else:
        for hierarchy in _hierarchies():
            (hierarchy / name).mkdir()
    try:
        yield name
    finally:
        if slices.are_used():
            slices.stop(slices.path(name))
        for cgroup in cgroups(name):
            cgroup.rmdir()


def cgroups(name: str) -> list[Path]:
    """The cgroup and all below it, in every hierarchy; a parent comes after its children."""
    place = slices.place(f"/{name}")
    return [
        Path(folder)
        for hierarchy in _hierarchies()
        for folder, _, _ in os.walk(f"{hierarchy}{place}", topdown=False)
    ]


def _hierarchies() -> list[Path]:
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    return [path for path in CGROUPS.iterdir() if path.is_dir() and not path.is_symlink()]
