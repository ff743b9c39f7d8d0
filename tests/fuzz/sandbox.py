"""What the files of an image and the processes of a container say, and the peers of the supervisors' protocol."""

import array
import asyncio
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nodeagent.errors import InvalidArgument, NodeAgentError, NotFound, Unsupported
from nodeagent.sandbox import protocol
from nodeagent.sandbox.agent.channel import Channel
from nodeagent.sandbox.init import users
from nodeagent.sandbox.runtime import peers
from nodeagent.sandbox.runtime.loop import Loop
from nodeagent.sandbox.seccomp import profile as seccomp_profile
from nodeagent.sandbox.spec import UserRequest
from nodeagent.sandbox.supervisor import logs
from nodeagent.sandbox.supervisor.journal import CHUNK_BYTES, REGION_BYTES, Journal, Spool, Transfer
from tests.fuzz.target import Target, in_steps

# ---- /etc/passwd and /etc/group ----

REQUESTS: tuple[UserRequest, ...] = tuple(
    UserRequest(
        uid=uid, username=username, gid=None, groupname=group, groups=[7], merge_groups=True
    )
    for uid, username, group in ((None, "app", "staff"), (1000, "", ""), (None, "", "é"))
)


def users_and_groups(data: bytes) -> None:
    passwd, _, group = data.partition(b"\n\n")
    missing = 0
    for request in REQUESTS:
        try:
            found = users.identify(request, passwd, group)
        except NotFound:
            missing += 1
            continue
        for number in (found["uid"], found["gid"], *found["groups"]):
            assert 0 <= number < (1 << 32) - 1
        assert found["home"]
        assert not {"\0", "\n"} & {*found["home"]}
    assert missing < len(REQUESTS)


USERS = (
    b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:\n\nstaff:x:50:app,b\n\xc3\xa9:x:9:",
    b"app:x:4294967294:1\n#\n+::\n\nstaff:x:1:,\n",
)


# ---- the protocol ----


def packet(data: bytes) -> None:
    """A packet as it comes, and through a memfd; the first byte decides how many descriptors come with it."""
    count, text = (data[0] % 4 if data else 0), data[1:]
    with _pair() as (ours, theirs):
        for sent in (text, b"\0"):
            with _memfd(text) as memfd:
                rights = array.array("i", [memfd] * (count if sent is text else count + 1))
                ours.sendmsg([sent], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            message = protocol.receive(theirs)
            if message is not None:
                assert isinstance(message.body, dict)
                assert len(message.fds) == count
                protocol.close_all(message.fds)


def operation(data: bytes) -> None:
    """What a supervisor does with what it is asked, and what it says to that."""
    loop = Loop()

    def take(request: peers.Request) -> None:
        descriptors = request.take_all("x")
        try:
            request.reply({"id": protocol.checked_id(request.body["container"])}, descriptors)
        finally:
            protocol.close_all(descriptors)

    with _pair() as (ours, theirs), _memfd(data[1:]) as memfd:
        peer = peers.Peer(
            loop,
            theirs,
            lambda peer, message: peers.perform("x", {"take": take}, peer, message),
            _ended,
        )
        many = data[:1] > b"\x7f"
        protocol.send(ours, data[1:] or b"{}", [memfd] if many else [])
        ours.shutdown(socket.SHUT_WR)
        peer.drain()
        while answer := protocol.receive(ours):
            assert {"result", "error"} & {*answer.body}
            protocol.close_all(answer.fds)


def _ended(_peer: peers.Peer) -> None:
    pass


def reply(data: bytes) -> None:
    """What the agent does with what it is answered; the first byte decides how many descriptors come with it."""
    asyncio.run(_ask(data))


async def _ask(data: bytes) -> None:
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, about: failures.append(about))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ended = asyncio.Event()
    channel = Channel(ours, "supervisor", lambda event: event["event"], ended.set)
    try:
        with theirs, _memfd(b"") as memfd:
            fds = [memfd] * (data[0] % 3 if data else 0)
            protocol.send(theirs, protocol.encode({"id": 0, "result": protocol.spoken()}))
            await channel.agree()
            asking = asyncio.create_task(channel.request("state"))
            await asyncio.sleep(0)
            protocol.send(theirs, data[1:] or b"{}", fds)
            theirs.shutdown(socket.SHUT_WR)
            answer = await asking
            protocol.close_all(answer.fds.values())
    finally:
        await ended.wait()
        channel.forget()
        assert not failures


@contextmanager
def _pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


@contextmanager
def _memfd(data: bytes) -> Iterator[int]:
    memfd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
    try:
        os.write(memfd, data)
        yield memfd
    finally:
        os.close(memfd)


def descriptors_kept(parse: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """The same, which must leave no descriptor behind."""

    def checked(data: bytes) -> None:
        before = os.listdir("/proc/self/fd")
        try:
            parse(data)
        finally:
            assert len(os.listdir("/proc/self/fd")) == len(before)

    checked.__name__ = parse.__name__
    return checked


PACKETS = (
    b'\x01{"id":1,"op":"take","fds":["x"],"container":"c1"}',
    b'\x81{"id":2,"op":"take","fds":["x","x"],"container":"../c"}',
    b'\x00{"id":3,"op":"take"}',
    b'\x00{"id":"a","op":["x"],"fds":{}}',
    b'\x80{"id":null,"op":"' + b"\\u0001" * 60 + b'"}',
)
REPLIES = (
    b'\x01{"id":1,"result":{"fds":["log"],"pid":7}}',
    b'\x00{"id":1,"result":{}}',
    b'\x00{"id":1,"error":"NotFound","text":"no"}',
    b'\x00{"id":1,"error":"OSError","text":"no","errno":2,"path":"/a"}',
    b'\x00{"id":null,"error":"InvalidArgument","text":"what?"}',
    b'\x02{"event":"exit","container":"c"}',
)


# ---- logs ----

LINE = re.compile(rb"S stdout (?P<tag>[FP]) (?P<text>[^\n]*)\n")


def log_lines(data: bytes) -> None:
    """Whatever is written, in whatever parts, the log has it back."""
    rest, output = b"", b""
    for part in in_steps(data):
        lines, rest = logs.format_lines(rest + part, b"S", b"stdout")
        assert len(rest) <= logs.MAX_LINE_BYTES
        output += lines
    output += logs.format_end(rest, b"S", b"stdout")
    found = [LINE.fullmatch(line) for line in re.findall(rb"[^\n]*\n?", output) if line]
    text = b"".join(
        match["text"] + (b"\n" if match["tag"] == b"F" else b"") for match in found if match
    )
    assert all(found)
    assert text == data[1:]


LOGS = (b"\x03one\ntwo\n\nthree", b"\0" + b"x" * (logs.MAX_LINE_BYTES + 1) + b"\n\n")


def journal(data: bytes) -> None:
    """Whatever a journal holds, a supervisor takes over and goes on with it."""
    with _memfd(data) as file:
        for stream in ("stdout", "stderr"):
            spool = Spool(file, stream)
            assert len(spool.read()) == spool.length <= CHUNK_BYTES
        found = Journal(file, "stdout")
        assert len(found.rest) <= logs.MAX_LINE_BYTES
        if found.transfer is not None:
            found.commit()
            assert len(found.rest) <= logs.MAX_LINE_BYTES
        found.begin(b"next", Transfer(1, 2))
        again = Journal(file, "stdout")
        assert (again.rest, again.transfer) == (found.rest, found.transfer)


def journals() -> Iterator[bytes]:
    with _memfd(b"") as file:
        written = Journal(file, "stdout")
        written.begin(b"rest", Transfer(3, 4))
        yield os.pread(file, REGION_BYTES, 0)
        written.commit()
        yield os.pread(file, REGION_BYTES, 0)


# ---- seccomp ----


def seccomp(data: bytes) -> None:
    compiled = seccomp_profile.from_json.__wrapped__(data, 1 << 21)
    assert len(compiled.program) % 8 == 0


PROFILES = tuple(
    json.dumps(profile).encode()
    for profile in (
        {
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 1,
            "archMap": [
                {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
                {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
            ],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [
                {"names": ["read", "write", "openat2"], "action": "SCMP_ACT_ALLOW"},
                {
                    "names": ["personality"],
                    "action": "SCMP_ACT_ALLOW",
                    "args": [{"index": 0, "value": 8, "valueTwo": 8, "op": "SCMP_CMP_MASKED_EQ"}],
                    "includes": {"caps": ["CAP_SYS_ADMIN"], "minKernel": "4.8"},
                    "excludes": {"arches": ["arm64"]},
                },
            ],
        },
        {
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"],
            "syscalls": [
                {"name": "kill", "action": "SCMP_ACT_KILL"},
                {"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5, "args": []},
                {
                    "names": ["socket"],
                    "action": "SCMP_ACT_LOG",
                    "args": [
                        {"index": 0, "value": 1, "op": "SCMP_CMP_GE"},
                        {"index": 0, "value": 16, "op": "SCMP_CMP_NE"},
                    ],
                },
            ],
        },
    )
)


TARGETS = (
    Target(users_and_groups, (InvalidArgument,), USERS),
    Target(descriptors_kept(packet), (ValueError,), PACKETS),
    Target(descriptors_kept(operation), (), PACKETS),
    Target(descriptors_kept(reply), (NodeAgentError, OSError, TimeoutError), REPLIES),
    Target(log_lines, (), LOGS),
    Target(journal, (), tuple(journals())),
    Target(seccomp, (InvalidArgument, Unsupported), PROFILES),
)
