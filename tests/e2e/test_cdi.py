"""Devices of CDI specifications, with the hooks that NVIDIA's toolkit writes, on an agent that has them as files."""

import json
import os
import stat
import textwrap
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.e2e.conftest import client, running_agent
from tests.e2e.test_user_namespaces import user_namespace
from tests.support.cri import Cri, Pod, options, pod_options, refused
from tests.support.node import RunningAgent, wait_for
from tests.support.registry import Registry

FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
NVIDIA = "nvidia.com/gpu=0"

# What the hooks of the real one do: find the root file system by the bundle of the state, and work in it.
NVIDIA_CTK = r"""#!/bin/sh
set -eu
here={directory}
state=$(cat)
bundle=$(printf %s "$state" | sed -n 's/.*"bundle": *"\([^"]*\)".*/\1/p')
root=$(sed -n 's/.*"root": *{{"path": *"\([^"]*\)".*/\1/p' "$bundle/config.json")
verb=$1
shift
test "$verb" != hook || {{ verb=$1; shift; }}
case $verb in
create-symlinks)
    while [ $# -gt 1 ]; do
        target=${{2%%::*}} link=${{2#*::}}
        mkdir -p "$root${{link%/*}}"
        ln -sfn "$target" "$root$link"
        shift 2
    done ;;
update-ldcache)
    exec unshare -m -p -f sh -euc '
        mount --make-rslave /
        cd "$1"
        pivot_root . .
        exec chroot . /bin/sh -euc "mkdir -p /etc; ls $3 > /etc/ld.so.cache"' sh "$root" "$@" ;;
chmod)
    chmod "$2" "$root$4" ;;
mount)
    mkdir -p "$root/run/hook"
    mount -t tmpfs hook "$root/run/hook"
    echo mounted > "$root/run/hook/file" ;;
facts)
    name=$1
    {{
        echo "state $state"
        echo "env $(env | tr '\n' '|')"
        echo "cwd $(readlink /proc/self/cwd)"
        for kind in mnt pid net ipc uts cgroup user; do
            echo "$kind $(readlink /proc/self/ns/$kind)"
        done
        echo "groups $(cut -d: -f3 /proc/self/cgroup | sort -u | tr '\n' ' ')"
        echo "caps $(sed -n 's/^CapEff:\t//p' /proc/self/status)"
        echo "pid $(sed -n 's/^NSpid:\t//p' /proc/self/status)"
        echo "fds $(ls /proc/self/fd | tr '\n' ' ')"
        echo "root $(ls "$root" 2>&1 | tr '\n' ' ')"
    }} > "$here/$name.new"
    mv "$here/$name.new" "$here/$name" ;;
log)
    echo "$1" >> "$here/log" ;;
fail)
    echo "$1" >&2
    exit 3 ;;
hang)
    sleep 4321 &
    echo $$ >> "$here/hanging"
    sleep 4321 ;;
leave)
    setsid sleep 4321 &
    echo left > "$here/left" ;;
wait)
    echo began >> "$here/log"
    while ! test -e "$here/$1"; do sleep 0.05; done
    echo ended >> "$here/log" ;;
write)
    echo x > "$1" ;;
flood)
    while :; do echo flooooooooooooooooooooooooooooooooooooooooooooooooooooooooood; done ;;
esac
"""


class Node:
    """A directory with specifications and the fake program, and an agent that knows both."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.specs = directory / "cdi"
        self.specs.mkdir()
        self.out = directory / "out"
        self.out.mkdir()
        self.out.chmod(0o1777)  # hooks in a user namespace write there as well
        # What is above it is not above the specifications.
        self.program = directory / "bin/nvidia-ctk"
        self.program.parent.mkdir()
        self.program.write_text(NVIDIA_CTK.format(directory=self.out))
        self.program.chmod(0o755)
        self.cri: Cri

    @property
    def config(self) -> str:
        return textwrap.dedent(f"""
            [cdi]
            directories = ["{self.specs}"]
            hook_programs = ["{self.program}", "/bin/hook", "/bin/true"]
            hook_timeout_seconds = 60
        """)

    def spec(self, *hooks: dict[str, Any], **edits: Any) -> pb.CDIDevice:
        """A device of its own."""
        name = f"d{len(list(self.specs.iterdir()))}"
        document = {
            "cdiVersion": "0.6.0",
            "kind": "test.com/hook",
            "devices": [{"name": name, "containerEdits": {"hooks": hooks, **edits}}],
        }
        path = self.specs / f"{name}.json"
        path.write_text(json.dumps(document))
        path.chmod(0o644)
        return pb.CDIDevice(name=f"test.com/hook={name}")

    def hook(self, stage: str, *arguments: str, **fields: Any) -> dict[str, Any]:
        path = str(self.program)
        return {"hookName": stage, "path": path, "args": ["nvidia-ctk", *arguments], **fields}

    def facts(self, name: str) -> dict[str, str]:
        lines = (self.out / name).read_text().splitlines()
        return {key: value for key, _, value in (line.partition(" ") for line in lines)}

    @property
    def log(self) -> list[str]:
        path = self.out / "log"
        return path.read_text().split() if path.exists() else []


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Below no directory that others than root can change, as /tmp is."""
    path = Path(f"/var/lib/na-test-{os.getpid()}")
    path.mkdir(mode=0o755)
    yield path
    for directory, names, files in os.walk(path, topdown=False):
        for name in files:
            os.unlink(f"{directory}/{name}")
        for name in names:
            os.rmdir(f"{directory}/{name}")
    path.rmdir()


@pytest.fixture(scope="module")
def agent_of_node(
    place: Path, tmp_path_factory: pytest.TempPathFactory, registry: Registry
) -> Iterator[Node]:
    node = Node(place)
    with running_agent(tmp_path_factory, registry, node.config) as running:
        node.cri = client(running, registry)
        yield node


@pytest.fixture
def node(agent_of_node: Node) -> Node:
    for path in agent_of_node.out.iterdir():
        path.unlink()
    return agent_of_node


def generated(node: Node, version: str, libraries: Path) -> str:
    """In the shape that `nvidia-ctk cdi generate` has, with harmless devices."""
    return f"""---
cdiVersion: {version}
kind: nvidia.com/gpu
devices:
    - name: "0"
      containerEdits:
        deviceNodes:
            - path: /dev/nvidia0
              hostPath: /dev/zero
            - path: /dev/dri/card1
              hostPath: /dev/null
              permissions: rw
        hooks:
            - hookName: createContainer
              path: {node.program}
              args:
                - nvidia-ctk
                - hook
                - chmod
                - --mode
                - "755"
                - --path
                - /usr/lib/gpu
containerEdits:
    env:
        - NVIDIA_VISIBLE_DEVICES=void
    deviceNodes:
        - path: /dev/nvidiactl
          type: c
          major: 1
          minor: 3
    hooks:
        - hookName: createContainer
          path: {node.program}
          args:
            - nvidia-cdi-hook
            - create-symlinks
            - --link
            - libcuda.so.550.1::/usr/lib/gpu/libcuda.so.1
            - --link
            - libcuda.so.1::/usr/lib/gpu/libcuda.so
          env:
            - NVIDIA_CTK_DEBUG=false
        - hookName: createContainer
          path: {node.program}
          args:
            - nvidia-cdi-hook
            - update-ldcache
            - --folder
            - /usr/lib/gpu
    mounts:
        - hostPath: {libraries}/libcuda.so.550.1
          containerPath: /usr/lib/gpu/libcuda.so.550.1
          options:
            - ro
            - nosuid
            - nodev
            - rbind
            - rprivate
"""


@pytest.mark.parametrize("version", ["0.5.0", "0.7.0", "1.1.0"])
@pytest.mark.parametrize("kind", ["plain", "shared", "readonly", "userns"])
def test_as_nvidias_toolkit_writes_it(node: Node, tmp_path: Path, version: str, kind: str) -> None:
    (tmp_path / "libcuda.so.550.1").write_text("library")
    (node.specs / "nvidia.yaml").write_text(generated(node, version, tmp_path))
    (node.specs / "nvidia.yaml").chmod(0o644)
    if kind == "userns":
        mode = pb.NamespaceOption(pid=pb.CONTAINER, userns_options=user_namespace())
        pod = node.cri.pod(linux=pod_options(pid=mode.pid, userns_options=mode.userns_options))
        linux = options(namespace_options=mode)
    elif kind == "shared":
        pod = node.cri.pod(linux=pod_options(pid=pb.POD))
        linux = options(namespace_options=pb.NamespaceOption(pid=pb.POD))
    else:
        pod = node.cri.pod(linux=pod_options(pid=pb.CONTAINER))
        mode = pb.NamespaceOption(pid=pb.CONTAINER)
        linux = options(namespace_options=mode, readonly_rootfs=kind == "readonly")
    container = pod.run(
        CDI_devices=[pb.CDIDevice(name=NVIDIA)],
        annotations={"cdi.k8s.io/device-plugin_1": NVIDIA},
        linux=linux,
    )
    assert container.shell("head -c 2 /dev/nvidia0 | od -An -tx1") == "00 00"
    assert container.shell("stat -c '%t %T' /dev/nvidiactl /dev/dri/card1") == "1 3\n1 3"
    assert container.shell("cat /usr/lib/gpu/libcuda.so") == "library"
    assert container.shell("cat /etc/ld.so.cache").split() == [
        "libcuda.so",
        "libcuda.so.1",
        "libcuda.so.550.1",
    ]
    assert container.shell("stat -c '%a %u' /usr/lib/gpu /etc/ld.so.cache") == "755 0\n644 0"
    assert "(ro,nosuid,nodev" in container.shell("mount | grep libcuda")
    assert container.shell("echo $NVIDIA_VISIBLE_DEVICES") == "void"
    assert len(container.shell("mount | grep libcuda").splitlines()) == 1
    assert container.shell("mount | grep -c nodeagent || :") == "0"
    pod.remove()
    (node.specs / "nvidia.yaml").unlink()


# ---- where hooks run, and what they see ----


def namespaces(pid: int | str) -> dict[str, str]:
    kinds = ("mnt", "pid", "net", "ipc", "uts", "cgroup", "user")
    return {kind: os.readlink(f"/proc/{pid}/ns/{kind}") for kind in kinds}


@pytest.mark.parametrize("shared", [False, True])
def test_order_state_and_namespaces(node: Node, shared: bool) -> None:
    stages = ["prestart", "createRuntime", "createContainer", "poststart", "poststop"]
    hooks = [
        hook
        for stage in reversed(stages)
        for hook in (
            node.hook(stage, "facts", stage, env=[f"STAGE={stage}", "A=b c"]),
            node.hook(stage, "log", stage),
        )
    ]
    device = node.spec(*hooks)
    pod = node.cri.pod(linux=pod_options(pid=pb.POD if shared else pb.CONTAINER))
    mode = pb.NamespaceOption(pid=pb.POD if shared else pb.CONTAINER)
    linux = options(namespace_options=mode)
    secret = pb.KeyValue(key="LD_PRELOAD", value=b"/secret.so")
    container = pod.container(
        CDI_devices=[device], annotations={"a": "b"}, linux=linux, envs=[secret]
    )
    assert node.log == stages[:3]
    container.start()
    assert node.log == stages[:4]
    container.stop()
    wait_for("poststop", lambda: node.log == stages)
    states = {}
    ours = namespaces("self")
    for stage in stages:
        facts = node.facts(stage)
        state = states[stage] = json.loads(facts["state"])
        assert state["ociVersion"]
        assert state["id"] == container.id
        assert state["annotations"] == {"a": "b"}
        variables = dict(line.split("=", 1) for line in facts["env"].split("|") if line)
        variables.pop("PWD", None)  # the shell's own
        assert variables == {"STAGE": stage, "A": "b c"}
        assert facts["cwd"] == state["bundle"]
        assert facts["fds"].split() == ["0", "1", "2", "3"]  # the last one is the directory's
        if stage != "createContainer":
            for kind in ("mnt", "net", "ipc", "uts", "user"):
                assert facts[kind] == ours[kind], (stage, kind)
    assert [states[stage]["status"] for stage in stages] == [
        "creating",
        "creating",
        "creating",
        "running",
        "stopped",
    ]
    assert states["prestart"]["pid"] > 1
    assert "pid" not in states["poststop"]
    creation = node.facts("createContainer")
    for kind in ("mnt", "net", "ipc", "uts", "pid", "cgroup"):
        assert creation[kind] != ours[kind]
    assert creation["groups"].split() == ["/"]  # the container's, as its cgroup namespace names it
    for stage in ("createRuntime", "createContainer"):
        assert "bin" in node.facts(stage)["root"].split()
    assert "No such file" in node.facts("poststop")["root"]
    pod.remove()
    assert node.log == stages


def test_what_a_hook_leaves_behind_ends_with_it(node: Node) -> None:
    device = node.spec(
        *(node.hook(s, "leave") for s in ("createRuntime", "createContainer", "poststart"))
    )
    before = sleepers()
    container = node.cri.run(CDI_devices=[device])
    assert (node.out / "left").exists()
    assert sleepers() == before
    assert container.shell("ps | grep -c '[s]leep 4321' || :") == "0"
    container.pod.remove()


def sleepers() -> int:
    """Processes that the fake program has started."""
    found = 0
    for entry in Path("/proc").iterdir():
        try:
            found += b"sleep\0004321" in (entry / "cmdline").read_bytes()
        except OSError:
            continue
    return found


def test_mounts_of_a_hook_are_in_the_container(node: Node) -> None:
    device = node.spec(node.hook("createContainer", "mount"))
    container = node.cri.run(CDI_devices=[device])
    assert container.shell("cat /run/hook/file") == "mounted"
    assert "/run/hook" not in Path("/proc/self/mountinfo").read_text()
    container.pod.remove()


@pytest.mark.parametrize("shared", [False, True])
def test_start_container_runs_in_the_container(node: Node, shared: bool) -> None:
    """The hook has no more rights than the program, and runs before it."""
    script = (
        "#!/bin/sh\ncat > /tmp/state; (echo; id -u; grep CapEff /proc/self/status) >> /tmp/state"
    )
    state = shared_directory(node) / "state"
    device = node.spec(
        {"hookName": "startContainer", "path": "/bin/hook", "args": ["hook", "x"]},
        mounts=[
            {"hostPath": str(hook_file(node, script)), "containerPath": "/bin/hook"},
            {"hostPath": str(state.parent), "containerPath": "/tmp"},
        ],
    )
    mode = pb.NamespaceOption(pid=pb.POD if shared else pb.CONTAINER)
    pod = node.cri.pod(linux=pod_options(pid=mode.pid))
    default = pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)
    user = pb.Int64Value(value=1000)
    linux = options(namespace_options=mode, run_as_user=user, seccomp=default)
    container = pod.container("cat", "/tmp/state", CDI_devices=[device], linux=linux)
    assert not state.exists()
    container.start()
    assert container.ended().exit_code == 0
    told, *rights = container.output.splitlines()
    assert rights == ["1000", "CapEff:\t0000000000000000"]
    assert json.loads(told)["status"] == "created"
    assert json.loads(told)["id"] == container.id
    pod.remove()


def hook_file(node: Node, script: str) -> Path:
    path = node.directory / "hook"
    path.write_text(f"{script}\n")
    path.chmod(0o755)
    return path


def shared_directory(node: Node) -> Path:
    path = node.directory / "shared"
    path.mkdir(exist_ok=True)
    path.chmod(0o1777)
    (path / "state").unlink(missing_ok=True)
    return path


def test_nobody_in_a_shared_pid_namespace_sees_a_hook(node: Node) -> None:
    """Whoever may trace there would have the rights of the node's root."""
    mode = pb.NamespaceOption(pid=pb.POD)
    pod = node.cri.pod(linux=pod_options(pid=pb.POD))
    capabilities = pb.Capability(add_capabilities=["SYS_PTRACE"])
    tracer = pod.run(
        name="tracer", linux=options(namespace_options=mode, capabilities=capabilities)
    )
    device = node.spec(node.hook("createContainer", "wait", "go"))
    call = creation(pod, device, linux=options(namespace_options=mode))
    wait_for("the hook", lambda: node.log == ["began"])
    assert "nvidia" not in tracer.shell("ps")
    assert tracer.shell("set -- /proc/[0-9]*; echo $#") == "3"  # init, sleep, and this shell
    (node.out / "go").touch()
    call.result()
    pod.remove()


def test_a_hook_has_no_rights_on_the_node_in_a_user_namespace(node: Node) -> None:
    mode = pb.NamespaceOption(pid=pb.CONTAINER, userns_options=user_namespace())
    pod = node.cri.pod(linux=pod_options(pid=mode.pid, userns_options=mode.userns_options))
    device = node.spec(node.hook("createContainer", "facts", "inside"))
    container = pod.run(CDI_devices=[device], linux=options(namespace_options=mode))
    facts = node.facts("inside")
    assert facts["user"] != namespaces("self")["user"]
    assert facts["cwd"] == json.loads(facts["state"])["bundle"]
    assert (node.out / "inside").stat().st_uid == user_namespace().uids[0].host_id
    container.remove()
    writing = node.spec(node.hook("createContainer", "write", str(node.directory / "new")))
    call = partial(pod.container, CDI_devices=[writing], linux=options(namespace_options=mode))
    refused(FAILED_PRECONDITION, "Permission denied", call)
    pod.remove()


def creation(pod: Pod, device: pb.CDIDevice, **fields: Any) -> Any:
    """A CreateContainer that is not waited for."""
    request = pb.CreateContainerRequest(
        pod_sandbox_id=pod.id,
        sandbox_config=pod.config,
        config=pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name="held"),
            image=pb.ImageSpec(image=pod.cri.image),
            command=["true"],
            CDI_devices=[device],
            **fields,
        ),
    )
    return pod.cri.agent.runtime.CreateContainer.future(request)


# ---- hooks that fail ----


@pytest.mark.parametrize("stage", ["prestart", "createRuntime", "createContainer"])
def test_a_hook_that_fails_fails_the_creation(node: Node, stage: str) -> None:
    device = node.spec(
        node.hook(stage, "fail", f"no driver at {stage}"),
        node.hook(stage, "log", "never"),
        node.hook("poststop", "log", "poststop"),
    )
    pod = node.cri.pod()
    text = f'hook {stage} "{node.program}" of {node.specs}'
    refused(FAILED_PRECONDITION, text, lambda: pod.container(CDI_devices=[device]))
    refused(
        FAILED_PRECONDITION,
        f"exit status 3: no driver at {stage}",
        lambda: pod.container(CDI_devices=[device]),
    )
    assert node.log == ["poststop", "poststop"]
    pod.run(name="other")
    pod.remove()


def test_a_hook_of_the_start_that_fails(node: Node) -> None:
    script = "#!/bin/sh\necho not today >&2; exit 5"
    device = node.spec(
        {"hookName": "startContainer", "path": "/bin/hook"},
        mounts=[{"hostPath": str(hook_file(node, script)), "containerPath": "/bin/hook"}],
    )
    pod = node.cri.pod()
    container = pod.container(CDI_devices=[device])
    refused(FAILED_PRECONDITION, "exit status 5: not today", container.start)
    assert container.ended().exit_code == 128
    pod.remove()


@pytest.mark.parametrize("call", ["pidfd_open", "memfd_create"])
def test_a_hook_of_the_start_that_the_filter_of_the_container_forbids(
    node: Node, call: str
) -> None:
    rule = {"names": [call], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}
    profile = node.directory / "profile.json"
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
    kind = pb.SecurityProfile.Localhost
    seccomp = pb.SecurityProfile(profile_type=kind, localhost_ref=str(profile))
    device = node.spec(
        {"hookName": "startContainer", "path": "/bin/hook"},
        mounts=[{"hostPath": str(hook_file(node, "#!/bin/sh")), "containerPath": "/bin/hook"}],
    )
    pod = node.cri.pod()
    container = pod.container(CDI_devices=[device], linux=options(seccomp=seccomp))
    text = "cannot be run: Operation not permitted; does a limit or a filter of the container"
    refused(FAILED_PRECONDITION, text, container.start)
    assert container.ended().exit_code == 128
    pod.remove()


@pytest.mark.parametrize("stage", ["poststart", "poststop"])
def test_what_fails_after_the_start_is_logged(node: Node, stage: str) -> None:
    device = node.spec(node.hook(stage, "fail", "later"), node.hook(stage, "log", "next"))
    container = node.cri.run(CDI_devices=[device])
    container.stop()
    wait_for("the other hook", lambda: node.log == ["next"])
    log = node.cri.agent.root / "run" / "launcher.log"
    text = f'container {container.id}: hook {stage} "{node.program}"'
    wait_for(
        "a line", lambda: text in log.read_text() and "exit status 3: later" in log.read_text()
    )
    container.pod.remove()


@pytest.mark.parametrize("stage", ["createRuntime", "createContainer"])
def test_a_hook_that_hangs(node: Node, stage: str) -> None:
    device = node.spec(node.hook(stage, "hang", timeout=1))
    pod = node.cri.pod()
    before = sleepers()
    refused(
        FAILED_PRECONDITION,
        "has not ended within 1 s",
        lambda: pod.container(CDI_devices=[device]),
    )
    assert sleepers() == before
    pod.remove()


def test_a_container_is_stopped_while_a_hook_runs_after_the_start(node: Node) -> None:
    """Its program runs: it hears the signal, and has its time."""
    device = node.spec(node.hook("poststart", "wait", "go"))
    pod = node.cri.pod()
    script = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done"
    container = pod.container("sh", "-c", script, CDI_devices=[device])
    request = pb.StartContainerRequest(container_id=container.id)
    starting = node.cri.agent.runtime.StartContainer.future(request)
    container.said("ready")
    wait_for("the hook", lambda: node.log == ["began"])
    container.stop(timeout=30)
    assert container.status.exit_code == 7
    starting.result()
    (node.out / "go").touch()
    pod.remove()


@pytest.mark.parametrize("stage", ["createRuntime", "createContainer"])
def test_a_pod_is_removed_while_a_hook_hangs(node: Node, stage: str) -> None:
    device = node.spec(node.hook(stage, "hang"), node.hook("poststop", "log", "poststop"))
    pod = node.cri.pod()
    before = sleepers()
    call = creation(pod, device)
    wait_for("the hook", (node.out / "hanging").exists)
    began = time.monotonic()
    pod.remove()
    assert time.monotonic() - began < 30
    assert call.code() is not grpc.StatusCode.OK
    assert sleepers() == before
    assert node.log == ["poststop"]


@pytest.mark.parametrize("stage", ["createRuntime", "createContainer"])
def test_a_hook_that_writes_without_end(node: Node, stage: str) -> None:
    device = node.spec(node.hook(stage, "flood"))
    pod = node.cri.pod()
    refused(FAILED_PRECONDITION, "more than", lambda: pod.container(CDI_devices=[device]))
    pod.remove()


def test_programs_that_are_not_listed(node: Node) -> None:
    device = node.spec({"hookName": "createContainer", "path": "/bin/sh"})
    pod = node.cri.pod()
    text = 'hook createContainer: "/bin/sh" is not one of the programs'
    refused(FAILED_PRECONDITION, text, lambda: pod.container(CDI_devices=[device]))
    pod.remove()


@pytest.mark.parametrize("fault", ["writable", "owner", "directory", "absent"])
def test_programs_that_others_could_change(node: Node, fault: str) -> None:
    device = node.spec(node.hook("createContainer", "log", "ran"))
    path = node.program.parent if fault == "directory" else node.program
    mode, moved = stat.S_IMODE(path.stat().st_mode), node.directory / "moved"
    try:
        if fault == "owner":
            os.chown(path, 1000, 0)
        elif fault == "absent":
            path.rename(moved)
        else:
            path.chmod(mode | 0o020)
        pod = node.cri.pod()
        text = "No such file" if fault == "absent" else f'"{path}" can be changed by others'
        refused(FAILED_PRECONDITION, text, lambda: pod.container(CDI_devices=[device]))
    finally:
        if fault == "absent":
            moved.rename(path)
        os.chown(path, 0, 0)
        path.chmod(mode)
    assert node.log == []
    pod.remove()


# ---- agents and supervisors that are killed ----


@pytest.fixture
def own_node(
    place: Path, tmp_path_factory: pytest.TempPathFactory, registry: Registry
) -> Iterator[tuple[Node, RunningAgent]]:
    directory = place / f"own-{len(list(place.iterdir()))}"
    directory.mkdir()
    node = Node(directory)
    with running_agent(tmp_path_factory, registry, node.config) as running:
        node.cri = client(running, registry)
        yield node, running


def test_an_agent_that_is_killed_while_a_hook_runs(own_node: tuple[Node, RunningAgent]) -> None:
    """What was being created is undone, and the hook with it; the container that is there ends as it should."""
    node, agent = own_node
    pod = node.cri.pod()
    hanging = node.spec(
        node.hook("createContainer", "hang"), node.hook("poststop", "log", "undone")
    )
    quiet = node.spec(node.hook("poststop", "log", "poststop"))
    there = pod.run(name="there", CDI_devices=[quiet])
    before = sleepers()
    call = creation(pod, hanging)
    wait_for("the hook", (node.out / "hanging").exists)
    agent.kill()
    call.cancel()
    agent.start()
    wait_for("its end", lambda: sleepers() == before and "undone" in node.log)
    there.stop()
    wait_for("poststop", lambda: node.log == ["undone", "poststop"])
    pod.remove()


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_poststop_runs_once_when_the_supervisor_is_killed(
    own_node: tuple[Node, RunningAgent], when: str
) -> None:
    node, _ = own_node
    device = node.spec(node.hook("poststop", "wait", "go"))
    pod = node.cri.pod()
    container = pod.run(CDI_devices=[device])
    if when == "before":
        kill_supervisor(pod)
    else:
        container.stop()
        wait_for("the hook", lambda: node.log == ["began"])
        if when == "after":
            (node.out / "go").touch()
            wait_for("its end", lambda: node.log == ["began", "ended"])
        kill_supervisor(pod)
    (node.out / "go").touch()
    container.remove()
    assert node.log == ["began", "ended"]
    pod.remove()
    assert node.log == ["began", "ended"]


def kill_supervisor(pod: Pod) -> None:
    """Return when another one serves the pod."""
    dead = pod.supervisor
    os.kill(dead, 9)

    def has_successor() -> bool:
        try:
            return pod.supervisor not in (0, dead)
        except (grpc.RpcError, KeyError, ValueError):
            return False

    wait_for("a successor", has_successor)


def test_a_supervisor_that_is_killed_while_a_hook_runs(
    own_node: tuple[Node, RunningAgent],
) -> None:
    node, _ = own_node
    pod = node.cri.pod()
    device = node.spec(node.hook("createRuntime", "hang"), node.hook("poststop", "log", "undone"))
    before = sleepers()
    call = creation(pod, device)
    wait_for("the hook", (node.out / "hanging").exists)
    kill_supervisor(pod)
    assert call.code() is not grpc.StatusCode.OK
    wait_for("its end", lambda: sleepers() == before and node.log == ["undone"])
    pod.run(name="next")
    pod.remove()
    assert node.log == ["undone"]
