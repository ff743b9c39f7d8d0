"""Profiles that anybody may have written, compiled in a process of their own."""

import base64
import json
import queue
import subprocess
import sys
import threading
from typing import Any

import pytest

from nodeagent.errors import InvalidArgument, ResourceExhausted, Unavailable, Unsupported
from nodeagent.linux import capabilities
from nodeagent.sandbox.seccomp import artifact as seccomp_artifact
from nodeagent.sandbox.seccomp import profile as seccomp_profile


def text(*entries: dict[str, Any], default: str = "SCMP_ACT_ERRNO") -> bytes:
    return json.dumps({"defaultAction": default, "syscalls": list(entries)}).encode()


def conditions(*operators: str, value: int) -> list[dict[str, Any]]:
    return [{"index": i, "value": value + i, "op": op} for i, op in enumerate(operators)]


def test_what_is_compiled_apart_is_the_same() -> None:
    profile = text({"names": ["read", "mount"], "action": "SCMP_ACT_ALLOW"})
    base = seccomp_profile.runtime_default(0)
    held = capabilities.mask(["SYS_ADMIN"])
    own = seccomp_profile.from_json(profile, held)
    assert seccomp_artifact.compiled(profile, held).result() == own
    both = seccomp_profile.intersection(base, own)
    assert seccomp_artifact.compiled(profile, held, base).result() == both


@pytest.mark.parametrize(
    ("profile", "kind"),
    [
        (b"no profile", InvalidArgument),
        (text(default="SCMP_ACT_NONE"), InvalidArgument),
        (text(default="SCMP_ACT_NOTIFY"), Unsupported),
    ],
)
def test_faults_are_told(profile: bytes, kind: type[Exception]) -> None:
    with pytest.raises(kind) as apart:
        seccomp_artifact.compiled(profile, 0).result()
    with pytest.raises(kind) as here:
        seccomp_profile.from_json(profile, 0)
    assert str(apart.value) == str(here.value)


@pytest.mark.parametrize(
    "profile",
    [
        # The ways through six comparisons of 64 bits, in four rules, multiply.
        text(
            *(
                {
                    "names": ["write"],
                    "action": "SCMP_ACT_ALLOW",
                    "args": conditions(*["SCMP_CMP_GT"] * 6, value=v),
                }
                for v in (0, 1000, 2000, 3000)
            )
        ),
        # As many rules as names and alternatives of conditions together.
        text(
            {
                "names": ["write"] * 50_000,
                "action": "SCMP_ACT_ALLOW",
                "args": [
                    {"index": 0, "value": value, "op": "SCMP_CMP_EQ"} for value in range(5000)
                ],
            }
        ),
    ],
    ids=["ways", "rules"],
)
def test_what_would_take_for_ever_is_cut_off(profile: bytes) -> None:
    with pytest.raises(InvalidArgument, match="to compile; use fewer conditions"):
        seccomp_artifact.compiled(profile, 0).result()


def test_the_oom_killer_takes_the_compiler_first() -> None:
    """Not the agent, which it spares, nor a pod: a profile may be anybody's."""
    script = (
        "from nodeagent.sandbox.seccomp import artifact; artifact.main();"
        "print(); print(open('/proc/self/oom_score_adj').read())"
    )
    order = {"text": base64.b64encode(text()).decode(), "held": 0, "base": None}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(order),
        text=True,
        capture_output=True,
        check=True,
    )
    assert "program" in done.stdout
    assert done.stdout.split()[-1] == "1000"


def test_what_is_not_the_profile_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kubelet tries again."""

    def killed(command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess(command, -9, "", "")

    def late(command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        raise subprocess.TimeoutExpired(command, 1)

    for run, kind in ((killed, ResourceExhausted), (late, Unavailable)):
        monkeypatch.setattr(subprocess, "run", run)
        with pytest.raises(kind):
            seccomp_artifact.compiled(text(default="SCMP_ACT_TRAP"), 0).result()


def test_few_compilers_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for them. Who gives up before his turn has none run for him."""
    asked = [text({"names": ["read"] * n, "action": "SCMP_ACT_ALLOW"}) for n in range(1, 6)]
    begun: queue.Queue[str] = queue.Queue()
    end = threading.Event()

    def held_up(command: list[str], **given: str) -> "subprocess.CompletedProcess[str]":
        begun.put(given["input"])
        end.wait()
        return subprocess.CompletedProcess(command, 0, '{"program": "", "flags": 0}', "")

    monkeypatch.setattr(subprocess, "run", held_up)
    waiting = [seccomp_artifact.compiled(profile, 0) for profile in asked]
    try:
        for _ in range(seccomp_artifact.COMPILERS):
            begun.get()
        assert [future.running() for future in waiting] == [True, True, False, False, False]
        assert waiting[-1].cancel()
    finally:
        end.set()
    for future in waiting[:-1]:
        assert future.result() == seccomp_profile.Filter(b"", 0)
    assert begun.qsize() == len(asked) - 1 - seccomp_artifact.COMPILERS
