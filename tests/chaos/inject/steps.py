"""The steps: each call that is served, what it needs before it, and whom it makes work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import grpc

from tests.chaos.inject.scene import READ_ONLY, REFUSED, Scene

Act = Callable[[Scene], None]
AGENT, LAUNCHER, SUPERVISOR, INIT = "agent", "launcher", "supervisor", "init"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A call, and what is there before it, named after the call.

    who: the processes that it makes work; init is a supervisor's child. rpcs: the RPCs that it makes, where they are
    others than the one that it is named after. after: undoes what a pod's removal does not.
    is_passing: the pod is afterwards as it was before.
    """

    name: str
    before: tuple[Act, ...]
    call: Act
    who: tuple[str, ...] = (AGENT, SUPERVISOR)
    rpcs: tuple[str, ...] | None = None
    after: Act | None = None
    is_passing: bool = False
    is_start: bool = False

    @property
    def makes(self) -> frozenset[str]:
        """The RPCs that it makes when it succeeds."""
        return frozenset((self.name.partition("-")[0],) if self.rpcs is None else self.rpcs)


_POD = (Scene.run_pod,)
_CREATED = (*_POD, Scene.create)
_RUNNING = (*_CREATED, Scene.start, Scene.await_up)
_WATCHED = (*_RUNNING, Scene.watch)
_ENDED = (*_RUNNING, Scene.end)


def _run_rich(scene: Scene) -> None:
    scene.run_pod()


def _remove_image(scene: Scene) -> None:
    """It leaves nothing: what is not there was removed by an earlier attempt."""
    try:
        scene.remove_image()
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.NOT_FOUND:
            raise


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
        Step(
            name="ExecSync",
            before=_RUNNING,
            call=Scene.exec,
            who=(AGENT, SUPERVISOR, INIT),
            is_passing=True,
        ),
        Step(
            name="Exec",
            before=_RUNNING,
            call=Scene.exec_stream,
            who=(AGENT, SUPERVISOR, INIT),
            is_passing=True,
        ),
        Step(
            name="Exec-terminal",
            before=_RUNNING,
            call=Scene.exec_at_terminal,
            who=(AGENT, SUPERVISOR, INIT),
            is_passing=True,
        ),
        Step(
            name="Attach", before=(Scene.make_reader, *_RUNNING), call=Scene.attach, is_passing=True
        ),
        Step(
            name="PortForward",
            before=(Scene.make_server, *_RUNNING),
            call=Scene.forward,
            is_passing=True,
        ),
        Step(
            name="GetContainerEvents",
            before=_POD,
            call=Scene.watch_start,
            rpcs=("GetContainerEvents", "CreateContainer", "StartContainer"),
        ),
        Step(name="UpdateContainerResources", before=_RUNNING, call=Scene.update, who=(AGENT,)),
        Step(
            name="UpdatePodSandboxResources", before=_RUNNING, call=Scene.update_pod, who=(AGENT,)
        ),
        Step(name="ReopenContainerLog", before=_RUNNING, call=Scene.reopen_log, is_passing=True),
        Step(
            name="read-only calls", before=_RUNNING, call=Scene.read, who=(AGENT,), rpcs=READ_ONLY
        ),
        Step(name="refused calls", before=_POD, call=Scene.be_refused, who=(AGENT,), rpcs=REFUSED),
        Step(name="UpdateRuntimeConfig", before=_POD, call=Scene.configure, who=(AGENT,)),
        Step(
            name="end of the program",
            before=_WATCHED,
            call=Scene.end,
            rpcs=(),
            who=(AGENT, LAUNCHER, SUPERVISOR),
        ),
        Step(
            name="end by the OOM killer",
            before=_RUNNING,
            call=Scene.overeat,
            rpcs=(),
            who=(AGENT, LAUNCHER, SUPERVISOR),
        ),
        Step(
            name="StopContainer",
            before=_RUNNING,
            call=Scene.stop,
            who=(AGENT, LAUNCHER, SUPERVISOR),
        ),
        Step(name="RemoveContainer", before=(*_ENDED, Scene.watch), call=Scene.remove),
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
            before=_WATCHED,
            call=Scene.remove_pod,
            who=(AGENT, LAUNCHER, SUPERVISOR),
        ),
        Step(
            name="PullImage",
            before=(_remove_image,),
            call=Scene.pull,
            who=(AGENT,),
            after=_remove_image,
        ),
        Step(
            name="RemoveImage",
            before=(Scene.pull,),
            call=_remove_image,
            who=(AGENT,),
            after=_remove_image,
        ),
        Step(
            name="PullSecurityProfile",
            before=(Scene.remove_profile,),
            call=Scene.pull_profile,
            who=(AGENT,),
            after=Scene.remove_profile,
        ),
        Step(
            name="RemoveSecurityProfile",
            before=(Scene.pull_profile,),
            call=Scene.remove_profile,
            who=(AGENT,),
            after=Scene.remove_profile,
        ),
        Step(name="start", before=_RUNNING, call=Scene.read, who=(AGENT,), rpcs=(), is_start=True),
        Step(
            name="recovery",
            before=_RUNNING,
            call=Scene.read,
            who=(LAUNCHER, SUPERVISOR),
            rpcs=(),
            is_start=True,
        ),
    )
}
