"""A round: one call of one step, while the n-th call to the kernel of one of our processes fails, kills or stops it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import grpc

from tests.chaos.inject.calls import named
from tests.chaos.inject.scene import DEADLINE_SECONDS, Scene
from tests.chaos.inject.steps import AGENT, INIT, LAUNCHER, STEPS, SUPERVISOR, Step
from tests.chaos.inject.strace import Fault, Injection, Place
from tests.chaos.inject.world import World, Wrong
from tests.chaos.oracles import descriptors, unclear
from tests.support.node import PATIENCE_SECONDS, wait_for

WORKERS = "workers"
FOREIGN = "foreign"  # the answer of a round in which the fault has hit what is not ours

# How long a shortage lasts, and how long a process is stopped. The latter shows what does not go on by itself after
# a delay; `--stop-seconds` of more than the deadlines of ours shows what those do.
SHORTAGE_SECONDS = 2.0
STOP_SECONDS = 1.0
_LOOK_SECONDS = 0.05
_OF_REGISTRIES = Counter({"socket": 1})  # a connection to a registry that is kept for the next pull
_LIVES = 3  # of pods without a fault, whose traces are compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What is tried. who: the processes that are hit; calls: of each, the call or the set of calls; when: its number.

    fault None: the calls are only counted.
    """

    step: str
    who: tuple[str, ...]
    calls: tuple[str, ...]
    fault: Fault | None
    when: tuple[int, ...]
    stop_seconds: float = STOP_SECONDS

    @property
    def hits_program(self) -> bool:
        """Whether it may kill the program, or all who learn of its end."""
        alone = len(self.who) == 1 and self.who[0] in (AGENT, WORKERS, SUPERVISOR)
        return self.fault is not None and self.fault.what == "KILL" and not alone

    @property
    def spares_watchers(self) -> bool:
        """Whether no call fails that launcher, supervisor or init make for the log and the end of the program."""
        is_error = self.fault is not None and not self.fault.is_signal
        after = (
            self.step == "ReopenContainerLog"
        )  # what it says before and after that is in one log or the other
        return not is_error or after or set(self.who) <= {AGENT, WORKERS}

    def __str__(self) -> str:
        when = "+".join(map(str, self.when))
        text = f"--step '{self.step}' --who {'+'.join(self.who)} --calls {'+'.join(self.calls)} "
        return f"{text}--fault {self.fault} --when {when}" + (
            f" --stop-seconds {self.stop_seconds:g}" if self.stop_seconds != STOP_SECONDS else ""
        )


@dataclass(slots=True)
class Verdict:
    """The outcome. answer: of the call under the fault; struck: the calls that were hit; places: all that were made."""

    round: Round
    answer: str
    problems: list[str]
    struck: list[str]
    places: set[Place]
    seconds: float


class Player:
    """Plays rounds in a world. `before` is taken in a world that has seen a pod already."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._numbers = 0
        self._open: dict[int, Counter[str]] = {}
        self._supervisor: tuple[int, Counter[str]] = (0, Counter())
        world.note([self._live] * _LIVES)
        self._compare_descriptors()

    def _live(self) -> None:
        """The life of a pod and of an image, without a fault."""
        scene = self._scene()
        for act in STEPS["RemovePodSandbox"].before:
            act(scene)
        scene.read()
        scene.pull()
        scene.remove_image()
        scene.pull_profile()
        scene.remove_profile()
        scene.finish()
        scene.leave()

    def _scene(self) -> Scene:
        self._numbers += 1
        return Scene(self.world, f"r{self._numbers}")

    def play(self, round_: Round) -> Verdict:
        """Play it. What was not as it must be is in the verdict, and then the world is of no use any more."""
        began = time.monotonic()
        step = STEPS[round_.step]
        scene = self._scene()
        scene.is_program_hit = round_.hits_program
        scene.is_watched = round_.spares_watchers
        injections: list[Injection] = []
        problems: list[str] = []
        answer = ""
        logged = self.world.agent.log.stat().st_size
        try:
            for act in step.before:
                act(scene)
            if step.is_passing:
                self._note_supervisor(scene)
            try:
                answer = self._call(step, scene, round_, injections, problems)
            finally:
                for injection in injections:
                    injection.stop()
            self._await_deaths(injections)
            struck = [call for injection in injections for call in injection.struck]
            if not problems:
                problems += self._aftermath(step, scene, round_, succeeded=answer == "ok")
                problems += self._reconciled(logged)
        except (Wrong, RuntimeError, AssertionError, OSError) as error:
            problems.append(f"{type(error).__name__}: {error}")
        except grpc.RpcError as error:
            problems.append(f"without a fault: {error.code().name}: {error.details()}")
        finally:
            scene.leave()
        struck = [call for injection in injections for call in injection.struck]
        places = {place for injection in injections for place in injection.places}
        if any(injection.is_foreign for injection in injections):
            answer = FOREIGN if problems else answer
        return Verdict(round_, answer, problems, struck, places, time.monotonic() - began)

    # --- the call ---

    def _call(
        self,
        step: Step,
        scene: Scene,
        round_: Round,
        injections: list[Injection],
        problems: list[str],
    ) -> str:
        agent = self.world.agent
        if step.is_start:
            agent.kill()
            agent.hold()
        hits = zip(round_.who, round_.calls, round_.when, strict=True)
        for number, (role, calls, when) in enumerate(hits):
            injections.append(
                Injection(
                    self._pid(role, scene),
                    named(calls, lasts=round_.fault is not None and round_.fault.lasts),
                    round_.fault,
                    when,
                    output=self.world.folder / f"strace.{number}",
                    follow=role in (INIT, WORKERS) or (role == LAUNCHER and not scene.pod_id),
                )
            )
        with self._passing(round_, injections):
            try:
                scene.is_under_fault = True
                scene.called.clear()
                if step.is_start:
                    return self._start(step, scene)
                step.call(scene)
            except grpc.RpcError as error:
                reason = unclear(error)
                if reason:
                    problems.append(reason)
                return str(error.code().name)
            finally:
                scene.is_under_fault = False
            return "ok"

    def _await_deaths(self, injections: list[Injection]) -> None:
        """Return when what was killed is dead, so that nobody takes it for a process that serves."""
        agent = self.world.agent
        for injection in injections:
            injection.await_deaths()
            if injection.has_killed(agent.pid):
                wait_for("the end of the agent", lambda: not agent.is_there)

    def _pid(self, role: str, scene: Scene) -> int:
        if role in (AGENT, WORKERS):
            return self.world.agent.pid
        if role == LAUNCHER:
            launcher = self.world.launcher
            self.world.footprint.traced.add(launcher)
            return launcher
        return self.world.supervisor(scene.pod_id)

    def _start(self, step: Step, scene: Scene) -> str:
        """Start the agent; one that cannot serve must end, and say why."""
        agent = self.world.agent
        at = agent.log.stat().st_size
        agent.let_go()
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not agent.serves():
            if agent.exit_code is not None:
                said = agent.log.read_bytes()[at:].decode(errors="replace")
                if agent.exit_code > 0 and ("Traceback" in said or "nodeagent: " not in said):
                    raise Wrong(f"the start fails without a clear reason: {said[-1500:]}")
                return f"exit {agent.exit_code}"
            if time.monotonic() > deadline:
                raise Wrong("the agent neither serves nor ends")
            time.sleep(0.05)
        step.call(scene)
        return "ok"

    @contextmanager
    def _passing(self, round_: Round, injections: list[Injection]) -> Iterator[None]:
        """Let the fault pass after its time, whether the call has returned or not."""
        fault = round_.fault
        over = threading.Event()

        def await_and_end() -> None:
            while fault is not None and not over.wait(_LOOK_SECONDS):
                if any(injection.struck for injection in injections):
                    break
            if fault is None or (not fault.lasts and fault.what != "STOP"):
                return
            over.wait(SHORTAGE_SECONDS if fault.lasts else round_.stop_seconds)
            for injection in injections:
                injection.stop()
            self.world.go_on()

        waiting = threading.Thread(target=await_and_end, daemon=True)
        waiting.start()
        try:
            yield
        finally:
            over.set()
            waiting.join()

    # --- afterwards ---

    def _aftermath(self, step: Step, scene: Scene, round_: Round, *, succeeded: bool) -> list[str]:
        """Retry, bring all to its end, and see what is left."""
        world = self.world
        world.heal()
        if not succeeded:
            scene.until_it_succeeds(step.name, lambda: step.call(scene))
        if not_made := step.makes - scene.called:
            raise Wrong(f"the step does not make {', '.join(sorted(not_made))}")
        problems = self._compare_supervisor(scene) if step.is_passing else []
        scene.finish()
        if step.after is not None:
            after = partial(step.after, scene)
            scene.until_it_succeeds(f"what undoes {step.name}", after)
        problems += [f"left: {thing}" for thing in world.footprint.new_since(world.before)]
        gone = world.footprint.missing_since(world.before)
        problems += [f"missing: {thing}" for thing in gone]
        return problems + self._compare_descriptors()

    def _reconciled(self, logged: int) -> list[str]:
        """What the reconciliation found in the log from here on: it counts as a leak, as it is found minutes later."""
        said = self.world.agent.log.read_bytes()[logged:].decode(errors="replace")
        return [line for line in said.splitlines() if "no record explains it" in line]

    def _note_supervisor(self, scene: Scene) -> None:
        pid = self.world.supervisor(scene.pod_id)
        self._supervisor = pid, descriptors(pid)

    def _compare_supervisor(self, scene: Scene) -> list[str]:
        """What it has open beyond what it had before the call, if it is the same process still."""
        pid, before = self._supervisor
        if self.world.supervisor(scene.pod_id) != pid:
            return []
        return _more_open("supervisor", pid, before)

    def _compare_descriptors(self) -> list[str]:
        """What agent and launcher have open beyond what they had when they were first looked at."""
        problems = []
        for name, pid in (("agent", self.world.agent.pid), ("launcher", self.world.launcher)):
            before = self._open.setdefault(pid, descriptors(pid))
            problems += _more_open(name, pid, before + _OF_REGISTRIES)
        return problems


def _more_open(name: str, pid: int, before: Counter[str]) -> list[str]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (new := descriptors(pid) - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [f"left: descriptors of the {name}: {dict(new)}"] if new else []
