"""What the kernel, and whoever administers the node, write for the agent to read."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from nodeagent import config, config_file
from nodeagent.cgroups import hierarchy, parse, v1, v2
from nodeagent.cgroups.control import ControlFiles
from nodeagent.errors import FailedPrecondition, InvalidArgument, NotFound, Unsupported
from nodeagent.lifecycle.plan import cdi, mounts, process
from nodeagent.linux import mountinfo
from nodeagent.net import netlink
from nodeagent.records import ImageConfig
from nodeagent.requests import ContainerConfig
from nodeagent.sandbox import protocol
from tests.fuzz.target import Target


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="na-fuzz-") as name:
        yield Path(name)


# --- the administrator's files --------------------------------------------------------------------------------------


def config_toml(data: bytes) -> None:
    """What is printed of a configuration is the same one."""
    with _folder() as folder:
        path = folder / "config.toml"
        path.write_bytes(data)
        loaded = config_file.load(path, {})
        path.write_text(config_file.dumps(loaded))
        assert config_file.load(path, {}) == loaded


CONFIGS = (
    b"",
    config_file.dumps(config.Config()).encode(),
    b"""root = "/a"
metrics = "[::1]:9"
handlers = ["a", "b-c.d"]
[streaming]
address = "0.0.0.0:10250"
tls_cert = "/c"
tls_key = "/k"
[network]
subnet4 = "10.0.0.0/24"
subnet6 = "fd00::/64"
[images]
pinned = ["quay.io/*"]
[rlimits]
nofile = "1:unlimited"
core = "unlimited"
""",
    b'rlimits = { nofile = "2:1" }\nlog.level = "loud"\n',
)


def cdi_spec(data: bytes) -> None:
    """A device of it goes the way into the store, and into the plan of a container."""
    with _folder() as folder:
        (folder / f"spec.{'yaml' if data[:1] in b'-c' else 'json'}").write_bytes(data)
        injecting = cdi.Cdi([folder], ["/usr/bin/nvidia-cdi-hook"])
        asked = ContainerConfig(name="c", image="i", cdi_devices=("v.com/gpu=0", "v.com/gpu=1"))
        for devices in (asked.cdi_devices[:1], asked.cdi_devices):
            made = injecting.inject(msgspec.structs.replace(asked, cdi_devices=devices))
            assert msgspec.json.decode(msgspec.json.encode(made), type=ContainerConfig) == made
            protocol.encode({"env": process.environment(made, ImageConfig(), "h")})
            for mount in made.mounts:
                mounts._mount(mount, lambda _: ())


SPEC = {
    "cdiVersion": "0.6.0",
    "kind": "v.com/gpu",
    "devices": [
        {
            "name": "0",
            "containerEdits": {
                "deviceNodes": [
                    {"path": "/dev/gpu0", "hostPath": "/dev/null", "fileMode": 432, "uid": 1},
                ],
                "env": ["GPU=0"],
            },
        },
        {
            "name": "1",
            "containerEdits": {
                "mounts": [{"hostPath": "/a", "containerPath": "/b", "options": ["ro", "rbind"]}]
            },
        },
    ],
    "containerEdits": {"additionalGids": [44], "env": ["A=é"]},
}
HOOK = {"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook", "args": ["a", "b"]}
HOOKED = {
    "cdiVersion": "1.1.0",
    "kind": "v.com/gpu",
    "devices": [{"name": "0", "containerEdits": {"hooks": [{}, HOOK]}}],
    "containerEdits": {"hooks": [HOOK]},
}
YAML = b"""---
cdiVersion: 0.5.0
kind: v.com/gpu
devices:
    - name: "0"
      containerEdits:
        deviceNodes:
            - {path: /dev/gpu0, type: c, major: 1, minor: 3}
containerEdits:
    env:
        - A=b
"""
# Tags of what their scalars are not: PyYAML raises what comes to hand.
TAGGED = (b"c: !!bool foo", b"c: !!timestamp foo", b"c: !!int ''")


# --- the kernel's files ---------------------------------------------------------------------------------------------

HUGE = ("2MB",)


def cgroup_files(data: bytes) -> None:
    """``NAME=TEXT`` parts, separated by a NUL: the files of a group."""
    refusals: list[BaseException] = []
    with _folder() as folder:
        for part in data.split(b"\0")[:12]:
            name, _, text = part.partition(b"=")
            if name and b"/" not in name and len(name) < 100 and name not in (b".", b".."):
                Path(os.fsdecode(folder) + "/" + os.fsdecode(name)).write_bytes(text)
        with closing(ControlFiles({"": str(folder)})) as files:
            for version in (v1, v2):
                for read in (version.cpu, version.memory, version.pids, version.io):
                    try:
                        _check_counts(read(files))
                    except (
                        ValueError,
                        KeyError,
                    ) as error:  # those that make a part of the statistics absent
                        refusals.append(error)
                try:
                    version.hugetlb(files, HUGE)
                except (ValueError, KeyError) as error:
                    refusals.append(error)


def _check_counts(stats: object) -> None:
    for part in stats if isinstance(stats, tuple) else (stats,):
        if part is not None:
            assert all(value is None or value != "" for value in dataclasses.astuple(part))


CGROUP_FILES = (
    (
        b"cpu.stat=usage_usec 5\nuser_usec 3\nsystem_usec 2\nnr_periods 1\nnr_throttled 1\nthrottled_usec 7"
        b"\0pids.current=3\0pids.max=max\0hugetlb.2MB.current=4096\0hugetlb.2MB.usage_in_bytes=1"
    ),
    (
        b"memory.current=9\0memory.max=max\0memory.events=max 1\noom_kill 2\0memory.stat=anon 1\nfile 2\n"
        b"file_mapped 3\nactive_file 4\ninactive_file 5\nkernel 6\npgfault 7\npgmajfault 8\n"
    ),
    b"io.stat=8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n8:16\n",
    b"cpuacct.usage_user=1\0cpuacct.usage_sys=2\0cpu.stat=nr_periods 1\nthrottled_time 2\n",
    (
        b"memory.usage_in_bytes=1\0memory.stat=total_rss 1\ntotal_swap 2\0memory.limit_in_bytes=9223372036854771712"
        b"\0memory.failcnt=1\0memory.oom_control=oom_kill_disable 0\nunder_oom 0\noom_kill 3"
    ),
    b"blkio.throttle.io_service_bytes_recursive=8:0 Read 1\n8:0 Write 2\nTotal 3\n",
)


def pressure(data: bytes) -> None:
    parse.pressure(data)


PRESSURE = (
    b"some avg10=0.00 avg60=1.50 avg300=0.10 total=9\nfull avg10=0.0 avg60=0.0 avg300=0.0 total=0\n",
    b"some avg10=0.00 avg60=0.00 avg300=0.00 total=12345\n",
)


def cpu_list(data: bytes) -> None:
    numbers = parse.number_list(data.decode("latin-1"))
    assert max(numbers) < 1 << 16


def mount_points(data: bytes) -> None:
    """Whoever names a directory that is mounted on, the cgroup hierarchies are found beside it."""
    place = os.fsdecode(b"/sys/fs/cgroup/" + data.replace(b"\0", b""))
    for character in "\\ \t\n":  # as the kernel does (proc_pid_mountinfo(5))
        place = place.replace(character, f"\\{ord(character):03o}")
    other = f"36 20 8:1 {place} {place} rw,nosuid shared:7 - tmpfs {place} rw\n"
    real = "30 20 0:26 / /sys/fs/cgroup/pids rw shared:9 - cgroup cgroup rw,pids\n"
    both, alone = (mountinfo.parse(text) for text in (other + real, real))
    assert hierarchy.detect("/sys/fs/cgroup", both) == hierarchy.detect("/sys/fs/cgroup", alone)


MOUNT_POINTS = (b"a b/c", b"\xff - cgroup2", b"pids", "x\u2028y".encode(), b"a\rb\x0cc\x85")


def netlink_answer(data: bytes) -> None:
    for message in netlink.messages(data):
        netlink.attributes(message.body[16:])


def netlink_answers() -> Iterator[bytes]:
    link = netlink.text(3, "eth0") + netlink.nested(18, netlink.text(1, "veth"))
    request = netlink.Request("a link", 16, 0, bytes(16) + link)
    yield request.pack(1) + request.pack(2)


TARGETS = (
    Target(config_toml, (InvalidArgument,), CONFIGS),
    Target(
        cdi_spec,
        (FailedPrecondition, InvalidArgument, NotFound, Unsupported),
        (*(json.dumps(spec).encode() for spec in (SPEC, HOOKED)), YAML, *TAGGED),
    ),
    Target(cgroup_files, (), CGROUP_FILES),
    Target(pressure, (ValueError,), PRESSURE),
    Target(cpu_list, (ValueError,), (b"0-3,7", b"0")),
    Target(mount_points, (), MOUNT_POINTS),
    Target(netlink_answer, (ValueError,), tuple(netlink_answers())),
)
