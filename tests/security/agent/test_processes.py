"""Processes that attack from inside a running container: its runtime, its cgroup, its own end."""

import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.security.agent.conftest import PullHostile, attempted
from tests.support import images, tars
from tests.support.cri import SLEEP, Container, Cri, options, pod_options, refused
from tests.support.node import wait_for

INVALID = grpc.StatusCode.INVALID_ARGUMENT
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
MEBIBYTE = 1 << 20
EXECS = 10


def peak_bytes(pid: int) -> int:
    """The highest resident size of a process since `reset_peak`."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def reset_peak(pid: int) -> int:
    """Its resident size now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak_bytes(pid)


# ---- the runtime's own program ----

# Overwrite the executable of whatever is not the container's, as long as it is looked at.
OVERWRITE = """
echo up
while :; do
    for process in /proc/[0-9]*; do
        case $(readlink $process/exe) in
            /bin/*|"") ;;
            *) echo "seen $(readlink $process/exe)"; echo x >> $process/exe && echo overwritten ;;
        esac
    done
done 2> /dev/null
"""


@pytest.mark.parametrize("added", [[], ["SYS_PTRACE"]], ids=["default", "tracer"])
@pytest.mark.parametrize("pid", [pb.CONTAINER, pb.POD], ids=["own", "shared"])
def test_cve_2019_5736_the_program_of_the_runtime(
    cri: Cri, pid: pb.NamespaceMode, added: list[str]
) -> None:
    interpreter = Path(os.path.realpath(sys.executable))
    before = hashlib.sha256(interpreter.read_bytes()).digest()
    pod = cri.pod(linux=pod_options(pid=pid))
    linux = options(
        namespace_options=pb.NamespaceOption(pid=pid),
        capabilities=pb.Capability(add_capabilities=added),
    )
    attacker = pod.run("sh", "-c", OVERWRITE, linux=linux)
    attacker.said("up")
    for _ in range(EXECS):
        attempted(lambda: attacker.exec("/proc/self/exe", "-c", "0"))
        assert attacker.exec("true").exit_code == 0
    attempted(pod.container("/proc/self/exe", "-c", "0", name="entrypoint", linux=linux).start)
    if added and pid == pb.POD:
        attacker.said("seen /memfd:nodeagent")
    assert "overwritten" not in attacker.output
    assert hashlib.sha256(interpreter.read_bytes()).digest() == before
    assert pod.run(*SLEEP, name="later").exec("true").exit_code == 0
    pod.remove()


def test_cve_2024_21626_no_descriptor_is_left_open(cri: Cri, outside: Path) -> None:
    script = f"""
    ls /proc/self/fd
    for fd in /proc/self/fd/* /proc/1/fd/*; do
        for up in . ../../../../../../..; do cat $fd/$up{outside}/precious; done
    done 2> /dev/null
    """
    container = cri.run("sh", "-c", f"{script} echo up; exec sleep 1000")
    container.said("up")
    assert container.output.split() == ["0", "1", "2", "3", "up"]
    assert container.shell(f"{script} true").split() == ["0", "1", "2", "3"]
    container.pod.remove()


def test_cve_2024_21626_working_directory_of_an_exec(cri: Cri, volume: Path) -> None:
    """It becomes, while the container runs, a link to a descriptor of whoever enters it."""
    (volume / "work").mkdir()
    mount = pb.Mount(host_path=str(volume), container_path="/v")
    container = cri.run(mounts=[mount], working_dir="/v/work")
    (volume / "work").rmdir()
    for number in range(24):
        (volume / "next").symlink_to(f"/proc/self/fd/{number}")
        (volume / "next").rename(volume / "work")
        refused(PRECONDITION, 'working directory "/v/work"', lambda: container.exec("pwd"))
    container.pod.remove()


# ---- what is read of the container's files ----

PASSWD = {
    "fifo": ("mkfifo /etc/passwd", "not a regular file"),
    "directory": ("mkdir /etc/passwd", "not a regular file"),
    "device": ("mknod /etc/passwd c 1 5", "not a regular file"),
    "huge": ("truncate -s 1G /etc/passwd", "larger than"),
    "loop": ("ln -s passwd /etc/passwd", "symbolic links"),
    "descriptor": ("ln -s /proc/self/fd/0 /etc/passwd", "symbolic links"),
    "file of the host": ("ln -s ../../../../../../..{outside}/precious /etc/passwd", ""),
}


@pytest.mark.parametrize("kind", PASSWD)
def test_a_passwd_that_an_exec_would_hang_on(cri: Cri, outside: Path, kind: str) -> None:
    script, text = PASSWD[kind]
    script = f"rm /etc/passwd; {script.format(outside=outside)}; echo up; exec sleep 1000"
    pod = cri.pod(linux=pod_options(pid=pb.CONTAINER))  # from where an exec sees its own /proc/self
    own = options(namespace_options=pb.NamespaceOption(pid=pb.CONTAINER))
    container = pod.run("sh", "-c", script, linux=own)
    container.said("up")
    if text:
        refused(INVALID, text, lambda: container.exec("true"))
    else:
        assert container.exec("true").exit_code == 0
    container.pod.remove()


# ---- code of the container's files ----

LIBRARIES = ("libnss_files.so.2", "libnss_evil.so.2", "libseccomp.so.2", "evil.so")
TRAP = r"""
#include <fcntl.h>
__attribute__((constructor)) static void trap(void) { open("/tmp/trapped", O_CREAT, 0600); }
"""


def traps() -> list[tars.Member]:
    """Modules and libraries that leave the file /tmp/trapped when loaded, wherever they could be looked for."""
    script = b"open('/tmp/trapped', 'w').close()"
    modules = ("sitecustomize", "encodings/__init__", "encodings/idna", "traceback", "pwd", "json")
    places = {place.strip("/") for place in (*sys.path, sys.base_prefix, "usr/lib/python3")}
    members = [
        tars.file(f"{place}/{module}.py".lstrip("/"), script)
        for place in sorted(places)
        for module in modules
    ]
    library = images.compiled(TRAP, "-shared -fPIC")
    folder = f"lib/{os.uname().machine}-linux-gnu"
    members += [tars.file(f"{folder}/{name}", library, mode=0o755) for name in LIBRARIES]
    members.append(tars.file("etc/nsswitch.conf", b"passwd: evil files\ngroup: evil files\n"))
    members.append(tars.file("etc/ld.so.preload", f"/{folder}/evil.so\n".encode()))
    return members


def test_nothing_of_the_image_is_loaded_by_the_runtime(cri: Cri, hostile: PullHostile) -> None:
    """Only by what the container executes itself, if that is no static program."""
    as_mail = options(run_as_username="mail", supplemental_groups=[33])
    pod = cri.pod()
    container = pod.run(image=hostile(*traps()), linux=as_mail)
    trapped = cri.agent.root / "lib/containers" / container.id / "upper/tmp/trapped"
    assert container.exec("id", "-un").stdout == b"mail\n"
    assert attempted(lambda: container.exec("/absent"))
    assert not trapped.exists()
    container.exec("/bin/sh", "-c", "true")
    assert trapped.exists()
    pod.remove()


# ---- memory ----


def test_cve_2022_1708_and_31030_output_without_end(cri: Cri) -> None:
    container = cri.run()
    before = reset_peak(cri.agent.pid)
    endless = partial(container.exec, "sh", "-c", "cat /dev/zero >&2 & cat /dev/zero", timeout=1)
    refused(grpc.StatusCode.DEADLINE_EXCEEDED, container.id, endless)
    cut = container.exec("sh", "-c", "head -c 20000000 /dev/zero >&2; head -c 20000000 /dev/zero")
    assert 15 * MEBIBYTE < len(cut.stdout) + len(cut.stderr) <= 16 * MEBIBYTE
    assert peak_bytes(cri.agent.pid) - before < 200 * MEBIBYTE
    container.pod.remove()


def test_a_log_line_without_end(cri: Cri) -> None:
    container = cri.pod().container("sh", "-c", "head -c 50000000 /dev/zero | tr '\\0' x")
    request = pb.PodSandboxStatusRequest(pod_sandbox_id=container.pod.id, verbose=True)
    info = cri.agent.runtime.PodSandboxStatus(request, timeout=60).info["info"]
    supervisor = json.loads(info)["pid"]
    before = reset_peak(supervisor)
    container.start()
    container.ended()
    assert container.log.stat().st_size > 50_000_000
    assert peak_bytes(supervisor) - before < 16 * MEBIBYTE
    container.pod.remove()


# ---- cgroups, and the end ----

JOIN_OTHERS = """
{
    for file in /sys/fs/cgroup/tasks /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/*/tasks; do
        echo 0 > $file && echo "wrote $file"
    done
    for mount in /sys/fs/cgroup /sys/fs/cgroup/*; do
        mount -o remount,rw $mount && echo "remounted $mount"
        umount $mount && echo "unmounted $mount"
        mkdir $mount/new && echo "made $mount/new"
    done
    mount -t cgroup2 none /tmp && echo "mounted cgroup2"
    mount -t cgroup -o memory none /tmp && echo "mounted memory"
    unshare -rm mount -o remount,rw /sys/fs/cgroup && echo "remounted as another"
    unshare -rm umount /proc/sys && echo "unmounted as another"
} 2> /dev/null
"""


def test_no_way_out_of_the_cgroup(cri: Cri) -> None:
    container = cri.run(linux=options(readonly_paths=["/proc/sys"]))
    groups = "sed s/exec-.*// /proc/self/cgroup; readlink /proc/self/ns/cgroup"
    before = container.shell(groups)
    assert container.shell(f"{JOIN_OTHERS} true") == ""
    assert container.shell(groups) == before
    container.pod.remove()


FREEZE = """
cd /sys/fs/cgroup
[ ! -d freezer ] || cd freezer
mkdir below
sleep 1000 & echo $! > {group}/cgroup.procs
echo up
if [ -f {group}/freezer.state ]; then echo FROZEN > {group}/freezer.state
else echo 1 > {group}/cgroup.freeze; fi
exec sleep 1000
"""
STUBBORN = {
    "ignores signals": "trap '' TERM HUP INT; echo up; while :; do sleep 1; done",
    "daemons": """
        for i in 1 2 3; do (setsid sh -c "trap '' TERM HUP; sleep 1000 & sleep 1000; :" &); done
        echo up; exec sleep 1000""",
    "stopped": "sleep 1000 & kill -STOP $!; echo up; kill -STOP $$; sleep 1000",
    "fills its log": "exec yes",
    "forks": "bomb() { bomb | bomb & }; (bomb); echo up; exec sleep 1000",
}
FROZEN = {"frozen": FREEZE.format(group="."), "in part": FREEZE.format(group="below")}


def left_of(mark: str) -> list[int]:
    """The processes that have `mark` in their environment, zombies not counted."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"MARK={mark}\0".encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def cgroups_of(container: Container) -> list[Path]:
    return [path for path in Path("/sys/fs/cgroup").glob(f"**/{container.id}") if path.is_dir()]


def gone_after_stop(container: Container, mark: str, timeout: int = 0) -> None:
    container.start()
    wait_for("its output", lambda: container.log.exists() and container.log.stat().st_size > 0)
    assert left_of(mark)
    container.stop(timeout)
    wait_for("the end of all", lambda: not left_of(mark))
    container.remove()
    assert cgroups_of(container) == []
    container.pod.remove()


@pytest.mark.parametrize("pid", [pb.CONTAINER, pb.POD], ids=["own", "shared"])
@pytest.mark.parametrize("kind", STUBBORN)
def test_nothing_outlives_a_stop(
    cri: Cri, tmp_path: Path, kind: str, pid: pb.NamespaceMode
) -> None:
    mark = str(tmp_path)
    container = cri.pod(linux=pod_options(pid=pid)).container(
        "sh",
        "-c",
        STUBBORN[kind],
        envs=[pb.KeyValue(key="MARK", value=mark.encode())],
        linux=options(namespace_options=pb.NamespaceOption(pid=pid)),
    )
    for group in cgroups_of(container):
        if (group / "pids.max").exists():
            (group / "pids.max").write_text("40")
    gone_after_stop(container, mark, timeout=1 if kind == "ignores signals" else 0)


@pytest.mark.parametrize("kind", FROZEN)
def test_who_freezes_itself_can_be_stopped(cri: Cri, tmp_path: Path, kind: str) -> None:
    mark = str(tmp_path)
    linux = pod_options(pid=pb.CONTAINER)
    linux.security_context.privileged = True
    container = cri.pod(linux=linux).container(
        "sh",
        "-c",
        FROZEN[kind],
        envs=[pb.KeyValue(key="MARK", value=mark.encode())],
        linux=options(privileged=True),
    )
    gone_after_stop(container, mark)


# Traces a process, and never waits for it.
HOLDER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    printf("seize %ld\n", ptrace(PTRACE_SEIZE, atoi(argv[1]), 0, 0));
    fflush(stdout);
    for (;;) pause();
}
"""


def test_a_tracer_that_keeps_a_dead_process(cri: Cri, hostile: PullHostile) -> None:
    """The kernel tells nobody else of that end: the tracer is named, and the pod can be stopped."""
    pod = cri.pod(linux=pod_options(pid=pb.CONTAINER))
    target = pod.run("sleep", "1000")
    joined = pb.NamespaceOption(pid=pb.TARGET, target_id=target.id)
    victim = pod.run(
        "tail", "-f", "/dev/null", name="victim", linux=options(namespace_options=joined)
    )
    tracer = pod.run(
        "/bin/hold",
        target.shell("pidof tail"),
        name="debug",
        image=hostile(tars.file("bin/hold", images.compiled(HOLDER), mode=0o755)),
        linux=options(
            namespace_options=joined,
            capabilities=pb.Capability(add_capabilities=["SYS_PTRACE"]),
        ),
    )
    tracer.said("seize 0")
    request = pb.ContainerStatusRequest(container_id=tracer.id, verbose=True)
    pid = json.loads(cri.agent.runtime.ContainerStatus(request).info["info"])["pid"]
    refused(grpc.StatusCode.DEADLINE_EXCEEDED, f"end process {pid} first", victim.stop)
    pod.remove()


def test_what_an_exec_leaves_behind(cri: Cri, tmp_path: Path) -> None:
    """It goes with the container, also where the PID namespace is the pod's."""
    mark = str(tmp_path)
    container = cri.pod(linux=pod_options(pid=pb.POD)).run(
        linux=options(namespace_options=pb.NamespaceOption(pid=pb.POD))
    )
    container.shell(f"MARK={mark} setsid sh -c 'trap \"\" TERM; sleep 1000; :' > /dev/null 2>&1 &")
    wait_for("the daemon", lambda: len(left_of(mark)) == 2)
    container.stop(timeout=0)
    wait_for("its end", lambda: not left_of(mark))
    container.pod.remove()
