"""One run: a plan on a simulated machine, with clients, faults, and a manager that keeps the agent running."""

import asyncio
import contextvars
import logging
import shutil
import sqlite3
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from nodeagent.config import Config, Network
from nodeagent.errors import AlreadyExists, NodeAgentError, NotFound
from nodeagent.lifecycle.node import Node
from nodeagent.requests import ContainerConfig, Profile, SandboxConfig
from nodeagent.store import Store
from nodeagent.tasks import Caller, caller
from tests.chaos.simulation import node as simulated
from tests.chaos.simulation.loop import LIFE, Deadlock, Livelock, Loop
from tests.chaos.simulation.machine import Machine, Window
from tests.chaos.simulation.node import Agent
from tests.chaos.simulation.oracle import Oracle, Violation
from tests.chaos.simulation.plan import Fault, Op, Plan

PATIENCE = 300.0  # of the whole run after its last fault, in virtual seconds
LOOK_EVERY = 8
REST_SECONDS = 400.0  # the reconciliation removes what two of its looks have found
KILL_SECONDS = 20.0
UNCONFINED = Profile(kind="unconfined")
RETRIES = 4


class Disconnected(Exception):
    """The agent has died under a call, or does not run."""


@dataclass
class PodKnown:
    """A pod as the clients know it, by its number."""

    attempt: int = 0
    id: str = ""
    containers: dict[int, str] = field(default_factory=dict)
    attempts: dict[int, int] = field(default_factory=dict)


@dataclass
class Outcome:
    """What came of a run. violation: empty where all held."""

    violation: str
    digest: int
    turns: int
    lines: list[str]


class Run:
    def __init__(self, plan: Plan, directory: Path, *, is_traced: bool = False) -> None:
        self.plan = plan
        self.random = Random(plan.seed)
        self.loop = Loop(self.random)
        self.machine = Machine(self.loop, self.random, str(directory))
        self.machine.is_traced = is_traced
        self.oracle = Oracle(self.machine)
        self.directory = directory
        self.database = database()
        self.agent: Agent | None = None
        self.context = contextvars.copy_context()
        self.ended = asyncio.Event()
        self.changed = asyncio.Event()
        self.calls: set[asyncio.Future[Any]] = set()
        self.pods = {number: PodKnown() for number in range(4)}
        self.failed: set[int] = set()  # numbers of pods of which something failed
        self.bursts = 0
        self.told: set[Any] = set()  # what calls have returned
        self.is_over = False
        self.starts = 0
        self.violation = ""
        slots = self.random.choice((0, 0, 1, 2))
        self.config = Config(slots=slots, network=Network(subnet4="10.0.0.0/24"))
        self.log = Records(self.machine)

    # --- the whole ---

    def run(self) -> Outcome:
        simulated.machine = self.machine
        self.loop.on_turn = self._turn
        self.loop.on_death = self.ended.set
        logger = logging.getLogger("nodeagent")
        logger.addHandler(self.log)
        try:
            self.loop.run_until_complete(self._main())
            self._check_log()
        except (Violation, Deadlock, Livelock) as error:
            self.violation = self.violation or f"{type(error).__name__}: {error}"
        finally:
            logger.removeHandler(self.log)
            self._close()
        return Outcome(self.violation, self.machine.digest, self.loop.turns, self.machine.lines)

    def _close(self) -> None:
        if self.agent is not None and not self.agent.life.is_dead:
            self.loop.kill(self.agent.life)
            self.loop._bury()
        self.machine.life = None
        for task in self.loop.tasks:
            if not task.done():
                task.close()
        self.machine.forget_descriptors()
        self.loop.close()
        self.database.close()

    def _turn(self) -> None:
        if self.violation:
            raise Violation(self.violation)
        if self.loop.failures:
            context = self.loop.failures[0]
            raise Violation(f"unheard: {context.get('message')}: {context.get('exception')!r}")
        agent = self.agent
        if (
            self.loop.turns % LOOK_EVERY == 0
            and agent is not None
            and agent.is_serving
            and agent.node
        ):
            self.oracle.look(agent.node)
            self.oracle.addresses()

    def _check_log(self) -> None:
        if self.log.bad:
            raise Violation(f"log: {self.log.bad[0]}")

    async def _main(self) -> None:
        self.machine.loop = self.loop
        keeper = asyncio.create_task(self._keep_agent())
        faults = asyncio.create_task(self._strike())
        clients = [asyncio.create_task(self._client(program)) for program in self.plan.programs]
        try:
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*clients)
                await faults
                await asyncio.sleep(max([0.0, *(f.seconds for f in self.plan.faults)]))
        except TimeoutError:
            raise Violation(f"clients hang: {self._what_hangs()}") from None
        self.machine.windows.clear()
        self.machine.kill_at = 0
        await self._at_rest()
        self.is_over = True
        await self._end()
        keeper.cancel()

    def _what_hangs(self) -> str:
        tasks = self.loop.tasks_of(self.agent.life) if self.agent else []
        return "; ".join(f"{task.get_name()}: {where(task)}" for task in tasks if not task.done())[
            :1500
        ]

    # --- the manager of the service ---

    async def _keep_agent(self) -> None:
        while not self.is_over:
            await self._live()
            await asyncio.sleep(self.random.choice((0.0, 0.01, 0.2, 1.0)))

    async def _live(self) -> None:
        self.starts += 1
        agent = Agent(self.starts, self.directory, self.database, self.config)
        agent.began_ns = self.machine.time_ns()
        self.agent = agent
        self.machine.life = agent.life
        self.context = contextvars.copy_context()
        self.context.run(LIFE.set, agent.life)
        self.ended.clear()
        self.machine.trace("agent starts")
        task = self.loop.create_task(agent.run(), context=self.context)
        task.set_name("agent")
        task.add_done_callback(partial(self._agent_ended, agent))
        self.changed.set()
        await self.ended.wait()
        self._bereave()

    def _agent_ended(self, agent: Agent, task: "asyncio.Task[None]") -> None:
        if agent.life.is_dead:
            return
        agent.is_serving = False
        error = None if task.cancelled() else task.exception()
        left = [t for t in self.loop.tasks_of(agent.life) if t is not task]
        if error is not None and not isinstance(error, NodeAgentError | OSError | TimeoutError):
            self.violation = f"the agent ended with {error!r}"
        elif error is None and left:
            self.violation = f"tasks left: {[where(t) for t in left]}"
        self.machine.trace(f"agent ended: {error!r}")
        agent.life.is_dead = True
        self.ended.set()

    def kill_agent(self) -> None:
        if self.agent is not None and not self.agent.life.is_dead:
            self.machine.trace("agent killed")
            self.loop.kill(self.agent.life)

    def _bereave(self) -> None:
        """Tell clients, and the machine, that the agent has gone."""
        self.machine.forget_descriptors()
        for call in list(self.calls):
            if not call.done():
                call.set_exception(Disconnected())
        self.calls.clear()
        if self.agent is not None:
            self.agent.is_serving = False

    # --- faults ---

    async def _strike(self) -> None:
        for fault in self.plan.faults:
            await asyncio.sleep(max(0.0, fault.at - self.loop.time()))
            self.machine.trace(f"fault {fault}")
            getattr(self, f"_do_{fault.kind}", partial(self._open_window, fault.kind))(fault)
        await asyncio.sleep(0.05)

    def _open_window(self, kind: str, fault: Fault) -> None:
        probability = 1.0 if kind == "hang" else (1.0, 0.5, 0.1)[fault.number % 3]
        self.machine.windows.append(Window(kind, self.loop.time() + fault.seconds, probability))

    def _do_crash(self, _fault: Fault) -> None:
        self.kill_agent()

    def _do_crash_at_step(self, fault: Fault) -> None:
        self.machine.kill_at = self.machine.steps + 1 + fault.number

    def _do_term(self, _fault: Fault) -> None:
        if self.agent is not None:
            self.agent.stop.set()

    def _do_reboot(self, _fault: Fault) -> None:
        self.kill_agent()
        self.machine.reboot()
        shutil.rmtree(self.directory / "state", ignore_errors=True)

    def _do_kill_supervisor(self, fault: Fault) -> None:
        alive = [pod.supervisor for pod in self.machine.pods.values() if pod.supervisor is not None]
        if alive:
            alive[fault.number % len(alive)].kill()

    def _do_kill_launcher(self, _fault: Fault) -> None:
        if self.machine.launcher is not None:
            self.machine.launcher.kill()

    def _do_kill_both(self, fault: Fault) -> None:
        self._do_kill_launcher(fault)
        self._do_kill_supervisor(fault)

    # --- calls ---

    async def call(
        self,
        method: str,
        work: Callable[[Node], Coroutine[Any, Any, Any]],
        *,
        goes_on: bool = True,
    ) -> Any:
        """Call the agent, as over gRPC: what changes something goes on when its caller gives up."""
        agent = self.agent
        if agent is None or not agent.is_serving or agent.node is None or agent.calls is None:
            raise Disconnected
        calls = agent.calls
        answer: asyncio.Future[Any] = self.loop.create_future()
        waiting, context = Caller(), self.context.copy()
        context.run(caller.set, waiting)
        behaviour = self._answered(work(agent.node), waiting)
        task = context.run(lambda: calls.start("rpc", behaviour, about=method))
        self.calls.add(answer)
        task.add_done_callback(partial(self._pass_on, agent, method, answer))
        try:
            result = await answer
        except asyncio.CancelledError:
            waiting.has_gone = True
            if not goes_on:
                task.cancel()
            raise
        except (NodeAgentError, OSError) as error:
            self.machine.trace(f"{method}: {type(error).__name__}: {error}")
            raise
        self.machine.trace(f"{method}: {result if isinstance(result, str) else 'ok'}")
        return result

    async def _answered(self, work: Coroutine[Any, Any, Any], waiting: Caller) -> Any:
        result = await work
        if not waiting.has_gone and isinstance(result, str):
            self.told.add(result)
        return result

    def _pass_on(
        self, agent: Agent, method: str, answer: asyncio.Future[Any], task: asyncio.Task[Any]
    ) -> None:
        """Give the result of a call to the client, if it still waits."""
        self.calls.discard(answer)
        if agent.life.is_dead:
            return
        error: BaseException | None = Disconnected() if task.cancelled() else task.exception()
        if not isinstance(error, NodeAgentError | OSError | Disconnected | None):
            self.violation = f"{method}: INTERNAL: {error!r}"
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(task.result())

    # --- clients ---

    async def _client(self, program: list[Op]) -> None:
        for op in program:
            for _ in range(2):
                try:
                    async with asyncio.timeout(op.patience):
                        await self.perform(op)
                except Disconnected:
                    await self._until_served(30.0)
                    continue
                except (NodeAgentError, OSError):  # also a patience that has ended
                    self.failed.add(op.pod)
                break
            await asyncio.sleep(op.pause)

    async def _until_served(self, seconds: float) -> None:
        end = self.loop.time() + seconds
        while not self._is_served() and self.loop.time() < end:  # noqa: ASYNC110 as clients do it
            await asyncio.sleep(0.02)

    def _is_served(self) -> bool:
        return self.agent is not None and self.agent.is_serving

    async def perform(self, op: Op) -> None:
        pod = self.pods[op.pod]
        await getattr(self, f"_{op.kind}")(op, pod)

    async def _shared_run(self, op: Op, pod: PodKnown) -> None:
        config = SandboxConfig(
            name=f"p{op.pod}", uid=f"u{op.pod}", namespace="ns", attempt=pod.attempt
        )
        attempt = pod.attempt
        try:
            sandbox_id = await self.call("run", lambda node: node.sandboxes.run(config))
        except AlreadyExists:
            self._require_told(config)
            raise
        self.oracle.sandbox(sandbox_id)
        if pod.attempt == attempt:
            pod.id = sandbox_id

    async def _run(self, op: Op, pod: PodKnown) -> None:
        if not pod.id:
            await self._shared_run(op, pod)

    def _require_told(self, config: SandboxConfig) -> None:
        """A name that is refused belongs to what can be seen, and of which somebody was told, or the agent has died."""
        agent = self.agent
        if agent is None or not agent.is_serving or agent.node is None:
            return
        identity = config.name, config.attempt
        found = [
            s for s in agent.node.sandboxes.list() if (s.config.name, s.config.attempt) == identity
        ]
        if not found:
            raise Violation(f"pod {config.name}: its name is taken by nothing that is listed")
        if found[0].id not in self.told and found[0].created_at > agent.began_ns:
            raise Violation(
                f"pod {config.name}: was made for a caller that gave up, and is refused to the next"
            )

    async def _create(self, op: Op, pod: PodKnown) -> None:
        await self._run(op, pod)
        sandbox_id, number = pod.id, op.container
        if number in pod.containers:
            return
        config = ContainerConfig(
            name=f"c{number}", attempt=pod.attempts.get(number, 0), image="image", command=(op.program or "runs",),
            seccomp=UNCONFINED, apparmor=UNCONFINED,
        )  # fmt: skip
        container_id = await self.call(
            "create", lambda node: node.creation.create(sandbox_id, config)
        )
        self.oracle.container(container_id)
        self.oracle.pod_of[container_id] = sandbox_id
        if pod.id == sandbox_id:
            pod.containers[number] = container_id

    async def _start(self, op: Op, pod: PodKnown) -> None:
        if op.container not in pod.containers:
            await self._create(op, pod)
        container_id = pod.containers.get(op.container, "")
        await self.call("start", lambda node: node.containers.start(container_id))

    async def _stop(self, op: Op, pod: PodKnown) -> None:
        container_id = pod.containers.get(op.container)
        if container_id is None:
            return
        timeout = (0.0, 0.01, 2.0)[len(op.program) % 3]
        known = self.oracle.container(container_id)
        was_started = known.state in {"running", "exited"}
        await self.call("stop", lambda node: node.stopping.stop(container_id, timeout))
        known.is_stopped = known.is_stopped or was_started

    async def _remove(self, op: Op, pod: PodKnown) -> None:
        container_id = pod.containers.get(op.container)
        if container_id is None:
            return
        known = self.oracle.container(container_id)
        known.is_going = True
        await self.call("remove", lambda node: node.containers.remove(container_id))
        self.oracle.removed.add(container_id)
        if pod.containers.get(op.container) == container_id:
            del pod.containers[op.container]

    async def _exec(self, op: Op, pod: PodKnown) -> None:
        container_id = pod.containers.get(op.container)
        if container_id is None:
            return
        timeout = (0.0, 0.0, 1.0)[op.pod + op.container]
        await self.call(
            "exec", lambda node: node.containers.exec_sync(container_id, ("x",), timeout), goes_on=False
        )  # fmt: skip

    async def _stop_pod(self, _op: Op, pod: PodKnown) -> None:
        await self._stop_sandbox(pod.id)

    async def _stop_sandbox(self, sandbox_id: str) -> None:
        if not sandbox_id:
            return
        watch = asyncio.create_task(self._must_kill(sandbox_id))
        try:
            await self.call("stop_pod", lambda node: node.sandboxes.stop(sandbox_id))
        finally:
            watch.cancel()
        self.oracle.sandbox(sandbox_id).is_stopped = True
        for container_id, owner in self.oracle.pod_of.items():
            if owner == sandbox_id:
                self.oracle.container(container_id).is_stopped = True

    async def _must_kill(self, sandbox_id: str) -> None:
        """Whatever a stop has to wait for, what runs in the pod is killed at once."""
        agent, pod = self.agent, self.machine.pods.get(sandbox_id)
        running = [c for c in pod.containers.values() if c.is_executed] if pod else []
        await asyncio.sleep(KILL_SECONDS)
        if agent is self.agent and any(c.is_alive for c in running) and not self._is_struck():
            self.violation = f"StopPodSandbox: containers run after {KILL_SECONDS:g} s"

    def _is_struck(self) -> bool:
        """Whether a fault that can make calls fail has struck in the last while."""
        since = self.loop.time() - KILL_SECONDS
        return any(
            window.until > since and window.kind != "hang" for window in self.machine.windows
        )

    async def _burst(self, op: Op, pod: PodKnown) -> None:
        """Creations at one moment, of which some fail."""
        await self._run(op, pod)
        sandbox_id = pod.id
        self.bursts += 1
        burst = self.bursts

        async def create(number: int, image: str) -> None:
            config = ContainerConfig(
                name=f"b{burst}-{number}", image=image, command=("runs",),
                seccomp=UNCONFINED, apparmor=UNCONFINED,
            )  # fmt: skip
            for _ in range(self.random.randrange(6)):
                await asyncio.sleep(0)
            try:
                created = await self.call(
                    "create", lambda node: node.creation.create(sandbox_id, config)
                )
            except NotFound as error:
                if f'"{image}"' not in str(error) and sandbox_id not in str(error):
                    self.violation = f"a creation of {image} fails with {error}"
                return
            self.oracle.container(created)
            self.oracle.pod_of[created] = sandbox_id

        images = ("image", "nowhere", "image", "nowhere")
        await asyncio.gather(*(create(*one) for one in enumerate(images)))

    async def _remove_pod(self, _op: Op, pod: PodKnown) -> None:
        sandbox_id = pod.id
        await self._remove_sandbox(sandbox_id)
        if pod.id == sandbox_id:
            pod.id = ""
            pod.containers.clear()

    async def _remove_sandbox(self, sandbox_id: str) -> None:
        if not sandbox_id:
            return
        self.oracle.sandbox(sandbox_id).is_going = True
        for container_id, owner in self.oracle.pod_of.items():
            if owner == sandbox_id:
                self.oracle.container(container_id).is_going = True
        await self.call("remove_pod", lambda node: node.sandboxes.remove(sandbox_id))
        self.oracle.removed.add(sandbox_id)
        for container_id, owner in self.oracle.pod_of.items():
            if owner == sandbox_id:
                self.oracle.container(container_id).is_going = True
                self.oracle.removed.add(container_id)

    async def _list(self, _op: Op, _pod: PodKnown) -> None:
        if self.agent is not None and self.agent.is_serving and self.agent.node is not None:
            self.oracle.look(self.agent.node)

    # --- rest ---

    async def _bounded(self, what: str, seconds: float, work: Coroutine[Any, Any, Any]) -> Any:
        timer = asyncio.timeout(seconds)
        try:
            async with timer:
                return await work
        except TimeoutError:
            if not timer.expired():
                raise  # the agent's own
            raise Violation(
                f"{what}: takes more than {seconds:g} s: {self._what_hangs()}"
            ) from None

    async def _insist(self, what: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """What fails is tried again: without a fault it succeeds soon."""
        error: Exception | None = None
        for _ in range(RETRIES):
            try:
                await self._bounded(what, 120.0, work())
                return
            except (NodeAgentError, OSError, Disconnected) as raised:
                error = raised
                await self._until_served(60.0)
                await asyncio.sleep(1.0)
        raise Violation(f"{what}: fails without a fault: {error!r}")

    async def _at_rest(self) -> None:
        await self._until_served(120.0)
        if self.agent is None or not self.agent.is_serving:
            raise Violation(f"the agent does not start: {self._what_hangs()}")
        node = self.agent.node
        assert node is not None
        await asyncio.sleep(20.0)  # for what nobody waits for any more
        for sandbox in node.sandboxes.list():
            await self._insist("StopPodSandbox", partial(self._stop_sandbox, sandbox.id))
            await self._insist("RemovePodSandbox", partial(self._remove_sandbox, sandbox.id))
        await self._insist("names", self._use_names)
        await asyncio.sleep(REST_SECONDS)
        agent = self.agent
        if not agent.is_serving or agent.node is None or agent.base is None:
            raise Violation("the agent has ended by itself")
        self.oracle.look(agent.node)
        self.oracle.nothing_left(agent.node, agent.base)

    async def _use_names(self) -> None:
        """Every name can be used again."""
        for number in sorted(self.failed or {0}):
            self.pods[number] = pod = PodKnown()
            await self._shared_run(Op("run", number), pod)
            await self._start(Op("start", number, 0), pod)
            await self._remove_sandbox(pod.id)

    async def _end(self) -> None:
        agent = self.agent
        assert agent is not None
        agent.stop.set()
        await self._bounded("SIGTERM", 60.0, self.ended.wait())
        await asyncio.sleep(2.0)
        self.oracle.end()


class Records(logging.Handler):
    """What the agent logs that it should not: tracebacks."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(logging.ERROR)
        self.bad: list[str] = []
        self._machine = machine

    def emit(self, record: logging.LogRecord) -> None:
        if self._machine.life is None or self._machine.life.is_dead:
            return
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, NodeAgentError | OSError):
            self.bad.append(record.getMessage())


def where(task: Any) -> str:
    """The functions that a task is in."""
    found, coro = [], task.get_coro()
    while coro is not None and hasattr(coro, "cr_frame"):
        if coro.cr_frame is not None:
            found.append(f"{coro.__name__}:{coro.cr_frame.f_lineno}")
        coro = coro.cr_await
    return ">".join(found)


_template = b""


def database() -> sqlite3.Connection:
    """A new database in memory, with its tables."""
    global _template  # noqa: PLW0603
    if not _template:
        empty = Store.copy_of(Path("/there/is/none"))
        _template = empty._db.serialize()
        empty.close()
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.deserialize(_template)
    return connection


def fresh(directory: Path) -> Path:
    for each in ("root", "state"):
        shutil.rmtree(directory / each, ignore_errors=True)
    return directory


def run_plan(plan: Plan, directory: Path, *, is_traced: bool = False) -> Outcome:
    """Run a plan in an empty directory, which is best on a tmpfs."""
    run = Run(plan, fresh(directory), is_traced=is_traced)
    return run.run()
