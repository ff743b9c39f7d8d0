"""The default AppArmor profile, as root with every capability meets it in a container, and as it comes and goes.

It is loaded into the kernel that all of this machine share: only in a guest.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from nodeagent.lifecycle.plan import apparmor
from tests.conformance.apparmor import put_in_path
from tests.e2e.conftest import client, running_agent
from tests.e2e.test_user_namespaces import user_namespace
from tests.support.cri import Cri, options, pod_options, refused
from tests.support.registry import Registry

PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
CONFINED = f"{apparmor.NAME} (enforce)"
UNCONFINED = "unconfined"
DEFAULT = pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)
NONE = pb.SecurityProfile(profile_type=pb.SecurityProfile.Unconfined)
LOCALHOST = pb.SecurityProfile(
    profile_type=pb.SecurityProfile.Localhost, localhost_ref=f"localhost/{apparmor.NAME}"
)
ALL = pb.Capability(add_capabilities=["ALL"])
CURRENT = "cat /proc/self/attr/current"


class Parser:
    """AppArmor's parser, as the agent finds it in its path. log: a line for each time that it was started."""

    def __init__(self, folder: Path, real: Path) -> None:
        self.log = folder / "log"
        self.log.touch()
        self._program = folder / "bin/apparmor_parser"
        self._program.parent.mkdir()
        self._script = f'echo "$@" >> {self.log}; exec {real} "$@"'
        self.mend()

    def mend(self) -> None:
        self._become(self._script)

    def damage(self) -> None:
        self._become("echo no such feature >&2; exit 1")

    def remove(self) -> None:
        self._program.unlink()

    def _become(self, script: str) -> None:
        self._program.write_text(f"#!/bin/sh\n{script}\n")
        self._program.chmod(0o755)


def unload() -> None:
    if apparmor.is_loaded(apparmor.NAME):
        subprocess.run(["apparmor_parser", "-R"], input=apparmor.text(), text=True, check=True)


@pytest.fixture(scope="module")
def parser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parser]:
    if "NODEAGENT_GUEST" not in os.environ or not apparmor.is_enabled():
        pytest.skip("no guest with AppArmor")
    folder, path = tmp_path_factory.mktemp("apparmor"), os.environ["PATH"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path)
        put_in_path(folder / "real")
        patch.setenv("PATH", f"{folder}/bin:{path}")
        yield Parser(folder, folder / "real/apparmor_parser")
        unload()


@pytest.fixture(scope="module")
def cri(
    parser: Parser, tmp_path_factory: pytest.TempPathFactory, registry: Registry
) -> Iterator[Cri]:
    with running_agent(tmp_path_factory, registry) as agent:
        assert len(parser.log.read_text().splitlines()) == 1
        yield client(agent, registry)


@pytest.mark.parametrize("added", [[], ["SYS_PTRACE"]], ids=["plain", "tracer"])
@pytest.mark.parametrize("no_new_privs", [False, True])
@pytest.mark.parametrize("asked", [None, DEFAULT], ids=["unset", "RuntimeDefault"])
def test_the_program_and_its_execs_are_confined(
    cri: Cri, asked: pb.SecurityProfile | None, no_new_privs: bool, added: list[str]
) -> None:
    linux = options(
        apparmor=asked,
        no_new_privs=no_new_privs,
        capabilities=pb.Capability(add_capabilities=added),
    )
    container = cri.run("sh", "-c", f"{CURRENT}; exec sleep 1000", linux=linux)
    container.said(CONFINED)
    assert container.shell(CURRENT) == CONFINED
    container.pod.remove()


def test_root_of_a_user_namespace_is_confined_as_well(cri: Cri) -> None:
    space = pb.NamespaceOption(pid=pb.CONTAINER, userns_options=user_namespace())
    pod = cri.pod(linux=pod_options(pid=pb.CONTAINER, userns_options=user_namespace()))
    container = pod.run(linux=options(namespace_options=space))
    assert container.shell(CURRENT) == CONFINED
    pod.remove()


@pytest.mark.parametrize(
    ("privileged", "asked", "label"),
    [
        (False, NONE, UNCONFINED),
        (True, None, UNCONFINED),
        (True, DEFAULT, UNCONFINED),
        (True, LOCALHOST, CONFINED),
        (False, LOCALHOST, CONFINED),
    ],
)
def test_who_asks_for_something_else_gets_it(
    cri: Cri, privileged: bool, asked: pb.SecurityProfile | None, label: str
) -> None:
    context = pb.LinuxSandboxSecurityContext(privileged=privileged)
    pod = cri.pod(linux=pb.LinuxPodSandboxConfig(security_context=context))
    container = pod.run(linux=options(privileged=privileged, apparmor=asked))
    assert container.shell(CURRENT) == label
    pod.remove()


# Each is done by root with all capabilities, without a filter, without masks: nothing else stands in the way.
FORBIDDEN = {
    "mount": "mount -t tmpfs none /mnt",
    "bind": "mount --bind /etc /mnt",
    "remount": "mount -o remount,rw /sys",
    "move": "mount --move /dev/shm /mnt",
    "virtual memory": "cat /proc/sys/vm/swappiness > /proc/sys/vm/swappiness",
    "sysctl of the kernel": "echo core > /proc/sys/kernel/core_pattern",
    "network": "cat /proc/sys/net/ipv4/ip_forward > /proc/sys/net/ipv4/ip_forward",
    "user": "cat /proc/sys/user/max_user_namespaces > /proc/sys/user/max_user_namespaces",
    "sysrq": "echo h > /proc/sysrq-trigger",
    "file of /proc": ": >> /proc/timer_list",
    "module": "p=/sys/module/printk/parameters/time; cat $p > $p",
    "security": "ls /sys/kernel/security/apparmor",
    "memory of the kernel": "head -c 1 /proc/kcore",
    "profile": "echo 'changeprofile unconfined' > /proc/self/attr/current",
    "profile of the next program": "echo 'exec unconfined' > /proc/self/attr/exec",
}
ALLOWED = {
    "shared memory": "cat /proc/sys/kernel/shmmax > /proc/sys/kernel/shmmax",
    "itself": "cat /proc/self/oom_score_adj > /proc/self/oom_score_adj",
    "name of a thread": "echo x > /proc/self/comm",
    "files": "mkdir /mnt/d && ln -s d /mnt/l && echo x > /mnt/d/f && chown 1 /mnt/d/f && rm -r /mnt/d /mnt/l",
    "sockets": "ping -c 1 127.0.0.1",
    "signals": "sleep 1000 & kill $!",
    "exec": "cp /bin/busybox /tmp/true && /tmp/true",
    "looking": "sleep 1000 & cat /proc/$!/environ && readlink /proc/$!/exe && true < /proc/$!/mem",
}


def attempt(command: str) -> str:
    return f"if ({command}) > /dev/null 2> /tmp/why; then echo done; else cat /tmp/why; fi"


@pytest.mark.parametrize("asked", [None, NONE], ids=["confined", "unconfined"])
def test_what_root_with_all_capabilities_can_do(cri: Cri, asked: pb.SecurityProfile | None) -> None:
    """Without the profile, all of it."""
    container = cri.run(
        linux=options(capabilities=ALL, apparmor=asked),
        mounts=[pb.Mount(host_path="/sys", container_path="/sys")],
    )
    container.shell("mkdir -p /mnt")
    ended = {name: container.shell(attempt(text)) for name, text in (FORBIDDEN | ALLOWED).items()}
    done = {name for name, text in ended.items() if text == "done"}
    assert done == (set(ALLOWED) if asked is None else ended.keys()), ended
    container.pod.remove()


# Done by root, with the capabilities that it takes, to a process of another container in a shared PID namespace.
TO_OTHERS = ("cat /proc/{}/environ", "readlink /proc/{}/exe", "true < /proc/{}/mem", "kill {}")


@pytest.mark.parametrize("asked", [None, NONE], ids=["confined", "unconfined"])
def test_processes_of_others(cri: Cri, asked: pb.SecurityProfile | None) -> None:
    """Those of the same profile can be looked at and killed; of unconfined ones it is only seen that they are there."""
    pod = cri.pod(linux=pod_options(pid=pb.POD))
    other = pod.run("sh", "-c", "echo $$; exec sleep 1000", linux=options(apparmor=asked), name="o")
    other.said("")
    added = pb.Capability(add_capabilities=["KILL", "SYS_PTRACE"])
    container = pod.run(linux=options(capabilities=added))
    codes = [
        container.exec("sh", "-c", f"kill -0 {other.output} && {command.format(other.output)}")
        for command in TO_OTHERS
    ]
    expected = [0] * len(TO_OTHERS) if asked is None else [1] * len(TO_OTHERS)
    assert [code.exit_code for code in codes] == expected, codes
    pod.remove()


def test_the_agent_s_signals_arrive(cri: Cri) -> None:
    container = cri.run("sh", "-c", "trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done")
    container.said("up")
    container.stop(timeout=20)
    assert container.status.exit_code == 3
    container.pod.remove()


def test_a_restart_does_not_load_it_again(cri: Cri, parser: Parser) -> None:
    before = parser.log.read_text()
    cri.agent.restart()
    assert parser.log.read_text() == before
    container = cri.run()
    assert container.shell(CURRENT) == CONFINED
    container.pod.remove()


def test_it_is_loaded_again_when_somebody_has_unloaded_it(cri: Cri) -> None:
    unload()
    container = cri.run()
    assert container.shell(CURRENT) == CONFINED
    container.pod.remove()


@pytest.mark.parametrize("asked", [None, DEFAULT], ids=["unset", "RuntimeDefault"])
def test_nobody_runs_without_it_where_loading_fails(
    cri: Cri, parser: Parser, asked: pb.SecurityProfile | None
) -> None:
    unload()
    pod = cri.pod()
    parser.damage()
    refused(PRECONDITION, "no such feature", lambda: pod.container(linux=options(apparmor=asked)))
    parser.mend()
    pod.remove()


def test_without_a_parser_only_who_asks_for_it_is_refused(cri: Cri, parser: Parser) -> None:
    unload()
    pod = cri.pod()
    parser.remove()
    container = pod.run()
    assert container.shell(CURRENT) == UNCONFINED
    refused(
        PRECONDITION,
        "apparmor_parser is not installed",
        lambda: pod.container(name="other", linux=options(apparmor=DEFAULT)),
    )
    parser.mend()
    pod.remove()
