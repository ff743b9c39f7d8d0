"""Random walks: a seed gives the same calls on every runtime, in every state that pods and containers can be in."""

from __future__ import annotations

import random
from collections.abc import Callable

from nodeagent.api import runtime_pb2 as pb
from tests.chaos.differential.caller import Caller, Container, Pod
from tests.chaos.differential.cases import STATE

STEPS = 120
PODS, CONTAINERS = 2, 2
OF_POD = ("run", "stop", "remove", "status", "list", "forward")
OF_CONTAINER = (
    "create start stop remove status exec list exec_url attach reopen update stats".split()
)
WEIGHTS = {"run": 4, "create": 8, "start": 6, "status": 3}


class Walk:
    """What the calls are about, and what has become of it by the calls before."""

    def __init__(self, caller: Caller, seed: int) -> None:
        self._caller = caller
        self._rng = random.Random(f"walk {seed}")
        self._pods: list[Pod | None] = [None] * PODS
        self._stopped = [False] * PODS
        self._containers: dict[tuple[int, int], tuple[Container, str]] = {}
        self._made = 0

    def step(self) -> None:
        number = self._rng.randrange(PODS)
        place = (number, self._rng.randrange(CONTAINERS))
        verbs = [*(f"pod_{verb}" for verb in OF_POD), *(f"container_{v}" for v in OF_CONTAINER)]
        weights = [WEIGHTS.get(verb.partition("_")[2], 1) for verb in verbs]
        verb = self._rng.choices(verbs, weights)[0]
        pod = self._pods[number]
        if verb == "pod_run":
            self._run(number)
        elif pod is not None and verb.startswith("pod_"):
            getattr(self, f"_{verb}")(number, pod)
        elif pod is not None and verb == "container_create":
            self._create(place, pod)
        elif place in self._containers:
            self._of_container(verb.removeprefix("container_"), place)

    def visit(self, state: str, stops: bool, *, tried: bool = False) -> None:
        """Make every call on a container of its own in this state. tried: start each before, in a stopped pod."""
        self._run(0)
        pod = self._pods[0]
        assert pod is not None
        verbs = [verb for verb in OF_CONTAINER if verb != "create"]
        for number in range(len(verbs)):
            container = pod.create(name=f"v{number}")
            if state != "created":
                container.start()
            if state == "exited":
                container.stop()
            self._containers[0, number] = (container, f"{state} sleeps")
        if stops:
            self._pod_stop(0, pod)
        for verb in ("status", "list", "forward"):
            getattr(self, f"_pod_{verb}")(0, pod)
        self._run(0)
        self._create((0, len(verbs)), pod)
        for number, verb in enumerate(verbs):
            if tried:
                self._containers[0, number][0].start()
            self._of_container(verb, (0, number))

    # --- pods -------------------------------------------------------------------------------------------------------

    def _which(self, number: int) -> str:
        return "of a stopped pod" if self._stopped[number] else "of a READY pod"

    def _run(self, number: int) -> None:
        pod = self._pods[number]
        if pod is not None:
            request = pb.RunPodSandboxRequest(config=pod.config)
            self._caller.call("RunPodSandbox", request, f"{self._which(number)} again")
            return
        self._pods[number] = self._caller.pod("of a new pod")
        self._stopped[number] = False

    def _pod_stop(self, number: int, pod: Pod) -> None:
        pod.stop(self._which(number))
        self._stopped[number] = True
        for place, (container, state) in self._containers.items():
            if place[0] == number and state == "running":
                self._containers[place] = (container, "exited")

    def _pod_remove(self, number: int, pod: Pod) -> None:
        pod.remove(self._which(number))
        pod.remove("of a removed pod")
        self._pods[number] = None
        for place in [place for place in self._containers if place[0] == number]:
            del self._containers[place]

    def _pod_status(self, number: int, pod: Pod) -> None:
        request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod.id)
        label = self._which(number)
        self._caller.call("PodSandboxStatus", request, label, only=r"^status\.state$")

    def _pod_list(self, number: int, pod: Pod) -> None:
        wanted = pb.PodSandboxFilter(id=pod.id)
        request = pb.ListPodSandboxRequest(filter=wanted)
        self._caller.call("ListPodSandbox", request, self._which(number), only=r"state$|items$")

    def _pod_forward(self, number: int, pod: Pod) -> None:
        request = pb.PortForwardRequest(pod_sandbox_id=pod.id, port=[80])
        self._caller.call("PortForward", request, self._which(number))

    # --- containers -------------------------------------------------------------------------------------------------

    def _create(self, place: tuple[int, int], pod: Pod) -> None:
        if place in self._containers:
            return
        self._made += 1
        stopped = self._stopped[place[0]]
        label = "in a stopped pod" if stopped else "in a READY pod"
        kind = self._rng.choice(("sleeps", "ends", "bad"))
        command = {"ends": ("sh", "-c", f"exit {self._made % 3}"), "bad": ("/no/such",)}.get(kind)
        container = pod.create(*command or (), label=label, name=f"c{self._made}")
        if not stopped:
            self._containers[place] = (container, f"created {kind}")

    def _of_container(self, verb: str, place: tuple[int, int]) -> None:
        container, state = self._containers[place]
        plain = state.partition(" ")[0]
        where = " in a stopped pod" if self._stopped[place[0]] else ""
        label = f"of {'an' if plain == 'exited' else 'a'} {plain} container{where}"
        if verb == "start" and plain == "created" and not where:
            self._start(place, container, state)
        elif verb in ("start", "stop", "remove"):
            getattr(container, verb)(label)
        else:
            self._ask(verb, container, label)
        if verb == "remove":
            del self._containers[place]
            container.remove("of a removed container")
            container.status("of a removed container")
            return
        if verb == "stop" and plain == "running":
            self._containers[place] = (container, "exited")
        container.status(label, STATE)

    def _start(self, place: tuple[int, int], container: Container, state: str) -> None:
        kind = state.partition(" ")[2]
        container.start("of an absent program" if kind == "bad" else "of a created container")
        if kind == "ends":
            container.wait()
        self._containers[place] = (container, "running" if kind == "sleeps" else "exited")

    def _ask(self, verb: str, container: Container, label: str) -> None:
        name = container.id
        limits = pb.LinuxContainerResources(cpu_shares=300)
        requests = {
            "exec_url": ("Exec", pb.ExecRequest(container_id=name, cmd=["true"], stdout=True)),
            "attach": ("Attach", pb.AttachRequest(container_id=name, stdout=True)),
            "reopen": ("ReopenContainerLog", pb.ReopenContainerLogRequest(container_id=name)),
            "update": (
                "UpdateContainerResources",
                pb.UpdateContainerResourcesRequest(container_id=name, linux=limits),
            ),
            "exec": ("ExecSync", pb.ExecSyncRequest(container_id=name, cmd=["echo", "a"])),
            "stats": ("ContainerStats", pb.ContainerStatsRequest(container_id=name)),
            "list": (
                "ListContainers",
                pb.ListContainersRequest(filter=pb.ContainerFilter(id=name)),
            ),
        }
        if verb in requests:
            method, request = requests[verb]
            only = r"^containers$|state$|stdout|exit_code"
            self._caller.call(method, request, label, only=only)


def every_state(caller: Caller) -> None:
    """A case: each call on a container in each state, in a pod that is READY or stopped."""
    for stops in (False, True):
        for state in ("created", "exited") if stops else ("created", "running", "exited"):
            walker = Walk(caller, 0)
            walker.visit(state, stops)
    # What containerd refuses to start has ended from then on; we leave it as it is.
    Walk(caller, 0).visit("created", True, tried=True)


def walk(seed: int, steps: int = STEPS) -> Callable[[Caller], None]:
    """A case."""

    def walking(caller: Caller) -> None:
        walker = Walk(caller, seed)
        for _ in range(steps):
            walker.step()

    walking.__name__ = f"walk_{seed}"
    return walking
