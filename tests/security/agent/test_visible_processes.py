"""A shared PID namespace, in which CAP_SYS_PTRACE takes over what it sees: nothing there is more than its program.

The watcher (`watcher.c`) looks at every process that appears, takes it over, and tries what only the node may do.
"""

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from nodeagent.lifecycle.plan.process import DEFAULT_CAPABILITIES
from nodeagent.linux import capabilities
from tests.e2e.test_user_namespaces import user_namespace
from tests.security.agent.conftest import PullHostile
from tests.support import images, tars
from tests.support.cri import EXITED, SLEEP, Container, Cri, Pod, options, pod_options, refused
from tests.support.node import wait_for

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the watcher is x86-64 code")

PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
DEFAULT = capabilities.mask(DEFAULT_CAPABILITIES)
TRACER = pb.Capability(add_capabilities=["SYS_PTRACE"])
ROUNDS, EXECS = 10, 4

# What a hidden process and busybox need, and no more: as profiles are that somebody recorded.
NARROW = (
    "access arch_prctl brk capset clock_nanosleep clone close dup2 execve exit exit_group fcntl fstat getcwd getegid"
    " geteuid getgid getpid getppid getrandom gettid getuid ioctl lseek mmap mprotect munmap nanosleep newfstatat open"
    " openat poll prlimit64 read readlink rseq rt_sigaction rt_sigprocmask rt_sigreturn set_robust_list"
    " set_tid_address setgid setpgid setsid setuid stat uname wait4 write writev"
).split()


@dataclass(frozen=True)
class Seen:
    """A line of the watcher on what it saw."""

    pid: int
    exe: str
    seccomp: int
    no_new_privs: int
    permitted: int
    effective: int
    bounding: int
    root: int
    cwd: int
    cgroup: str

    @classmethod
    def read(cls, line: str) -> "Seen":
        fields = dict(part.split("=", 1) for part in line.split()[1:])
        return cls(
            pid=int(fields["pid"]),
            exe=fields["exe"],
            seccomp=int(fields["seccomp"]),
            no_new_privs=int(fields["nnp"]),
            permitted=int(fields["prm"], 16),
            effective=int(fields["eff"], 16),
            bounding=int(fields["bnd"], 16),
            root=int(fields["root"]),
            cwd=int(fields["cwd"]),
            cgroup=fields["cgroup"],
        )


class Watcher:
    """A container that watches the others of its PID namespace."""

    def __init__(self, container: Container) -> None:
        self.container = container
        container.said("up")

    def lines(self, kind: str) -> list[str]:
        """Processes that ended while they were looked at have left fields out."""
        found = [line for line in self.container.output.splitlines() if line.startswith(f"{kind} ")]
        return [
            line for line in found if "=-" not in line.partition(" cgroup=")[0].replace("exe=-", "")
        ]

    def seen(self) -> list[Seen]:
        return [Seen.read(line) for line in self.lines("seen")]

    def unborn(self) -> list[Seen]:
        """Those that had not executed their program yet; out of a user namespace, their link cannot be read."""
        hidden = ("/memfd:nodeagent", "-")
        return [seen for seen in self.seen() if seen.exe in hidden and seen.pid != 1]

    def taken(self) -> Iterator[dict[str, int]]:
        for line in self.lines("took"):
            yield {name: int(value) for name, value in re.findall(r"(\w+)=(-?\d+)", line)}


@pytest.fixture
def image(hostile: PullHostile) -> pb.ImageSpec:
    source = Path(__file__).with_name("watcher.c").read_text()
    return hostile(tars.file("bin/watcher", images.compiled(source), mode=0o755))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the node that root may read."""
    path = tmp_path / "secret"
    path.write_text("of the node")
    path.chmod(0o600)
    return path


@dataclass(frozen=True)
class Setting:
    """How the processes that are watched are confined. seccomp: as in /proc/PID/status."""

    seccomp: int
    fields: Callable[[Path], dict[str, Any]]


def profile(kind: str, path: str = "") -> dict[str, Any]:
    return {"seccomp": pb.SecurityProfile(profile_type=kind, localhost_ref=path)}


def localhost(folder: Path) -> dict[str, Any]:
    entry = {"names": NARROW, "action": "SCMP_ACT_ALLOW"}
    text = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [entry]}
    (folder / "narrow.json").write_text(json.dumps(text))
    return profile("Localhost", str(folder / "narrow.json"))


SETTINGS = {
    "default": Setting(2, lambda _: profile("RuntimeDefault")),
    "default, no new privileges": Setting(
        2, lambda _: {**profile("RuntimeDefault"), "no_new_privs": True}
    ),
    "unconfined": Setting(0, lambda _: profile("Unconfined")),
    "localhost": Setting(2, localhost),
}


def check(watcher: Watcher, setting: Setting, ids: set[str]) -> None:
    """Everything that was found is at most the program; ids: whose cgroups the processes may be in."""
    assert watcher.unborn()
    for seen in watcher.seen():
        is_init = seen.pid == 1 and seen.permitted == 0
        assert seen.seccomp == (2 if is_init else setting.seccomp), seen
        assert (seen.permitted | seen.effective | seen.bounding) & ~DEFAULT == 0, seen
        assert 0 not in (seen.root, seen.cwd), seen
        paths = [entry.split(":", 2)[2] for entry in seen.cgroup.split(";") if entry]
        assert all(any(name in path for name in ids) for path in paths if path != "/"), seen
    taken = [attempt for attempt in watcher.taken() if attempt.get("open", -1) != -1]
    assert taken, watcher.lines("took")
    for attempt in taken:
        assert 0 not in (attempt["open"], attempt["device"], attempt["mount"]), attempt
        assert attempt["unshare"] or not setting.seccomp, attempt


def watched_pod(cri: Cri, *, mapped: bool) -> tuple[Pod, pb.NamespaceOption]:
    """A pod with a shared PID namespace, with a user namespace or without."""
    users = user_namespace() if mapped else None
    pod = cri.pod(linux=pod_options(pid=pb.POD, userns_options=users))
    return pod, pb.NamespaceOption(pid=pb.POD, userns_options=users)


@pytest.mark.parametrize("mapped", [False, True], ids=["node ids", "user namespace"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.timeout(300)
def test_births_and_execs_in_a_shared_namespace(
    cri: Cri, image: pb.ImageSpec, secret: Path, tmp_path: Path, name: str, mapped: bool
) -> None:
    setting = SETTINGS[name]
    pod, namespace = watched_pod(cri, mapped=mapped)
    linux = options(namespace_options=namespace, capabilities=TRACER)
    watcher = Watcher(
        pod.run("/bin/watcher", str(secret), name="watcher", image=image, linux=linux)
    )
    ids = {pod.id, watcher.container.id}
    confined = options(namespace_options=namespace, **setting.fields(tmp_path))
    for number in range(ROUNDS):
        before = len(watcher.unborn())
        container = pod.container(*SLEEP, name=f"victim-{number}", linux=confined)
        ids.add(container.id)
        wait_for("the sight of it", partial(saw_more, watcher, before))
        if number % 5 == 4:
            replace_supervisor(pod)
        container.start()
        for _ in range(EXECS):
            assert container.exec("true").exit_code == 0
        container.stop()
        container.remove()
    check(watcher, setting, ids)
    pod.remove()


def saw_more(watcher: Watcher, unborn: int) -> bool:
    return len(watcher.unborn()) > unborn


def replace_supervisor(pod: Pod) -> None:
    before = pod.supervisor
    os.kill(before, signal.SIGKILL)
    wait_for("a successor of the supervisor", lambda: pod.supervisor not in (0, before))


def test_a_debug_container_and_what_comes_after_it(
    cri: Cri, image: pb.ImageSpec, secret: Path
) -> None:
    """It joins the PID namespace of one container, in which there was nobody who might trace."""
    pod = cri.pod(linux=pod_options(pid=pb.CONTAINER))
    runtime_default = profile("RuntimeDefault")
    target = pod.run(*SLEEP, linux=options(**runtime_default))
    joined = pb.NamespaceOption(pid=pb.TARGET, target_id=target.id)
    linux = options(namespace_options=joined, capabilities=TRACER)
    watcher = Watcher(pod.run("/bin/watcher", str(secret), name="debug", image=image, linux=linux))
    ids = {target.id, watcher.container.id}
    confined = options(namespace_options=joined, **runtime_default)
    for number in range(ROUNDS):
        container = pod.run(*SLEEP, name=f"second-{number}", linux=confined)
        ids.add(container.id)
        assert "sleep" in container.shell("cat /proc/1/cmdline")
        for each in (container, target):
            assert each.exec("true").exit_code == 0
        container.remove()
    check(watcher, SETTINGS["default"], ids)
    pod.remove()


def test_execs_beside_a_tracer_that_came_by_way_of_a_container_that_has_gone(
    cri: Cri, image: pb.ImageSpec, secret: Path
) -> None:
    """The members of a PID namespace do not depend on the record of the container that led there."""
    pod = cri.pod(linux=pod_options(pid=pb.CONTAINER))
    runtime_default = profile("RuntimeDefault")
    target = pod.run(*SLEEP, linux=options(**runtime_default))
    by_way = pb.NamespaceOption(pid=pb.TARGET, target_id=target.id)
    between = pod.run(
        *SLEEP, name="between", linux=options(namespace_options=by_way, **runtime_default)
    )
    joined = pb.NamespaceOption(pid=pb.TARGET, target_id=between.id)
    linux = options(namespace_options=joined, capabilities=TRACER, **runtime_default)
    watcher = Watcher(pod.run("/bin/watcher", str(secret), name="debug", image=image, linux=linux))
    between.remove()
    for _ in range(ROUNDS):
        assert target.exec("true").exit_code == 0
    check(watcher, SETTINGS["default"], {target.id, between.id, watcher.container.id})
    pod.remove()


def test_execs_beside_a_tracer_in_a_namespace_of_its_own(
    cri: Cri, image: pb.ImageSpec, secret: Path
) -> None:
    linux = options(capabilities=TRACER, **profile("RuntimeDefault"))
    pod = cri.pod(linux=pod_options(pid=pb.CONTAINER))
    watcher = Watcher(pod.run("/bin/watcher", str(secret), image=image, linux=linux))
    for _ in range(ROUNDS * EXECS):
        assert watcher.container.exec("true").exit_code == 0
    for seen in watcher.seen():
        assert seen.seccomp == 2, seen
        assert seen.permitted & ~(DEFAULT | capabilities.SYS_PTRACE) == 0, seen
    for attempt in watcher.taken():
        assert 0 not in (attempt.get("open"), attempt.get("device"), attempt.get("mount")), attempt
    pod.remove()


@pytest.mark.parametrize("mapped", [False, True], ids=["node ids", "user namespace"])
def test_the_procfs_of_a_debug_container(cri: Cri, mapped: bool) -> None:
    """It shows the processes of its target, is masked as any, and lets nothing of it out."""
    users = user_namespace() if mapped else None
    pod = cri.pod(linux=pod_options(pid=pb.CONTAINER, userns_options=users))
    own = pb.NamespaceOption(pid=pb.CONTAINER, userns_options=users)
    masked = {"masked_paths": ["/proc/keys"], "readonly_paths": ["/proc/sys"]}
    target = pod.run("sleep", "4321", linux=options(namespace_options=own, **masked))
    before = target.shell("cat /proc/self/mountinfo")
    joined = pb.NamespaceOption(pid=pb.TARGET, target_id=target.id, userns_options=users)
    debug = pod.run(*SLEEP, name="debug", linux=options(namespace_options=joined, **masked))
    assert debug.shell("tr '\\0' ' ' < /proc/1/cmdline") == "sleep 4321"
    assert debug.exec("sh", "-c", "echo x > /proc/sys/kernel/hostname").exit_code != 0
    assert debug.shell("cat /proc/keys") == ""
    assert target.shell("cat /proc/self/mountinfo") == before
    pod.remove()


def test_a_target_without_a_procfs_of_its_own(cri: Cri) -> None:
    """What a container has put at its /proc is not given to another one."""
    security = pb.LinuxSandboxSecurityContext(
        privileged=True, namespace_options=pb.NamespaceOption(pid=pb.CONTAINER)
    )
    pod = cri.pod(linux=pb.LinuxPodSandboxConfig(security_context=security))
    target = pod.run(linux=options(privileged=True))
    target.shell("mount -t tmpfs none /proc")
    joined = pb.NamespaceOption(pid=pb.TARGET, target_id=target.id)
    refused(
        PRECONDITION,
        "no procfs of its own",
        lambda: pod.container(name="debug", linux=options(namespace_options=joined)),
    )
    pod.remove()


# ---- what a process that was taken over says ----

FORGED = (
    '{"ready":{"identity":{"uid":0,"gid":0,"groups":[],"home":"/"},"warnings":[]}}',
    '{"successor":1}',
    '{"error":"NotFound","text":"forged"}',
    "b",
    "forged",
)


def test_what_is_said_in_the_name_of_a_process_harms_no_other(
    cri: Cri, image: pb.ImageSpec, secret: Path
) -> None:
    """It may fail, as it may be killed; its siblings go on and end as they do."""
    pod, namespace = watched_pod(cri, mapped=False)
    linux = options(namespace_options=namespace, capabilities=TRACER)
    script = "trap 'exit 7' USR1; echo $$ > /tmp/pid; echo up; while :; do sleep 0.1; done"
    sibling = pod.run("sh", "-c", script, name="sibling", linux=linux)
    sibling.said("up")
    forger = pod.run("/bin/watcher", str(secret), *FORGED, name="forger", image=image, linux=linux)
    forger.said("up")
    plain = options(namespace_options=namespace)
    for number in range(ROUNDS):
        with suppress(grpc.RpcError):
            pod.run(*SLEEP, name=f"victim-{number}", linux=plain).exec("true")
    forger.said("sent=")
    forger.stop()
    sibling.shell("kill -USR1 $(cat /tmp/pid)")
    assert sibling.ended().exit_code == 7
    for container in cri.agent.runtime.ListContainers(pb.ListContainersRequest()).containers:
        if container.pod_sandbox_id == pod.id:
            Container(pod, pb.ContainerConfig(), container.id).stop()
    pod.stop()
    pod.remove()


# ---- the process that holds the namespace ----


def init_of(pod: Pod) -> int:
    """Its pid on the node."""
    [init] = [
        int(path.name)
        for path in Path("/proc").glob("[0-9]*")
        if _read(path / "cmdline").startswith("pod\0") and pod.id in _read(path / "cgroup")
    ]
    return init


def test_the_pods_init_is_worth_nothing(cri: Cri) -> None:
    pod = cri.pod(linux=pod_options(pid=pb.POD))
    container = pod.run(linux=options(namespace_options=pb.NamespaceOption(pid=pb.POD)))
    init = Path(f"/proc/{init_of(pod)}")
    status = dict(line.split(":\t", 1) for line in _read(init / "status").splitlines())
    assert {
        name: int(status[name], 16) for name in status if name.startswith("Cap")
    } == dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0)
    assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
    assert set(status["Uid"].split()) == {"65534"}
    assert int(_read(init / "oom_score_adj")) <= 0
    assert os.listdir(init / "fd") == []
    groups = [line.split(":", 2)[2] for line in _read(init / "cgroup").splitlines()]
    assert all(pod.id in group for group in groups if group != "/")
    orphan = "(sleep 0 &); (setsid sh -c 'sleep 0; :' &); sleep 0.2; ps -o stat"
    assert "Z" not in container.shell(orphan)
    container.shell("kill -KILL 1; kill -TERM 1; kill -STOP 1; true")
    assert container.exec("true").exit_code == 0
    cgroups = [path for path in Path("/sys/fs/cgroup").glob(f"**/*{pod.id}*") if path.is_dir()]
    assert cgroups
    pod.remove()
    assert not [path for path in cgroups if path.exists()]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def test_a_pod_whose_init_has_died_is_not_ready(cri: Cri) -> None:
    """Nothing can run in it any more: its owner shall make another one."""
    pod = cri.pod(linux=pod_options(pid=pb.POD))
    namespace = pb.NamespaceOption(pid=pb.POD)
    container = pod.run(linux=options(namespace_options=namespace))
    os.kill(init_of(pod), signal.SIGKILL)
    wait_for("the news", lambda: pod.status.state == pb.SANDBOX_NOTREADY)
    assert container.ended().exit_code == 137
    pod.stop()
    pod.remove()


# ---- what a process that waits for its start has, and is a part of ----


def waiting_process(pod: Pod, container: Container) -> int:
    """The one of a container that was created, as the node sees it."""
    request = pb.ContainerStatusRequest(container_id=container.id, verbose=True)
    answer = pod.cri.agent.runtime.ContainerStatus(request, timeout=60)
    return int(json.loads(answer.info["info"])["pid"])


def test_nothing_that_is_open_leads_to_the_runtime(cri: Cri) -> None:
    """A socket would, by SO_PEERPIDFD, whoever takes it; and a process group by kill(2) of 0."""
    pod = cri.pod(linux=pod_options(pid=pb.POD))
    container = pod.container(linux=options(namespace_options=pb.NamespaceOption(pid=pb.POD)))
    pid = waiting_process(pod, container)
    links = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    assert {link.partition(":")[0] for link in links} == {"pipe", "/dev/null"}
    runtime = {os.getpgid(pod.supervisor), os.getsid(pod.supervisor)}
    assert runtime.isdisjoint((os.getpgid(pid), os.getsid(pid)))
    init = init_of(pod)
    assert os.getpgid(init) == os.getsid(init) == init
    assert os.getpgid(pod.supervisor) == pod.supervisor
    container.start()
    assert container.exec("true").exit_code == 0
    pod.remove()


def test_a_program_that_is_held_before_its_start_can_be_stopped(cri: Cri) -> None:
    pod = cri.pod(linux=pod_options(pid=pb.POD))
    container = pod.container(linux=options(namespace_options=pb.NamespaceOption(pid=pb.POD)))
    os.kill(waiting_process(pod, container), signal.SIGSTOP)
    request = pb.StartContainerRequest(container_id=container.id)
    start = cri.agent.runtime.StartContainer.future(request, timeout=60)
    wait_for("the start to be under way", lambda: not start.done())
    while not start.done():
        container.stop()
    assert container.status.state == EXITED
    pod.remove()


def once_execs_are_gone(
    pod: Pod, program: str, argument: str, image: pb.ImageSpec, linux: pb.LinuxContainerConfig
) -> Container:
    """The debug container, which is refused as long as execs that were killed wait for time to die in."""
    while True:
        try:
            return pod.run(program, argument, name="debug", image=image, linux=linux)
        except grpc.RpcError as error:
            if "of its execs are being started" not in str(error):
                raise


def test_execs_that_are_slow_to_die_when_a_debug_container_comes(
    cri: Cri, image: pb.ImageSpec, secret: Path
) -> None:
    """They get no processor time to prepare themselves, nor to die; nobody joins before they are gone."""
    pod = cri.pod(linux=pod_options(pid=pb.CONTAINER))
    filtered = profile("RuntimeDefault")
    spin = "for i in 1 2 3 4; do (while :; do :; done) & done; echo up; wait"
    target = pod.run("sh", "-c", spin, linux=options(**filtered))
    target.said("up")
    slow = pb.LinuxContainerResources(cpu_quota=1000, cpu_period=100_000)
    cri.agent.runtime.UpdateContainerResources(
        pb.UpdateContainerResourcesRequest(container_id=target.id, linux=slow)
    )
    request = pb.ExecSyncRequest(container_id=target.id, cmd=["true"], timeout=20)
    execs = [cri.agent.runtime.ExecSync.future(request) for _ in range(4)]
    joined = pb.NamespaceOption(pid=pb.TARGET, target_id=target.id)
    debug = options(namespace_options=joined, capabilities=TRACER, **filtered)
    watcher = Watcher(once_execs_are_gone(pod, "/bin/watcher", str(secret), image, debug))
    for call in execs:
        with suppress(grpc.RpcError):
            call.result()
    for seen in watcher.seen():
        assert (seen.permitted & ~DEFAULT, seen.seccomp) == (0, 2), seen
    pod.remove()


# ---- profiles that allow no hiding ----


def test_a_profile_that_only_pretends_to_drop_capabilities(cri: Cri, tmp_path: Path) -> None:
    """It answers capset(2) with success where there is an argument at all."""
    condition = {"index": 0, "value": 0, "op": "SCMP_CMP_NE"}
    entry = {"names": ["capset"], "action": "SCMP_ACT_ERRNO", "errnoRet": 0, "args": [condition]}
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [entry]}))
    pod = cri.pod(linux=pod_options(pid=pb.POD))
    fields = profile("Localhost", str(path))
    shared = options(namespace_options=pb.NamespaceOption(pid=pb.POD), **fields)
    refused(PRECONDITION, "forbids capset", lambda: pod.container(*SLEEP, linux=shared))
    pod.remove()


@pytest.mark.parametrize("call", ["clone", "setsid", "capset"])
def test_a_profile_that_forbids_the_last_steps_is_refused(
    cri: Cri, tmp_path: Path, call: str
) -> None:
    """Never started unfiltered; in a namespace of its own it has all that it needs."""
    names = [name for name in NARROW if name != call]
    text = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [{"names": names, "action": "SCMP_ACT_ALLOW"}],
    }
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(text))
    fields = profile("Localhost", str(path))
    pod = cri.pod(linux=pod_options(pid=pb.POD))
    shared = options(namespace_options=pb.NamespaceOption(pid=pb.POD), **fields)
    refused(PRECONDITION, f"forbids {call}", lambda: pod.container(*SLEEP, linux=shared))
    own = options(namespace_options=pb.NamespaceOption(pid=pb.CONTAINER), **fields)
    container = pod.run(*SLEEP, name="own", linux=own)
    assert container.exec("true").exit_code == 0
    tracer = options(
        namespace_options=pb.NamespaceOption(pid=pb.CONTAINER), capabilities=TRACER, **fields
    )
    container = pod.run(*SLEEP, name="tracer", linux=tracer)
    refused(PRECONDITION, f"forbids {call}", lambda: container.exec("true"))
    pod.remove()
