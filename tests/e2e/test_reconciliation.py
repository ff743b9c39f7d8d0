"""What is put beside an agent's things by hand is gone after two looks and counted; what is not the agent's stays."""

import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from nodeagent.api import runtime_pb2 as pb
from nodeagent.config import Config
from nodeagent.lifecycle.places import Places
from nodeagent.linux import mountinfo, syscalls
from nodeagent.net import nftables
from nodeagent.net.nftables import NFPROTO_BRIDGE, NFPROTO_INET, Table
from tests.e2e.conftest import client, serving
from tests.support.cri import Cri
from tests.support.node import RunningAgent, free_port, wait_for
from tests.support.registry import Registry

# `nodeagent`, that looks every second, not every two minutes.
QUICK = (
    "import runpy; from nodeagent.lifecycle import reconcile; reconcile.PERIOD_SECONDS = 1.0; "
    "runpy.run_module('nodeagent', run_name='__main__', alter_sys=True)"
)


class QuickAgent(RunningAgent):
    """An agent whose reconciliation does not keep a test waiting."""

    def command(self, verb: str, *arguments: str) -> list[str]:
        python, _, _, *rest = super().command(verb, *arguments)
        return [python, "-c", QUICK, *rest]

    @property
    def instance(self) -> str:
        config = Config(root=str(self.root / "lib"), state=str(self.root / "run"))
        return Places.of(config).instance

    def leaks(self) -> dict[str, float]:
        """What it has removed, by kind."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{self.metrics}/metrics", timeout=60) as page:
            lines = page.read().decode().splitlines()
        found = [line.split() for line in lines if line.startswith("nodeagent_leaks_total{")]
        return {name.split('"')[1]: float(value) for name, value in found if float(value)}


@pytest.fixture
def quick(tmp_path_factory: pytest.TempPathFactory, registry: Registry) -> Iterator[QuickAgent]:
    agent = QuickAgent(tmp_path_factory.mktemp("quick"))
    with serving(agent, registry):
        yield agent


@pytest.fixture
def quick_cri(quick: QuickAgent, registry: Registry) -> Cri:
    return client(quick, registry)


def has_tables(instance: str) -> bool:
    """Whether this kernel has both kinds of the agent's tables."""
    with nftables.connect() as connection:
        try:
            for nfproto in (NFPROTO_INET, NFPROTO_BRIDGE):
                connection.ask(Table(f"nodeagent_{instance}", nfproto).look_up())
        except OSError:
            return False
    return True


def nft(*arguments: str) -> str:
    run = subprocess.run(("nft", *arguments), capture_output=True, text=True, check=True)
    return run.stdout


def test_elements(quick: QuickAgent, quick_cri: Cri) -> None:
    if not has_tables(quick.instance):
        pytest.skip("this kernel has no nf_tables")
    table, other = f"nodeagent_{quick.instance}", f"nodeagent_not_{quick.instance}"
    port = free_port()
    mapping = pb.PortMapping(protocol=pb.TCP, container_port=8080, host_port=port)
    pod = quick_cri.pod(port_mappings=[mapping])
    with ExitStack() as stack:
        nft("add", "table", "inet", other)
        stack.callback(nft, "delete", "table", "inet", other)
        nft("add", "set", "inet", other, "any4", "{ type inet_service; }")
        nft("add", "element", "inet", other, "any4", "{ 81 }")
        stray = "tcp . 81 : 10.88.255.9 . 8080"
        link = f"nv{quick.instance}zzzzz"
        sender = "02:00:00:00:00:01 . 10.88.255.9"
        nft("add", "element", "inet", table, "any4", f"{{ {stray} }}")
        nft("add", "element", "bridge", table, "ipv4", f'{{ "{link}" . {sender} }}')
        wait_for("both are removed", lambda: quick.leaks() == {"element": 2})
        assert "81" in nft("list", "set", "inet", other, "any4")
        ports = nft("list", "map", "inet", table, "any4")
        assert "10.88.255.9" not in ports
        assert f"tcp . {port} : {pod.ip} . 8080" in ports
        assert "10.88.255.9" not in (senders := nft("list", "set", "bridge", table, "ipv4"))
        assert pod.ip in senders
    log = quick.log.read_text()
    assert f'element "any4 {{ {stray} }}": no record explains it' in log
    assert f'element "ipv4 {{ {link} . {sender} }}": no record explains it' in log


def points_below(root: Path) -> list[str]:
    mounts = mountinfo.parse(mountinfo.table())
    return [mount.point for mount in mounts if mount.point.startswith(f"{root}/")]


@pytest.fixture
def mounts() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def mount(stack: ExitStack, points: Sequence[Path]) -> list[str]:
    for point in points:
        point.mkdir(parents=True, exist_ok=True)
        syscalls.mount("stray", str(point), "tmpfs", 0, "size=4096")
        stack.callback(_detach, str(point))
    return list(map(str, points))


def _detach(point: str) -> None:
    if point in points_below(Path(point).parent):
        syscalls.umount2(point, syscalls.MNT_DETACH)


def test_mounts(quick: QuickAgent, quick_cri: Cri, mounts: ExitStack) -> None:
    lib, pods = quick.root / "lib", quick.root / "run" / "pods"
    container = quick_cri.run("sh", "-c", "while sleep 1; do echo on; done")
    stopped = quick_cri.pod()
    stopped.stop()
    theirs = mount(mounts, [quick.root / "elsewhere", lib / "layers" / "x", lib / "mine"])
    before = points_below(quick.root)
    assert any(point.startswith(f"{pods}/{container.pod.id}/") for point in before)
    strays = mount(
        mounts,
        [
            lib / "containers" / container.id / "upper" / "a b",
            pods / stopped.id / "rootfs",
            lib / "trash" / "layer" / "x",
            lib / "staging" / "image" / "x",
        ],
    )
    wait_for("all are removed", lambda: quick.leaks() == {"mount": 4})
    after = points_below(quick.root)
    assert set(strays).isdisjoint(after)
    assert set(theirs) <= set(after)
    ours = [point for point in before if container.pod.id in point]
    assert set(ours) <= set(after)
    assert container.shell("echo it runs") == "it runs"
    log = quick.log.read_text()
    assert all(f'mount "{stray}": no record explains it' in log for stray in strays)
