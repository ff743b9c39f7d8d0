"""The steps: each call that is served, what it needs before it, and whom it makes work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import grpc

from tests.chaos.inject.scene import Scene

Act = Callable[[Scene], None]
AGENT, LAUNCHER, SUPERVISOR, INIT = "agent", "launcher", "supervisor", "init"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A call, and what is there before it. who: the processes that it makes work; init is a supervisor's child."""

    name: str
    before: tuple[Act, ...]
    call: Act
    who: tuple[str, ...] = (AGENT, SUPERVISOR)
    is_start: bool = False


_POD = (Scene.run_pod,)
_CREATED = (*_POD, Scene.create)
_RUNNING = (*_CREATED, Scene.start, Scene.await_up)
_ENDED = (*_RUNNING, Scene.end)


def _run_rich(scene: Scene) -> None:
    scene.run_pod()


def _absent(act: Act) -> Act:
    """The call, which leaves nothing: what is not there was removed by an earlier attempt."""

    def call(scene: Scene) -> None:
        try:
            act(scene)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise

    return call


STEPS = {
    step.name: step
    for step in (
        Step(name="RunPodSandbox", before=(), call=Scene.run_pod, who=(AGENT, LAUNCHER)),
        Step(
            name="RunPodSandbox-rich",
            before=(Scene.make_rich,),
            call=_run_rich,
            who=(AGENT, LAUNCHER),
        ),
        Step(
            name="CreateContainer",
            before=_POD,
            call=Scene.create,
            who=(AGENT, LAUNCHER, SUPERVISOR, INIT),
        ),
        Step(
            name="CreateContainer-rich",
            before=(Scene.make_rich, *_POD),
            call=Scene.create,
            who=(AGENT, SUPERVISOR, INIT),
        ),
        Step(name="StartContainer", before=_CREATED, call=Scene.start),
        Step(name="ExecSync", before=_RUNNING, call=Scene.exec, who=(AGENT, SUPERVISOR, INIT)),
        Step(name="UpdateContainerResources", before=_RUNNING, call=Scene.update, who=(AGENT,)),
        Step(name="ReopenContainerLog", before=_RUNNING, call=Scene.reopen_log),
        Step(name="read-only calls", before=_RUNNING, call=Scene.read, who=(AGENT,)),
        Step(name="UpdateRuntimeConfig", before=_POD, call=Scene.configure, who=(AGENT,)),
        Step(
            name="end of the program",
            before=_RUNNING,
            call=Scene.end,
            who=(AGENT, LAUNCHER, SUPERVISOR),
        ),
        Step(
            name="end by the OOM killer",
            before=_RUNNING,
            call=Scene.overeat,
            who=(AGENT, LAUNCHER, SUPERVISOR),
        ),
        Step(
            name="StopContainer",
            before=_RUNNING,
            call=Scene.stop,
            who=(AGENT, LAUNCHER, SUPERVISOR),
        ),
        Step(name="RemoveContainer", before=_ENDED, call=Scene.remove),
        Step(
            name="StopPodSandbox",
            before=_RUNNING,
            call=Scene.stop_pod,
            who=(AGENT, LAUNCHER, SUPERVISOR),
        ),
        Step(
            name="StopPodSandbox-rich",
            before=(Scene.make_rich, *_RUNNING),
            call=Scene.stop_pod,
            who=(AGENT, LAUNCHER, SUPERVISOR),
        ),
        Step(
            name="RemovePodSandbox",
            before=_RUNNING,
            call=Scene.remove_pod,
            who=(AGENT, LAUNCHER, SUPERVISOR),
        ),
        Step(
            name="PullImage", before=(_absent(Scene.remove_image),), call=Scene.pull, who=(AGENT,)
        ),
        Step(
            name="RemoveImage", before=(Scene.pull,), call=_absent(Scene.remove_image), who=(AGENT,)
        ),
        Step(name="start", before=_RUNNING, call=Scene.read, who=(AGENT,), is_start=True),
        Step(
            name="recovery",
            before=_RUNNING,
            call=Scene.read,
            who=(LAUNCHER, SUPERVISOR),
            is_start=True,
        ),
    )
}
