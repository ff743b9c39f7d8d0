"""What every container of a chart shows from inside, against what its pod's spec says.

The expectations are worked out here from the spec alone; nothing of the agent's is used.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass

from tests.charts.chart import Chart, Json
from tests.charts.kubelet import TERMINATION_LOG, TOKEN
from tests.charts.node import NAME, Node
from tests.charts.pods import ChartPod

# capabilities(7), in the order of their numbers
CAPABILITIES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
    "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN "
    "SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE "
    "MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
).split()
USUAL = {
    *("AUDIT_WRITE CHOWN DAC_OVERRIDE FOWNER FSETID KILL MKNOD NET_BIND_SERVICE NET_RAW".split()),
    *("SETFCAP SETGID SETPCAP SETUID SYS_CHROOT".split()),
}

REPORT = """
echo "user $(id -u) $(id -g) $(id -G)"
grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status
for kind in net pid ipc uts; do echo "ns:$kind $(readlink /proc/self/ns/$kind)"; done
sed 's/^/mount: /' /proc/self/mountinfo
echo "hostname $(hostname)"
if touch /.written 2>/dev/null; then echo "root writable"; else echo "root not"; fi
echo message of $(id -u) > /dev/termination-log && echo "message written"
cat /etc/resolv.conf
"""


@dataclass(frozen=True, slots=True)
class Report:
    lines: list[str]

    def of(self, key: str) -> str:
        """The rest of the line that begins with a word."""
        return next(
            line[len(key) :].strip(": \t") for line in self.lines if line.startswith((key,))
        )

    def mount(self, target: str) -> list[str]:
        """The fields of what is mounted last at a path."""
        table = [line.split()[1:] for line in self.lines if line.startswith("mount: ")]
        found = [fields for fields in table if fields[4] == target]
        assert found, f"{target}: not a mount"
        return found[-1]


def observe(pod: ChartPod, spec: Json) -> None:
    """All that can be told of a container that runs from its spec."""
    container = pod.containers[spec["name"]]
    report = Report(container.shell(REPORT).splitlines())
    given = pod.chart.security(spec)
    _identity(pod.chart, given, spec, report)
    _capabilities(pod.node, given, report)
    _namespaces(pod, report)
    for mount in spec.get("volumeMounts", ()):
        _mount(mount, report, changed=spec.get("remounts", False))
    writable = not given.get("readOnlyRootFilesystem") and report.of("user").startswith("0 ")
    assert report.of("root") == ("writable" if writable else "not")
    assert report.of("message") == "written"
    _files(pod, spec)


def _identity(chart: Chart, given: Json, spec: Json, report: Report) -> None:
    uid, gid, *groups = report.of("user").split()
    if "runAsUser" in given:
        assert int(uid) == given["runAsUser"]
    else:
        assert (uid == "0") == (not spec.get("image", {}).get("User"))
    if "runAsUser" in given and "runAsGroup" in given:
        assert int(gid) == given["runAsGroup"]
    if "fsGroup" in given:
        assert str(given["fsGroup"]) in groups
    assert report.of("NoNewPrivs") == ("0" if given.get("allowPrivilegeEscalation", True) else "1")
    profile = given.get("seccompProfile", {}).get("type", "Unconfined")
    is_filtered = profile != "Unconfined" and not given.get("privileged")
    assert report.of("Seccomp") == ("2" if is_filtered else "0")


def _capabilities(node: Node, given: Json, report: Report) -> None:
    """The capabilities of those that the agent has itself: without one, a container runs without it."""
    change = given.get("capabilities", {})
    held = node.capabilities
    bounding = set(CAPABILITIES) if given.get("privileged") else USUAL - set(change.get("drop", ()))
    if "ALL" in change.get("drop", ()) and not given.get("privileged"):
        bounding = set()
    bounding = (bounding | set(change.get("add", ()))) & named(held)
    assert named(report.of("CapBnd")) == bounding
    assert named(report.of("CapEff")) == (bounding if report.of("user")[:2] == "0 " else set())


def named(mask: str) -> set[str]:
    """The names in a mask as /proc writes it."""
    return {name for number, name in enumerate(CAPABILITIES) if int(mask, 16) >> number & 1}


def _namespaces(pod: ChartPod, report: Report) -> None:
    spec = pod.chart.spec
    of_node = {
        "net": pod.chart.on_node_network,
        "uts": pod.chart.on_node_network,
        "pid": bool(spec.get("hostPID")),
        "ipc": bool(spec.get("hostIPC")),
    }
    found = {kind: report.of(f"ns:{kind}") == pod.node.namespace(kind) for kind in of_node}
    assert found == of_node
    name = NAME if pod.chart.on_node_network else pod.chart.host_name
    assert report.of("hostname") == name
    assert report.of("nameserver") == "10.96.0.10"


def _mount(mount: Json, report: Report, *, changed: bool) -> None:
    """changed: the program has changed the propagation of its mounts."""
    fields = report.mount(inside(mount["mountPath"]))
    attributes = set(fields[5].split(","))
    assert ("ro" if mount.get("readOnly") else "rw") in attributes, mount
    if changed:
        return
    optional = {field.partition(":")[0] for field in fields[6 : fields.index("-")]}
    propagation = mount.get("mountPropagation", "None")
    assert ("master" in optional) == (propagation == "HostToContainer"), (mount, fields)
    assert ("shared" in optional) == (propagation == "Bidirectional"), (mount, fields)


def inside(path: str) -> str:
    """Where a path of a request is in our images, in which /var/run is a link."""
    normal = posixpath.normpath(path)
    return normal.removeprefix("/var") if normal.startswith("/var/run") else normal


def _files(pod: ChartPod, spec: Json) -> None:
    """The kubelet's files are readable, its volumes writable, and the container's last words arrive."""
    container = pod.containers[spec["name"]]
    volumes = {volume["name"]: volume for volume in pod.chart.spec.get("volumes", ())}
    group = pod.chart.spec.get("securityContext", {}).get("fsGroup")
    if pod.chart.spec.get("automountServiceAccountToken", True):
        assert container.shell(f"cat {TOKEN}/token") == "token of kube-api-access-x7k2p"
    for mount in spec.get("volumeMounts", ()):
        kinds = volumes[mount["name"]].keys()
        if kinds & {"emptyDir", "persistentVolumeClaim"} and not mount.get("readOnly"):
            path = f"{mount['mountPath']}/.written-by-{spec['name']}"
            owner = container.shell(f"touch {path}; stat -c %g {path}; rm {path}")
            assert group is None or int(owner) == group
    path = next(m.host_path for m in container.config.mounts if m.container_path == TERMINATION_LOG)
    assert pod.node.read(path).startswith("message of ")
