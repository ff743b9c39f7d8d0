"""The clients: what the calls of a plan are, and what the clients know and may expect."""

import asyncio
from dataclasses import dataclass, field

from nodeagent.errors import AlreadyExists, NodeAgentError, NotFound
from nodeagent.records import Sandbox
from nodeagent.requests import ContainerConfig, Namespaces, PortMapping, Profile, SandboxConfig
from tests.chaos.simulation.oracle import Oracle
from tests.chaos.simulation.plan import Op
from tests.chaos.simulation.service import Disconnected, Service
from tests.chaos.simulation.verdict import Violation

KILL_SECONDS = 20.0
UNCONFINED = Profile(kind="unconfined")


@dataclass
class PodKnown:
    """A pod as the clients know it, by its number."""

    attempt: int = 0
    id: str = ""
    containers: dict[int, str] = field(default_factory=dict)
    attempts: dict[int, int] = field(default_factory=dict)


def _namespaces(pod: int) -> Namespaces:
    """The containers of every other pod share a PID namespace."""
    return Namespaces(pid="pod" if pod % 2 else "container")


class Clients:
    """All clients, who share what they know. failed: numbers of pods of which something failed."""

    def __init__(self, service: Service, oracle: Oracle) -> None:
        self.oracle = oracle
        self._service = service
        self._machine = service.machine
        self.failed: set[int] = set()
        self.pods = {number: PodKnown() for number in range(4)}
        self._bursts = self._uses = 0

    async def go_through(self, program: list[Op]) -> None:
        for op in program:
            for _ in range(2):
                try:
                    async with asyncio.timeout(op.patience):
                        await self._perform(op)
                except Disconnected:
                    await self._service.until_served(30.0)
                    continue
                except (NodeAgentError, OSError):  # also a patience that has ended
                    self.failed.add(op.pod)
                break
            await asyncio.sleep(op.pause)

    async def _perform(self, op: Op) -> None:
        pod = self.pods[op.pod]
        await getattr(self, f"_{op.kind}")(op, pod)

    async def _shared_run(self, op: Op, pod: PodKnown) -> None:
        port = PortMapping(protocol="tcp", container_port=80, host_port=8000 + op.pod)
        config = SandboxConfig(
            name=f"p{op.pod}",
            uid=f"u{op.pod}",
            namespace="ns",
            attempt=pod.attempt,
            port_mappings=(port,),
            namespaces=_namespaces(op.pod),
        )
        attempt = pod.attempt
        try:
            sandbox_id = await self._service.call("run", lambda node: node.sandboxes.run(config))
        except AlreadyExists as error:
            self._require_told(config, error)
            raise
        self.oracle.sandbox(sandbox_id)
        if pod.attempt == attempt:
            pod.id = sandbox_id

    async def _run(self, op: Op, pod: PodKnown) -> None:
        if not pod.id:
            await self._shared_run(op, pod)

    def _require_told(self, config: SandboxConfig, error: AlreadyExists) -> None:
        """A name that is refused belongs to what can be seen, and of which somebody was told, or the agent has died."""
        agent = self._service.agent
        if agent is None or not agent.is_serving or agent.node is None:
            return
        identity = config.name, config.attempt
        found = [
            s for s in agent.node.sandboxes.list() if (s.config.name, s.config.attempt) == identity
        ]
        if not found:
            raise Violation(f"pod {config.name}: its name is taken by nothing listed: {error}")
        if found[0].id not in self._service.told and found[0].created_at > agent.began_ns:
            raise Violation(
                f"pod {config.name}: was made for a caller that gave up, and is refused to the next"
            )

    async def _create(self, op: Op, pod: PodKnown) -> None:
        await self._run(op, pod)
        sandbox_id, number = pod.id, op.container
        if number in pod.containers:
            return
        config = ContainerConfig(
            name=f"c{number}", namespaces=_namespaces(op.pod),
            attempt=pod.attempts.get(number, 0), image="image", command=(op.program or "runs",),
            seccomp=UNCONFINED, apparmor=UNCONFINED,
        )  # fmt: skip
        container_id = await self._service.call(
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
        await self._service.call("start", lambda node: node.containers.start(container_id))

    async def _stop(self, op: Op, pod: PodKnown) -> None:
        container_id = pod.containers.get(op.container)
        if container_id is None:
            return
        self._machine.asked.add(container_id)
        timeout = (0.0, 0.01, 2.0)[len(op.program) % 3]
        known = self.oracle.container(container_id)
        was_started = known.state in {"running", "exited"}
        await self._service.call("stop", lambda node: node.stopping.stop(container_id, timeout))
        known.is_stopped = known.is_stopped or was_started

    async def _remove(self, op: Op, pod: PodKnown) -> None:
        container_id = pod.containers.get(op.container)
        if container_id is None:
            return
        self._machine.asked.add(container_id)
        known = self.oracle.container(container_id)
        known.is_going = True
        await self._service.call("remove", lambda node: node.containers.remove(container_id))
        self.oracle.removed.add(container_id)
        if pod.containers.get(op.container) == container_id:
            del pod.containers[op.container]

    async def _exec(self, op: Op, pod: PodKnown) -> None:
        container_id = pod.containers.get(op.container)
        if container_id is None:
            return
        timeout = (0.0, 0.0, 1.0)[op.pod + op.container]
        await self._service.call(
            "exec", lambda node: node.containers.exec_sync(container_id, ("x",), timeout), goes_on=False
        )  # fmt: skip

    async def _stop_pod(self, _op: Op, pod: PodKnown) -> None:
        await self.stop_sandbox(pod.id)

    async def stop_sandbox(self, sandbox_id: str) -> None:
        if not sandbox_id:
            return
        self._machine.asked.add(sandbox_id)
        watch = asyncio.create_task(self._must_kill(sandbox_id))
        try:
            await self._service.call("stop_pod", lambda node: node.sandboxes.stop(sandbox_id))
        finally:
            watch.cancel()
        self.oracle.sandbox(sandbox_id).is_stopped = True
        for container_id, owner in self.oracle.pod_of.items():
            if owner == sandbox_id:
                self.oracle.container(container_id).is_stopped = True

    async def _must_kill(self, sandbox_id: str) -> None:
        """Whatever a stop has to wait for, what runs in the pod is killed at once."""
        agent, pod = self._service.agent, self._machine.pods.get(sandbox_id)
        running = [c for c in pod.containers.values() if c.is_executed] if pod else []
        await asyncio.sleep(KILL_SECONDS)
        if (
            agent is self._service.agent
            and any(c.is_alive for c in running)
            and not self._is_struck()
        ):
            self.oracle.violation = f"StopPodSandbox: containers run after {KILL_SECONDS:g} s"

    def _is_struck(self) -> bool:
        """Whether a fault that can make calls fail has struck in the last while."""
        since = self._machine.loop.time() - KILL_SECONDS
        return any(
            window.until > since and window.kind != "hang" for window in self._machine.windows
        )

    async def _burst(self, op: Op, pod: PodKnown) -> None:
        """Creations at one moment, of which some fail."""
        await self._run(op, pod)
        sandbox_id = pod.id
        self._bursts += 1
        burst = self._bursts

        async def create(number: int, image: str) -> None:
            config = ContainerConfig(
                name=f"b{burst}-{number}", image=image, command=("runs",),
                seccomp=UNCONFINED, apparmor=UNCONFINED,
            )  # fmt: skip
            for _ in range(self._service.random.randrange(6)):
                await asyncio.sleep(0)
            try:
                created = await self._service.call(
                    "create", lambda node: node.creation.create(sandbox_id, config)
                )
            except NotFound as error:
                if f'"{image}"' not in str(error) and sandbox_id not in str(error):
                    self.oracle.violation = f"a creation of {image} fails with {error}"
                return
            self.oracle.container(created)
            self.oracle.pod_of[created] = sandbox_id

        images = ("image", "nowhere", "image", "nowhere")
        await asyncio.gather(*(create(*one) for one in enumerate(images)))

    async def _remove_pod(self, _op: Op, pod: PodKnown) -> None:
        sandbox_id = pod.id
        await self.remove_sandbox(sandbox_id)
        if pod.id == sandbox_id:
            pod.id = ""
            pod.containers.clear()

    async def remove_sandbox(self, sandbox_id: str) -> None:
        if not sandbox_id:
            return
        self._machine.asked.add(sandbox_id)
        self.oracle.sandbox(sandbox_id).is_going = True
        for container_id, owner in self.oracle.pod_of.items():
            if owner == sandbox_id:
                self.oracle.container(container_id).is_going = True
        await self._service.call("remove_pod", lambda node: node.sandboxes.remove(sandbox_id))
        self.oracle.removed.add(sandbox_id)
        for container_id, owner in self.oracle.pod_of.items():
            if owner == sandbox_id:
                self.oracle.container(container_id).is_going = True
                self.oracle.removed.add(container_id)

    async def _list(self, _op: Op, _pod: PodKnown) -> None:
        if (
            self._service.agent is not None
            and self._service.agent.is_serving
            and self._service.agent.node is not None
        ):
            self.oracle.look(self._service.agent.node)

    async def use_sandbox(self, sandbox: Sandbox) -> None:
        """A pod that is READY can have another container."""
        self._uses += 1
        config = ContainerConfig(
            name=f"use{self._uses}", namespaces=sandbox.config.namespaces, image="image", command=("runs",),
            seccomp=UNCONFINED, apparmor=UNCONFINED,
        )  # fmt: skip
        container_id = await self._service.call(
            "create", lambda node: node.creation.create(sandbox.id, config)
        )
        self.oracle.container(container_id)
        self.oracle.pod_of[container_id] = sandbox.id
        await self._service.call("start", lambda node: node.containers.start(container_id))

    async def use_names(self) -> None:
        """Every name can be used again."""
        for number in sorted(self.failed or {0}):
            self.pods[number] = pod = PodKnown()
            await self._shared_run(Op("run", number), pod)
            await self._start(Op("start", number, 0), pod)
            await self.remove_sandbox(pod.id)
