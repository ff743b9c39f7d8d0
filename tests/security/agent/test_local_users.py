"""A user of the node who is nobody: what the agent keeps, and what it says about itself, is out of their reach."""

import base64
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from nodeagent.api import runtime_pb2 as pb
from nodeagent.linux import syscalls
from tests.e2e.conftest import client, running_agent
from tests.security.agent.test_mounts import host_pid
from tests.security.agent.test_requests import descendants
from tests.support.cri import SLEEP, Container, Cri, Pod, pod_options
from tests.support.node import RunningAgent
from tests.support.registry import PASSWORD, USERNAME, Registry

NOBODY = 65534
SECRET = "PalimpsestOfQuartz"
FIRST_ID, IDS = 1 << 20, 1 << 16

# Started as root, for its imports, and nobody from the third line on; prints what it could do, a JSON list.
REACH = f"""
import json, os, socket, stat, sys
paths = json.load(sys.stdin)
os.chdir("/"); os.setgroups([]); os.setresgid(*[{NOBODY}] * 3); os.setresuid(*[{NOBODY}] * 3)
reached = []

def attempt(path, deed, call):
    try:
        call()
    except OSError:
        return
    reached.append((path, deed))

def connect(path):
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_UNIX, kind) as connection:
            try: connection.connect(path)
            except OSError as error:
                if error.errno != 91: raise
            else: return

def execute(path):
    if not os.access(path, os.X_OK): raise PermissionError

for path, mode in paths:
    if stat.S_ISDIR(mode):
        attempt(path, "enter", lambda: os.chdir(path))
        attempt(path, "list", lambda: os.listdir(path))
        attempt(path, "make", lambda: os.mkdir(path + "/made"))
    elif stat.S_ISLNK(mode):
        attempt(path, "read", lambda: os.readlink(path))
    elif stat.S_ISSOCK(mode):
        attempt(path, "connect", lambda: connect(path))
    else:
        attempt(path, "read", lambda: os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        attempt(path, "write", lambda: os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        attempt(path, "execute", lambda: execute(path))
print(json.dumps(reached))
"""

# As above; prints every file of which it could read one of the secrets.
READ = f"""
import json, os, sys
paths, secrets = json.load(sys.stdin)
os.setgroups([]); os.setresgid(*[{NOBODY}] * 3); os.setresuid(*[{NOBODY}] * 3)
read, found = 0, []
for path in paths:
    try:
        if os.path.islink(path):
            text = os.readlink(path).encode()
        else:
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            text = os.read(file, 1 << 20)
            os.close(file)
    except OSError:
        continue
    read += 1
    if any(secret.encode() in path.encode() + text for secret in secrets): found.append(path)
print(json.dumps([read, found]))
"""


def as_nobody(script: str, given: object) -> list[object]:
    command = [sys.executable, "-I", "-S", "-c", script]
    done = subprocess.run(
        command, input=json.dumps(given), capture_output=True, text=True, timeout=60, check=True
    )
    answer: list[object] = json.loads(done.stdout)
    return answer


@pytest.fixture
def open_agent(
    tmp_path_factory: pytest.TempPathFactory, registry: Registry
) -> Iterator[RunningAgent]:
    """An agent whose directories everybody gets to, as below /var/lib and /run."""
    with running_agent(tmp_path_factory, registry) as running:
        base = tmp_path_factory.getbasetemp()
        before = stat.S_IMODE(base.stat().st_mode)
        for above in (base, running.root):
            above.chmod(0o755)
        yield running
        base.chmod(before)


@pytest.fixture
def open_cri(open_agent: RunningAgent, registry: Registry) -> Cri:
    return client(open_agent, registry)


def everything_below(*tops: Path) -> list[tuple[str, int]]:
    """Each path and its st_mode, the tops included; what is pinned of procfs, but not what is in it."""
    paths = {str(top) for top in tops}
    for top in tops:
        for folder, folders, names in os.walk(top):
            if is_procfs(folder):
                folders.clear()
                continue
            paths.update(f"{folder}/{name}" for name in (*folders, *names))
    return [(path, os.lstat(path).st_mode) for path in sorted(paths)]


def is_procfs(folder: str) -> bool:
    directory = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        return syscalls.statfs_type(directory) == syscalls.PROC_SUPER_MAGIC
    finally:
        os.close(directory)


def reach(agent: RunningAgent) -> list[object]:
    """What nobody can do with all that the agent keeps."""
    (agent.root / "canary").write_text("everybody may read this")
    paths = everything_below(agent.root / "lib", agent.root / "run", agent.root / "canary")
    reached = as_nobody(REACH, paths)
    reached.remove([str(agent.root / "canary"), "read"])
    return reached


def in_a_user_namespace() -> pb.LinuxPodSandboxConfig:
    mapping = pb.IDMapping(host_id=FIRST_ID, container_id=0, length=IDS)
    user = pb.UserNamespace(mode=pb.POD, uids=[mapping], gids=[mapping])
    return pod_options(userns_options=user)


def pods(cri: Cri) -> Iterator[Pod]:
    yield cri.pod()
    yield cri.pod(linux=pod_options(network=pb.NODE, ipc=pb.NODE, pid=pb.NODE))
    yield cri.pod(linux=in_a_user_namespace())


def running_container(pod: Pod) -> Container:
    """One that leaves behind what is dangerous outside: a program with a set-user-ID bit, a device, open files."""
    container = pod.run(
        *SLEEP,
        envs=[pb.KeyValue(key="TOKEN", value=SECRET.encode())],
        annotations={"token": SECRET},
    )
    container.shell(
        "cp /bin/busybox /evil && chmod 6755 /evil && echo x > /open && chmod 777 /open"
    )
    container.shell(
        "mknod -m 666 /disk b 7 0 || true; echo x > /dev/shm/open; chmod 666 /dev/shm/open"
    )
    return container


def test_cve_2021_41103_nothing_is_readable_or_enterable(open_cri: Cri) -> None:
    agent = open_cri.agent
    for pod in pods(open_cri):
        container = running_container(pod)
        container.exec("true")
        upper = agent.root / "lib/containers" / container.id / "upper"
        assert (upper / "evil").stat().st_mode & stat.S_ISUID
    # Who was given the CRI's socket must be able to get to it: the state directory may be passed, not listed.
    assert reach(agent) == [[str(agent.root / "run"), "enter"]]


def test_an_earlier_version_s_modes_are_taken_back(open_cri: Cri) -> None:
    agent = open_cri.agent
    container = running_container(open_cri.pod())
    root, state = agent.root / "lib", agent.root / "run"
    (root / "containers" / container.id / "plan.json").touch()  # which earlier versions have made
    wide = {
        root: 0o711,
        root / "containers": 0o711,
        root / "trash": 0o711,
        root / "blobs": 0o755,
        root / "containers" / container.id: 0o755,
        root / "containers" / container.id / "plan.json": 0o644,
        root / "state.db": 0o644,
        root / "state.db-wal": 0o644,
        root / "state.db-shm": 0o644,
        state: 0o755,
        state / "pods": 0o711,
        state / "pods" / container.pod.id: 0o711,
    }
    agent.kill()
    for path, mode in wide.items():
        path.chmod(mode)
    assert [str(root / "state.db"), "read"] in reach(agent)
    agent.start()
    for path in wide:
        assert not stat.S_IMODE(path.stat().st_mode) & (0o066 if path == state else 0o077), path
    assert reach(agent) == [[str(state), "enter"]]
    assert container.shell("echo alive") == "alive"


def test_everything_of_ours_has_a_narrow_umask(open_cri: Cri) -> None:
    container = running_container(open_cri.pod())
    masks = {pid: umask(pid) for pid in ours(open_cri.agent)}
    assert len(masks) >= 3
    assert set(masks.values()) == {0o077}
    assert container.shell("umask") == "0022"


def test_what_others_have_to_see_has_wider_modes(open_cri: Cri) -> None:
    """The container's root, files of the pod and cgroups, to its users; the log's directory, to collectors."""
    container = running_container(open_cri.pod(log_directory=str(open_cri.logs / "deep/logs")))
    assert container.shell("stat -c %a / /etc/hosts /etc/hostname /etc/resolv.conf").split() == [
        "755",
        "644",
        "644",
        "644",
    ]
    assert container.shell("stat -c %a /dev/shm") == "1777"
    groups = "find /sys/fs/cgroup -maxdepth 1 -type d -exec stat -c %a {} +"
    assert set(container.shell(groups).split()) == {"755"}
    assert stat.S_IMODE(container.log.parent.stat().st_mode) == 0o755
    assert stat.S_IMODE(container.log.parent.parent.stat().st_mode) == 0o755


def umask(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("Umask:")[2].split()[0], 8)


def ours(agent: RunningAgent) -> list[int]:
    """The agent, its launcher and supervisors: what it has started and no container is."""
    return [pid for pid in descendants(agent.pid) if b"nodeagent" in command_line(pid)]


def command_line(pid: int) -> bytes:
    """Nothing of one that has ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


# ---- secrets ----


def test_secrets_of_pods_are_not_in_proc(open_cri: Cri, private_registry: Registry) -> None:
    """Nor in the names of cgroups, links and sockets. What a container runs shows its own command line, to all."""
    agent = open_cri.agent
    agent.trust(private_registry.host)
    auth = pb.AuthConfig(username=USERNAME, password=PASSWORD)
    image = pb.ImageSpec(image=f"{private_registry.host}/library/busybox:latest")
    pull = pb.PullImageRequest(image=image, auth=auth)
    agent.images.PullImage(pull, timeout=60)
    pod = open_cri.pod(annotations={"token": SECRET}, labels={"token": SECRET})
    running_container(pod).exec("sh", "-c", f": {SECRET}")
    envs = [pb.KeyValue(key="TOKEN", value=SECRET.encode())]
    waiting = pod.container(
        "sh", "-c", f": {SECRET}; sleep 9", name="waiting", envs=envs, annotations={"a": SECRET}
    )
    init = host_pid(waiting)
    credentials = f"{USERNAME}:{PASSWORD}"
    secrets = [*disguises(SECRET), credentials, base64.b64encode(credentials.encode()).decode()]
    paths = [*files_of_processes([*ours(agent), init]), *names_of_the_kernel(agent, pod)]
    read, found = as_nobody(READ, [paths, secrets])
    assert isinstance(read, int)
    assert read > 100
    assert found == []
    for pid in (*ours(agent), init):
        for name in ("cmdline", "environ", "comm", "mountinfo", "cgroup"):
            text = Path(f"/proc/{pid}/{name}").read_bytes()
            assert not [secret for secret in secrets if secret.encode() in text], (pid, name)


def disguises(text: str) -> Iterator[str]:
    """It might be in the middle of something that is encoded: base64 has three phases."""
    yield text
    yield text.encode().hex()
    for phase in range(3):
        encoded = base64.b64encode(bytes(phase) + text.encode()).decode()
        yield encoded[4:-4]


def files_of_processes(pids: Iterable[int]) -> Iterator[str]:
    """All but what shows a process's memory, which is megabytes and not to be read by others anyway."""
    for pid in pids:
        for folder, folders, names in os.walk(f"/proc/{pid}"):
            if folder.count("/") > 3:
                folders.clear()
            yield from (f"{folder}/{name}" for name in (*names, *folders))


def names_of_the_kernel(agent: RunningAgent, pod: Pod) -> Iterator[str]:
    yield from ("/proc/net/unix", "/proc/mounts", "/proc/net/dev", "/proc/locks", "/proc/keys")
    yield from (str(path) for path in Path("/sys/class/net").iterdir())
    for folder, folders, names in os.walk("/sys/fs/cgroup"):
        if "nodeagent" in folder or pod.id in folder:
            yield from (f"{folder}/{name}" for name in (*folders, *names))
