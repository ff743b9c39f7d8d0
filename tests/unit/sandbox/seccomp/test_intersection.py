"""A profile together with its base: one program does what the kernel would do with both."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.errors import InvalidArgument
from nodeagent.linux import bpf_classic, libseccomp, seccomp
from nodeagent.sandbox.seccomp import effective as seccomp_effective
from nodeagent.sandbox.seccomp import profile as seccomp_profile
from nodeagent.sandbox.seccomp.profile import Filter

# The strictest first (seccomp(2)); of two errnos, that of the base is taken.
ACTIONS = {
    "SCMP_ACT_KILL_PROCESS": libseccomp.ACT_KILL_PROCESS,
    "SCMP_ACT_KILL_THREAD": libseccomp.ACT_KILL_THREAD,
    "SCMP_ACT_TRAP": libseccomp.ACT_TRAP,
    "SCMP_ACT_ERRNO": libseccomp.ACT_ERRNO | 1,
    "SCMP_ACT_TRACE": libseccomp.ACT_TRACE | 1,
    "SCMP_ACT_LOG": libseccomp.ACT_LOG,
    "SCMP_ACT_ALLOW": libseccomp.ACT_ALLOW,
}
I386 = 0x40000003
NAMES = ("read", "write", "getpid", "socket", "clone", "mseal")
NUMBERS = {
    "mseal": 462,
    **{name: libseccomp.number_of(name) or 0 for name in NAMES if name != "mseal"},
}


def compiled(profile: dict[str, Any]) -> Filter:
    return seccomp_profile.from_json(json.dumps(profile).encode(), 0)


def entry(*names: str, action: str = "SCMP_ACT_ALLOW", **fields: Any) -> dict[str, Any]:
    return {"names": list(names), "action": action, **fields}


def allowing(*entries: dict[str, Any], default: str = "SCMP_ACT_ERRNO") -> Filter:
    return compiled({"defaultAction": default, "syscalls": list(entries)})


def taken(found: Filter, name: str, *arguments: int, arch: int = seccomp.AUDIT_ARCH) -> int:
    data = bpf_classic.seccomp_data(NUMBERS[name], arch, arguments)
    return bpf_classic.run(found.program, data)


@pytest.mark.parametrize("own", ACTIONS)
@pytest.mark.parametrize("base", ACTIONS)
def test_of_two_actions_the_stricter_is_taken(base: str, own: str) -> None:
    both = seccomp_profile.intersection(
        allowing(entry("getpid", action=base), default="SCMP_ACT_ALLOW"),
        allowing(entry("getpid", action=own), default="SCMP_ACT_ALLOW"),
    )
    order = list(ACTIONS)
    expected = ACTIONS[order[min(order.index(base), order.index(own))]]
    assert taken(both, "getpid") == expected
    assert taken(both, "read") == libseccomp.ACT_ALLOW


@pytest.mark.parametrize(
    ("base", "own"), [("SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"), ("SCMP_ACT_ERRNO", "SCMP_ACT_ALLOW")]
)
def test_default_actions_too(base: str, own: str) -> None:
    both = seccomp_profile.intersection(
        allowing(entry("read"), default=base), allowing(entry("read"), default=own)
    )
    assert taken(both, "read") == libseccomp.ACT_ALLOW
    assert taken(both, "getpid") == libseccomp.ACT_ERRNO | 1


def test_of_two_errnos_that_of_the_base_is_taken() -> None:
    """A default profile that says ENOSYS makes a C library fall back, which EPERM of a profile would not."""
    base = allowing(entry("clone", action="SCMP_ACT_ERRNO", errnoRet=38), entry("getpid"))
    own = allowing(entry("read"), default="SCMP_ACT_ERRNO")
    assert taken(seccomp_profile.intersection(base, own), "clone") == libseccomp.ACT_ERRNO | 38
    assert taken(seccomp_profile.intersection(own, base), "clone") == libseccomp.ACT_ERRNO | 1


def test_argument_by_argument() -> None:
    low = {"index": 0, "value": 100, "op": "SCMP_CMP_LT"}
    high = {"index": 0, "value": 2, "op": "SCMP_CMP_GT"}
    both = seccomp_profile.intersection(
        allowing(entry("write", args=[low])), allowing(entry("write", args=[high]))
    )
    for value in (0, 2, 3, 99, 100, 1 << 40):
        expected = libseccomp.ACT_ALLOW if 2 < value < 100 else libseccomp.ACT_ERRNO | 1
        assert taken(both, "write", value) == expected


def test_an_architecture_that_one_of_both_has_not_is_killed() -> None:
    wide = compiled({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86"]})
    narrow = compiled({"defaultAction": "SCMP_ACT_ALLOW"})
    both = seccomp_profile.intersection(wide, narrow)
    assert taken(wide, "read", arch=I386) == libseccomp.ACT_ALLOW
    assert taken(both, "read", arch=I386) == libseccomp.ACT_KILL_THREAD
    assert taken(both, "read") == libseccomp.ACT_ALLOW


CONDITIONS = st.fixed_dictionaries(
    {
        "index": st.integers(0, 1),
        "value": st.sampled_from([0, 1, 17, 1 << 33]),
        "op": st.sampled_from(["SCMP_CMP_EQ", "SCMP_CMP_NE", "SCMP_CMP_GT", "SCMP_CMP_LE"]),
    }
)
FILTERS = st.fixed_dictionaries(
    {
        "defaultAction": st.sampled_from([*ACTIONS]),
        "syscalls": st.lists(
            st.fixed_dictionaries(
                {
                    "names": st.lists(st.sampled_from(NAMES[:-1]), min_size=1, max_size=2),
                    "action": st.sampled_from([*ACTIONS]),
                    "errnoRet": st.sampled_from([1, 13, 38]),
                },
                optional={"args": st.lists(CONDITIONS, max_size=2)},
            ),
            max_size=5,
        ),
        "architectures": st.sampled_from([[], ["SCMP_ARCH_X86"]]),
    }
)


def rank(value: int) -> int:
    action = value & 0xFFFF0000
    return action - (1 << 32) if action >> 31 else action


@given(FILTERS, FILTERS)
def test_as_the_kernel_takes_two_filters(first: dict[str, Any], second: dict[str, Any]) -> None:
    base, own = compiled(first), compiled(second)
    both = seccomp_profile.intersection(base, own)
    for name, arguments, arch in itertools.product(
        NAMES,
        itertools.product((0, 1, 17, 18, 1 << 33), (0, 2, 1 << 33)),
        (seccomp.AUDIT_ARCH, I386),
    ):
        one, other = (taken(found, name, *arguments, arch=arch) for found in (base, own))
        expected = one if rank(one) <= rank(other) else other
        assert taken(both, name, *arguments, arch=arch) == expected


def test_the_default_profile_with_large_ones_fits() -> None:
    """A profile that has as many rules as those that engines distribute, for three architectures, and kills."""
    base = seccomp_profile.runtime_default(0)
    names = seccomp_effective.describe(base.program)["SCMP_ACT_ALLOW"]
    for default in ("SCMP_ACT_KILL_PROCESS", "SCMP_ACT_ERRNO", "SCMP_ACT_LOG"):
        own = compiled(
            {
                "defaultAction": default,
                "architectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": [entry(*names)],
            }
        )
        both = seccomp_profile.intersection(base, own)
        assert taken(both, "getpid") == libseccomp.ACT_ALLOW


def test_what_is_too_large_for_the_kernel_is_refused() -> None:
    def large(errno: int) -> Filter:
        conditions = [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"} for value in range(1500)]
        entries = [
            entry("write", action="SCMP_ACT_ERRNO", errnoRet=errno + value % 20, args=[condition])
            for value, condition in enumerate(conditions)
        ]
        return allowing(*entries, default="SCMP_ACT_KILL_PROCESS")

    with pytest.raises(InvalidArgument, match="together with its base: larger than"):
        seccomp_profile.intersection(large(1), large(50))


@pytest.mark.parametrize(
    ("base", "own", "both"),
    [
        (seccomp.FLAG_SPEC_ALLOW, seccomp.FLAG_SPEC_ALLOW, seccomp.FLAG_SPEC_ALLOW),
        (seccomp.FLAG_SPEC_ALLOW, 0, 0),
        (0, seccomp.FLAG_SPEC_ALLOW, 0),
        (seccomp.FLAG_LOG, 0, seccomp.FLAG_LOG),
        (0, seccomp.FLAG_LOG | seccomp.FLAG_WAIT_KILLABLE_RECV, seccomp.FLAG_LOG),
    ],
)
def test_flags_never_loosen(base: int, own: int, both: int) -> None:
    program = allowing().program
    assert seccomp_profile.intersection(Filter(program, base), Filter(program, own)).flags == both


# ---- what people read ----


def test_the_effective_profile_is_read_out_of_the_program() -> None:
    condition = {"index": 0, "value": 17, "op": "SCMP_CMP_EQ"}
    own = allowing(
        entry("read", "mount", "mseal"),
        entry("clone", args=[condition]),
        entry("write", action="SCMP_ACT_LOG"),
        default="SCMP_ACT_KILL_PROCESS",
    )
    both = seccomp_profile.intersection(seccomp_profile.runtime_default(0), own)
    found = seccomp_effective.describe(both.program)
    assert found["SCMP_ACT_ALLOW"] == ["read", "mseal"]
    assert found["SCMP_ACT_LOG"] == ["write"]
    assert found[seccomp_effective.BY_ARGUMENT] == ["clone"]
    assert "mount" in found["SCMP_ACT_ERRNO 1"]
    assert "openat" in found["SCMP_ACT_KILL_PROCESS"]
    assert seccomp_effective.describe(b"") == {}
