"""ExecSync: a command in a running container, its output captured up to the bounds of `captures`.

The command has a cgroup of its own, so that its whole tree is killed when its time is over. A child that keeps the
pipe open after the command has ended does not delay the reply.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from nodeagent.cgroups.group import Cgroup
from nodeagent.errors import NodeAgentError
from nodeagent.lifecycle.containers.captures import Captures
from nodeagent.lifecycle.plan import execs
from nodeagent.lifecycle.supervisors.cgroup_files import supervisor_files
from nodeagent.records import Container
from nodeagent.sandbox.agent.client import ExecIO, Supervisor
from nodeagent.sandbox.spec import ExecPlan

KILL_PATIENCE_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecResult:
    """The output of the command, as much as was kept of it, and its exit code (128 + n for signal n)."""

    stdout: bytes
    stderr: bytes
    exit_code: int


async def exec_sync(
    supervisor: Supervisor,
    group: Cgroup,
    captures: Captures,
    container: Container,
    argv: tuple[str, ...],
    timeout_s: float,
) -> ExecResult:
    """Run a command to its end. timeout_s 0 is no limit; raises TimeoutError when it is over, with the tree killed.

    The supervisor kills it in time; a process that cannot be killed, in a frozen container, is not waited for.
    """
    plan = execs.plan(container, argv, timeout_s=timeout_s)
    try:
        async with asyncio.timeout(timeout_s + KILL_PATIENCE_SECONDS if timeout_s else None):
            return await _run(supervisor, group, captures, plan)
    except TimeoutError as error:
        if str(error):
            raise  # not of the command, but of its supervisor, which does not answer
        raise TimeoutError(
            f'container "{container.id}": {argv[0]!r} ran longer than {timeout_s:g} s'
        ) from None


async def _run(
    supervisor: Supervisor, group: Cgroup, captures: Captures, plan: ExecPlan
) -> ExecResult:
    child = execs.new_group(group)
    what = f'container "{plan["container"]}": output of {plan["argv"][0]!r}'
    try:
        with (
            captures.open(what) as stdout,
            captures.open(what) as stderr,
            supervisor_files(child) as fds,
        ):
            streams = ExecIO(stdin=None, stdout=stdout.writer, stderr=stderr.writer)
            try:
                command = await supervisor.exec(plan, streams, fds)
                stdout.start()
                stderr.start()
                end = await command.wait()
            except asyncio.CancelledError:
                # Not through the supervisor: it may itself be blocked by the command, in a pipe that this one holds.
                with suppress(NodeAgentError, OSError):  # a group that went with its container
                    await asyncio.to_thread(child.kill)
                raise
            stdout.drain()
            stderr.drain()
            if end.timed_out:
                raise TimeoutError
            return ExecResult(stdout=stdout.take(), stderr=stderr.take(), exit_code=end.code)
    finally:
        await asyncio.to_thread(group.discard, child)
