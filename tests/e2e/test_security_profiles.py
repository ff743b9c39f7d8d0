"""Seccomp profiles that come as OCI artifacts, from the registry to what a program in a container may call."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from nodeagent.linux import libseccomp
from tests.support import artifacts, images
from tests.support.artifacts import Artifact
from tests.support.cri import Container, Cri, options, pod_options, refused
from tests.support.registry import Registry

OWN, BASE = (
    123,
    124,
)  # errnos that no kernel gives for calls with zeros, to see which profile has refused
EPERM = 1

# What the program that makes the calls needs itself, a C library's start and a shell included.
NEEDED = {
    "access", "alarm", "arch_prctl", "brk", "clone", "clone3", "close", "dup2", "execve", "exit", "exit_group",
    "fcntl", "fork", "fstat", "futex", "getcwd", "getegid", "geteuid", "getgid", "getpid", "getppid", "getrandom",
    "getuid", "ioctl", "lseek", "mmap", "mprotect", "mremap", "munmap", "newfstatat", "open", "openat", "pause", "pipe",
    "pipe2", "prctl", "prlimit64", "read", "readlink", "readlinkat", "rseq", "rt_sigaction", "rt_sigprocmask",
    "rt_sigreturn", "set_robust_list", "set_tid_address", "setitimer", "sigaltstack", "stat", "statx", "uname",
    "vfork", "wait4", "write", "writev",
}  # fmt: skip
NAMES = {
    name: number
    for number in range(424)
    if (name := libseccomp.name_of(number)) and name not in NEEDED
}


def entry(*names: str, action: str = "SCMP_ACT_ALLOW", **fields: Any) -> dict[str, Any]:
    return {"names": list(names), "action": action, **fields}


def profile(errno: int, *entries: dict[str, Any]) -> dict[str, Any]:
    needed = entry(*sorted(NEEDED))
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": errno,
        "syscalls": [needed, *entries],
    }


class Profiles:
    """The calls of an agent about profiles of one registry."""

    def __init__(self, cri: Cri, registry: Registry) -> None:
        self.cri = cri
        self._registry = registry

    def push(self, artifact: Artifact) -> str:
        """Returns its reference."""
        self._registry.push(artifact)
        return artifact.reference(self._registry.host)

    def pull(self, reference: str, kind: int = pb.Seccomp) -> bool:
        spec = pb.ImageSpec(image=reference, user_specified_image=reference)
        request = pb.PullSecurityProfileRequest(image=spec, profile_kind=kind)  # type: ignore[arg-type]
        return bool(self.cri.agent.images.PullSecurityProfile(request, timeout=60).cached)

    def pulled(self, artifact: Artifact) -> str:
        reference = self.push(artifact)
        self.pull(reference)
        return reference

    def list(self) -> dict[str, pb.SecurityProfileInfo]:
        request = pb.ListSecurityProfilesRequest()
        answer = self.cri.agent.images.ListSecurityProfiles(request, timeout=60)
        return {one.digest: one for one in answer.profiles}

    def remove(self, digest: str) -> None:
        request = pb.RemoveSecurityProfileRequest(digest=digest)
        self.cri.agent.images.RemoveSecurityProfile(request, timeout=60)


@pytest.fixture
def profiles(cri: Cri, registry: Registry) -> Profiles:
    return Profiles(cri, registry)


@pytest.fixture
def busy() -> Iterator[tuple[str, list[str]]]:
    """The host of a registry that wants to be left alone for an hour, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(429)
            self.send_header("Retry-After", "3600")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the program `calls`."""
    directory = tmp_path_factory.mktemp("calls")
    path = directory / "calls"
    path.write_bytes(images.compiled(Path(__file__).with_name("calls.c").read_text()))
    path.chmod(0o755)
    return directory


def oci(reference: str, base: Path | None = None) -> pb.SecurityProfile:
    chosen = None
    if base is not None:
        chosen = pb.SecurityProfileBase(
            type=pb.SecurityProfileBase.Localhost, localhost_ref=str(base)
        )
    return pb.SecurityProfile(
        profile_type=pb.SecurityProfile.OCI, oci_ref=reference, base_profile=chosen
    )


def start(cri: Cri, program: Path, seccomp: pb.SecurityProfile, **security: Any) -> Container:
    """In a PID namespace of its own: in a shared one, a filter has to allow more than its programs need."""
    mount = pb.Mount(container_path="/calls", host_path=str(program), readonly=True)
    pod = cri.pod(linux=pod_options(pid=pb.CONTAINER))
    return pod.run("/calls/calls", mounts=[mount], linux=options(seccomp=seccomp, **security))


def calls(container: Container, *numbers: str) -> dict[str, str]:
    """What came of each: "errno N", "signal N" or "done"."""
    answer = container.exec("/calls/calls", *numbers)
    assert answer.exit_code == 0, answer
    lines = answer.stdout.decode().splitlines()
    assert len(lines) == len(numbers)
    return dict(line.split(" ", 1) for line in lines)


def is_refused(result: str) -> bool:
    return result in (f"errno {OWN}", f"errno {BASE}", "signal 31")


@pytest.mark.parametrize("no_new_privs", [False, True])
def test_call_by_call_both_must_allow(
    profiles: Profiles, program: Path, tmp_path: Path, no_new_privs: bool
) -> None:
    """Each call is allowed by both, by one of both, or by none; of those that both refuse, one kills."""
    kinds: dict[str, Callable[[int], bool]] = {
        "own": lambda index: index % 2 == 0,
        "base": lambda index: index % 3 == 0,
        "kill": lambda index: index % 7 == 1,
    }
    chosen = {
        kind: {name for index, name in enumerate(NAMES) if wanted(index)}
        for kind, wanted in kinds.items()
    }
    chosen["kill"] -= chosen["own"] | chosen["base"]
    own = profile(
        OWN, entry(*chosen["own"]), entry(*chosen["kill"], action="SCMP_ACT_KILL_PROCESS")
    )
    base = tmp_path / "base.json"
    base.write_text(json.dumps(profile(BASE, entry(*chosen["base"]))))
    reference = profiles.pulled(artifacts.seccomp(own))
    container = start(profiles.cri, program, oci(reference, base), no_new_privs=no_new_privs)
    found = calls(container, *(str(number) for number in NAMES.values()))
    for name, number in NAMES.items():
        result = found[str(number)]
        if name in chosen["kill"]:
            assert result == "signal 31", name
        elif name not in chosen["base"]:
            assert result == f"errno {BASE}", name
        elif name not in chosen["own"]:
            assert result == f"errno {OWN}", name
        else:
            assert not is_refused(result), (name, result)
    container.pod.remove()


def test_argument_by_argument_both_must_allow(
    profiles: Profiles, program: Path, tmp_path: Path
) -> None:
    """getpriority of 0, 1, 2: the profile allows what is below 2, the base what is above 0."""
    own = {"index": 0, "value": 2, "op": "SCMP_CMP_LT"}
    above = {"index": 0, "value": 0, "op": "SCMP_CMP_GT"}
    base = tmp_path / "base.json"
    base.write_text(json.dumps(profile(BASE, entry("getpriority", args=[above]))))
    reference = profiles.pulled(artifacts.seccomp(profile(OWN, entry("getpriority", args=[own]))))
    container = start(profiles.cri, program, oci(reference, base))
    number = NAMES["getpriority"]
    found = calls(container, *(f"{number}:{value}" for value in range(3)))
    assert found[f"{number}:0"] == f"errno {BASE}"
    assert not is_refused(found[f"{number}:1"])
    assert found[f"{number}:2"] == f"errno {OWN}"
    container.pod.remove()


@pytest.mark.parametrize("asked", [None, pb.SecurityProfileBase()])
def test_without_a_base_it_is_the_default_profile(
    profiles: Profiles, program: Path, asked: pb.SecurityProfileBase | None
) -> None:
    """A profile that allows everything allows what the default one does; the verbose status says so."""
    reference = profiles.pulled(artifacts.seccomp({"defaultAction": "SCMP_ACT_ALLOW"}))
    seccomp = oci(reference)
    if asked is not None:
        seccomp.base_profile.CopyFrom(asked)
    both = start(profiles.cri, program, seccomp)
    default = start(profiles.cri, program, pb.SecurityProfile())
    numbers = [str(number) for number in NAMES.values()]
    assert calls(both, *numbers) == calls(default, *numbers)
    assert calls(both, str(NAMES["mount"]))[str(NAMES["mount"])] == f"errno {EPERM}"
    for container in (both, default):
        effective = verbose(container)["plan"]["process"]["seccomp"]
        assert "mount" in effective["SCMP_ACT_ERRNO 1"]
        assert "openat" in effective["SCMP_ACT_ALLOW"]
        assert "socket" in effective["by argument"]
    assert verbose(both)["config"]["seccomp"] == {"kind": "oci", "ref": reference}
    for container in (both, default):
        container.pod.remove()


def verbose(container: Container) -> dict[str, Any]:
    request = pb.ContainerStatusRequest(container_id=container.id, verbose=True)
    answer = container.pod.cri.agent.runtime.ContainerStatus(request, timeout=60)
    found: dict[str, Any] = json.loads(answer.info["info"])
    return found


def test_the_life_of_a_profile(own_cri: Cri, registry: Registry, program: Path) -> None:
    """It is no image, survives a restart, and containers keep their filter when it is removed."""
    profiles = Profiles(own_cri, registry)
    artifact = artifacts.seccomp(profile(OWN), repository="test/life")
    reference = profiles.push(artifact)
    pod = own_cri.pod(linux=pod_options(pid=pb.CONTAINER))
    seccomp = oci(reference)
    refused(
        grpc.StatusCode.NOT_FOUND,
        f'security profile "{reference}": not on this node; pull it first',
        lambda: pod.container(linux=options(seccomp=seccomp)),
    )
    before = own_cri.agent.images.ListImages(pb.ListImagesRequest(), timeout=60)
    assert [profiles.pull(reference), profiles.pull(reference)] == [False, True]
    assert own_cri.agent.images.ListImages(pb.ListImagesRequest(), timeout=60) == before
    own_cri.agent.restart()
    [found] = profiles.list().values()
    assert found == pb.SecurityProfileInfo(
        digest=artifact.digest, refs=[reference], size=artifact.size
    )
    container = start(own_cri, program, seccomp)
    number = str(NAMES["getpriority"])
    assert calls(container, number)[number] == f"errno {OWN}"
    for _ in range(2):
        profiles.remove(artifact.digest)
    assert not profiles.list()
    assert list((own_cri.agent.root / "lib/profiles/sha256").iterdir()) == []
    assert calls(container, number)[number] == f"errno {OWN}"
    refused(
        grpc.StatusCode.NOT_FOUND,
        "not on this node",
        lambda: pod.container(linux=options(seccomp=seccomp)),
    )


def test_what_cannot_be_a_profile(profiles: Profiles) -> None:
    listener = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [entry("read", action="SCMP_ACT_NOTIFY")],
    }
    wrong = {
        "action": artifacts.seccomp({"defaultAction": "SCMP_ACT_NONE"}),
        "SCMP_ACT_NOTIFY": artifacts.seccomp(listener),
        "an artifact of type": Artifact(
            profile=b"{}",
            changes={"artifactType": "", "config": images.descriptor(b"{}", "application/json")},
        ),
    }
    before = profiles.list()
    for text, artifact in wrong.items():
        reference = profiles.push(artifact)
        with pytest.raises(grpc.RpcError) as error:
            profiles.pull(reference)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        details = error.value.details() or ""
        assert details.startswith(f'SecurityProfileInvalid: security profile "{reference}": ')
        assert text in details
    assert profiles.list() == before


def test_a_registry_that_is_not_there(profiles: Profiles) -> None:
    reference = f"127.0.0.1:1/test/p@sha256:{'a' * 64}"
    with pytest.raises(grpc.RpcError) as error:
        profiles.pull(reference)
    assert error.value.code() == grpc.StatusCode.UNKNOWN
    details = error.value.details() or ""
    assert details.startswith(f'RegistryUnavailable: security profile "{reference}": ')


def test_a_shared_pid_namespace_needs_what_starts_processes(
    cri: Cri, profiles: Profiles, tmp_path: Path
) -> None:
    """What counts is the filter that is in force, whichever of both refuses."""
    base = tmp_path / "base.json"
    base.write_text(
        json.dumps(
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [entry("setsid", action="SCMP_ACT_ERRNO")],
            }
        )
    )
    reference = profiles.pulled(artifacts.seccomp({"defaultAction": "SCMP_ACT_ALLOW"}))
    shared = pb.NamespaceOption(pid=pb.POD)
    pod = cri.pod(linux=pod_options(pid=pb.POD))
    security = options(seccomp=oci(reference, base), namespace_options=shared)
    refused(
        grpc.StatusCode.FAILED_PRECONDITION,
        "its seccomp profile forbids setsid",
        lambda: pod.container(linux=security),
    )
    pod.container(linux=options(seccomp=oci(reference), namespace_options=shared)).start()
    pod.remove()


def test_the_feature_is_told(cri: Cri) -> None:
    status = cri.agent.runtime.Status(pb.StatusRequest(), timeout=60)
    assert status.features.seccomp_profile_oci


def test_a_pause_that_images_were_asked_for_is_one_of_profiles_too(
    profiles: Profiles, busy: tuple[str, list[str]]
) -> None:
    host, asked = busy
    request = pb.PullImageRequest(image=pb.ImageSpec(image=f"{host}/some/image:1"))
    with pytest.raises(grpc.RpcError, match="429"):
        profiles.cri.agent.images.PullImage(request, timeout=60)
    before = list(asked)
    with pytest.raises(grpc.RpcError, match="has asked for a pause"):
        profiles.pull(f"{host}/some/profile@sha256:{'a' * 64}")
    assert (len(before), asked) == (1, before)
