"""Compiled profiles, as an interpreter of their instructions sees them."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.errors import InvalidArgument, NotFound, Unsupported
from nodeagent.linux import bpf_classic, capabilities, libseccomp, seccomp
from nodeagent.sandbox.seccomp import defaults as seccomp_defaults
from nodeagent.sandbox.seccomp import profile as seccomp_profile

ALLOW = libseccomp.ACT_ALLOW
EPERM = libseccomp.ACT_ERRNO | errno.EPERM
ENOSYS = libseccomp.ACT_ERRNO | errno.ENOSYS
NATIVE = seccomp.AUDIT_ARCH
I386, AARCH64 = 0x40000003, 0xC00000B7  # linux/audit.h

# Errors of a file that are none of its name.
TROUBLE = (
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.EACCES, errno.EINTR
)  # fmt: skip

Call = Callable[..., int]


def caller(program: bytes, arch: int = NATIVE) -> Call:
    """call(name or number, *arguments): the action that the filter takes."""

    def call(name: str | int, *arguments: int) -> int:
        number = name
        if isinstance(name, str):
            number = seccomp_defaults.NUMBERS.get(name) or libseccomp.number_of(name) or 0
        assert isinstance(number, int)
        return bpf_classic.run(program, bpf_classic.seccomp_data(number, arch, arguments))

    return call


def default(*names: str) -> Call:
    return caller(seccomp_profile.runtime_default(capabilities.mask(names)).program)


def oci(profile: dict[str, Any], *names: str) -> Call:
    text = json.dumps(profile).encode()
    return caller(seccomp_profile.from_json(text, capabilities.mask(names)).program)


# ---- the default profile ----


@pytest.mark.parametrize("name", ["read", "execve", "openat", "futex", "statx", "clone", "mknodat"])
def test_what_programs_need_is_allowed(name: str) -> None:
    assert default()(name) == ALLOW


@pytest.mark.parametrize(
    "name",
    [
        "mount",
        "bpf",
        "keyctl",
        "io_uring_setup",
        "userfaultfd",
        "kexec_load",
        "setns",
        "init_module",
    ],
)
def test_what_is_dangerous_is_refused(name: str) -> None:
    assert default()(name) == EPERM


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        (capability, name)
        for capability, names in seccomp_defaults.ALLOWED_WITH.items()
        for name in names
        if (libseccomp.number_of(name) or -1) > 0 and name not in ("clone", "clone3")
    ],
)
def test_a_capability_allows_its_calls(capability: str, name: str) -> None:
    assert default()(name) == EPERM
    assert default(capability)(name) == ALLOW


@pytest.mark.parametrize("name", seccomp_defaults.NUMBERS)
def test_the_newest_calls_are_decided(name: str) -> None:
    expected = ALLOW if name in seccomp_defaults.ALLOWED else EPERM
    assert default()(name) == expected


@pytest.mark.parametrize("number", [470, 600, 1023])
def test_what_no_list_knows_does_not_exist(number: int) -> None:
    assert default()(number) == ENOSYS
    assert default("SYS_ADMIN")(number) == ENOSYS


def test_new_namespaces_take_sys_admin() -> None:
    signal_child = 17
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert default()("clone", flag | signal_child) == EPERM
        assert default("SYS_ADMIN")("clone", flag | signal_child) == ALLOW
    assert default()("clone", 0x1200011) == ALLOW
    assert default()("clone3") == ENOSYS
    assert default("SYS_ADMIN")("clone3") == ALLOW


@pytest.mark.parametrize("family", range(64))
def test_address_families(family: int) -> None:
    expected = EPERM if family in (38, 40) or family > 47 else ALLOW
    assert default()("socket", family, 1, 0) == expected
    assert default()("socket", 0xFFFFFFFF_00000000 | family, 1, 0) == expected


@pytest.mark.parametrize(
    ("persona", "expected"),
    [
        (0, ALLOW),
        (8, ALLOW),
        (0x20008, ALLOW),
        (0xFFFFFFFF, ALLOW),
        (0x40000, EPERM),
        (0x400000, EPERM),
    ],
)
def test_personalities(persona: int, expected: int) -> None:
    assert default()("personality", persona) == expected


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86")
def test_programs_of_other_kinds() -> None:
    program = seccomp_profile.runtime_default(0).program
    i386 = caller(program, I386)
    assert i386(11) == ALLOW  # execve
    assert i386(21) == EPERM  # mount
    assert i386(102) == ENOSYS  # socketcall
    assert i386(452) == ALLOW  # fchmodat2
    assert i386(500) == ENOSYS
    assert caller(program)(0x40000000) == libseccomp.ACT_KILL_THREAD  # read, of x32
    assert caller(program, AARCH64)(63) == libseccomp.ACT_KILL_THREAD


def test_names_of_the_lists_exist() -> None:
    other_machines = {"breakpoint", "cacheflush", "riscv_hwprobe", "set_tls", "sync_file_range2"}
    newest = {*seccomp_defaults.NUMBERS, "uretprobe"}
    for names in (seccomp_defaults.ALLOWED, *seccomp_defaults.ALLOWED_WITH.values()):
        assert len(set(names)) == len(names)
        unknown = {name for name in names if libseccomp.number_of(name) is None}
        assert unknown <= other_machines | newest
    assert set(seccomp_defaults.ALLOWED_WITH) <= set(capabilities.NAMES)


def test_a_profile_is_compiled_once() -> None:
    assert seccomp_profile.runtime_default(5) is seccomp_profile.runtime_default(5)


# ---- profiles of the OCI form ----


def entry(*names: str, action: str = "SCMP_ACT_ALLOW", **rest: Any) -> dict[str, Any]:
    return {"names": list(names), "action": action, **rest}


def test_a_list_of_what_is_denied() -> None:
    call = oci(
        {
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [
                entry("chmod", "fchmodat", action="SCMP_ACT_ERRNO"),
                entry("sethostname", action="SCMP_ACT_ERRNO", errnoRet=38),
                entry("mseal", action="SCMP_ACT_ERRNO", errnoRet=13),
                entry("no_such_call", action="SCMP_ACT_ERRNO"),
            ],
        }
    )
    assert call("read") == ALLOW
    assert call("fchmodat") == EPERM
    assert call("sethostname") == ENOSYS
    assert call("mseal") == libseccomp.ACT_ERRNO | 13
    assert call(700) == ALLOW


def test_a_list_of_what_is_allowed() -> None:
    call = oci(
        {
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 2,
            "syscalls": [entry("read", "openat2", "cachestat")],
        }
    )
    assert call("read") == ALLOW
    assert call("cachestat") == ALLOW
    assert call("write") == libseccomp.ACT_ERRNO | 2
    assert call("fchmodat2") == ENOSYS  # newer than all that the profile names


@pytest.mark.parametrize(
    ("name", "action"),
    [
        ("SCMP_ACT_KILL", libseccomp.ACT_KILL_THREAD),
        ("SCMP_ACT_KILL_THREAD", libseccomp.ACT_KILL_THREAD),
        ("SCMP_ACT_KILL_PROCESS", libseccomp.ACT_KILL_PROCESS),
        ("SCMP_ACT_TRAP", libseccomp.ACT_TRAP),
        ("SCMP_ACT_ERRNO", EPERM),
        ("SCMP_ACT_TRACE", libseccomp.ACT_TRACE | 1),
        ("SCMP_ACT_LOG", libseccomp.ACT_LOG),
        ("SCMP_ACT_ALLOW", ALLOW),
    ],
)
def test_actions(name: str, action: int) -> None:
    other = "SCMP_ACT_LOG" if name == "SCMP_ACT_ALLOW" else "SCMP_ACT_ALLOW"
    call = oci({"defaultAction": other, "syscalls": [entry("getpid", action=name)]})
    assert call("getpid") == action
    assert oci({"defaultAction": name})("getpid") == action


@pytest.mark.parametrize(
    ("op", "value", "two", "matching", "other"),
    [
        ("SCMP_CMP_NE", 5, 0, 6, 5),
        ("SCMP_CMP_LT", 5, 0, 4, 5),
        ("SCMP_CMP_LE", 5, 0, 5, 6),
        ("SCMP_CMP_EQ", 2**40, 0, 2**40, 0),
        ("SCMP_CMP_GE", 5, 0, 2**33, 4),
        ("SCMP_CMP_GT", 5, 0, 6, 5),
        ("SCMP_CMP_MASKED_EQ", 0xF0, 0x30, 0x3A, 0x4A),
    ],
)
def test_comparisons(op: str, value: int, two: int, matching: int, other: int) -> None:
    argument = {"index": 1, "value": value, "valueTwo": two, "op": op}
    syscalls = [entry("getpid", action="SCMP_ACT_ERRNO", args=[argument])]
    call = oci({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": syscalls})
    assert call("getpid", 0, matching) == EPERM
    assert call("getpid", 0, other) == ALLOW


def test_conditions_on_several_arguments_all_hold_and_on_one_any() -> None:
    first = {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}
    second = {"index": 1, "value": 2, "op": "SCMP_CMP_EQ"}
    again = {"index": 0, "value": 3, "op": "SCMP_CMP_EQ"}
    both = oci(
        {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [entry("getpid", args=[first, second])]}
    )
    assert both("getpid", 1, 2) == ALLOW
    assert both("getpid", 1, 3) == EPERM
    either = oci(
        {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [entry("getpid", args=[first, again])]}
    )
    assert either("getpid", 1) == ALLOW
    assert either("getpid", 3) == ALLOW
    assert either("getpid", 2) == EPERM


def test_conditional_parts() -> None:
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [
            entry("mount", includes={"caps": ["CAP_SYS_ADMIN"]}),
            entry("clone3", excludes={"caps": ["CAP_SYS_ADMIN"]}),
            entry("getpid", includes={"arches": ["s390x"]}),
            entry("getuid", excludes={"arches": ["amd64", "arm64"]}),
            entry("getgid", includes={"minKernel": "4.8"}),
            entry("geteuid", includes={"minKernel": "99.1"}),
        ],
    }
    without, with_it = oci(profile), oci(profile, "SYS_ADMIN")
    assert (without("mount"), with_it("mount")) == (EPERM, ALLOW)
    assert (without("clone3"), with_it("clone3")) == (ALLOW, EPERM)
    assert without("getpid") == without("getuid") == without("geteuid") == EPERM
    assert without("getgid") == ALLOW


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86")
@pytest.mark.parametrize(
    "named",
    [
        {"architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]},
        {"archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}]},
    ],
)
def test_architectures(named: dict[str, Any]) -> None:
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [entry("execve")], **named}
    program = seccomp_profile.from_json(json.dumps(profile).encode(), 0).program
    assert caller(program, I386)(11) == ALLOW
    assert caller(program, I386)(12) == EPERM


def test_flags() -> None:
    def flags(**named: Any) -> int:
        text = json.dumps({"defaultAction": "SCMP_ACT_ALLOW", **named}).encode()
        return seccomp_profile.from_json(text, 0).flags

    assert flags() == seccomp.FLAG_SPEC_ALLOW
    assert flags(flags=[]) == 0
    both = ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_TSYNC"]
    assert flags(flags=both) == seccomp.FLAG_LOG | seccomp.FLAG_TSYNC


CONDITION = (
    '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["getpid"], "action": "SCMP_ACT_ERRNO",'
    ' "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}]}]}'
)


@pytest.mark.parametrize(
    ("profile", "text"),
    [
        ("", "truncated"),
        ("[]", "object"),
        ("{}", "defaultAction"),
        ('{"defaultAction": 5}', "defaultAction"),
        ('{"defaultAction": "SCMP_ACT_NONE"}', "SCMP_ACT_NONE"),
        ('{"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 70000}', "70000"),
        ('{"defaultAction": "SCMP_ACT_ALLOW", "flags": ["NEW"]}', "NEW"),
        ('{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_VAX"]}', "VAX"),
        (CONDITION.replace('"index": 0', '"index": 6'), "argument 6"),
        (CONDITION.replace('"value": 0', '"value": -1'), "value -1"),
        (CONDITION.replace("SCMP_CMP_EQ", "SCMP_CMP"), "SCMP_CMP"),
        (CONDITION.replace("getpid", "mseal"), "conditions on mseal"),
        ('{"defaultAction": "x", "y": ' + "[" * 200_000, "recursion"),
        (
            CONDITION.replace('"args"', f'"includes": {{"minKernel": "{"9" * 5000}"}}, "args"'),
            "minKernel",
        ),
    ],
)
def test_malformed_profiles_are_refused(profile: str, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        seccomp_profile.from_json(profile.encode(), 0)


def test_a_listener_is_not_supported() -> None:
    with pytest.raises(Unsupported, match="SCMP_ACT_NOTIFY"):
        oci(
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [entry("read", action="SCMP_ACT_NOTIFY")],
            }
        )


@given(st.binary(max_size=200))
def test_any_bytes_are_a_profile_or_refused(text: bytes) -> None:
    with pytest.raises(InvalidArgument):
        seccomp_profile.from_json(text, 0)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(NotFound, match=str(path)):
        seccomp_profile.from_file(str(path), 0)
    path.write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')
    assert caller(seccomp_profile.from_file(str(path), 0).program)("mount") == ALLOW
    path.write_text("no profile")
    with pytest.raises(InvalidArgument, match=str(path)):
        seccomp_profile.from_file(str(path), 0)
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InvalidArgument, match="larger than"):
        seccomp_profile.from_file(str(path), 0)


def test_a_path_that_names_no_file_is_the_requests_fault(tmp_path: Path) -> None:
    file, circle = tmp_path / "file", tmp_path / "circle"
    file.touch()
    circle.symlink_to(circle)
    for path in (tmp_path, file / "profile", circle, tmp_path / ("x" * 300), "/dev/null"):
        with pytest.raises(InvalidArgument, match="seccomp profile"):
            seccomp_profile.from_file(str(path), 0)


@pytest.mark.parametrize("code", TROUBLE, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["open", "read"])
def test_the_nodes_trouble_with_a_file_is_not_the_requests_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    path = tmp_path / "profile.json"
    path.write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match=str(path)) as caught:
            seccomp_profile.from_file(str(path), 0)
    assert caught.value.errno == code
