"""The faults of a plan, which strike at their times."""

import asyncio
import shutil

from tests.chaos.simulation.connection import Process
from tests.chaos.simulation.machine import Window
from tests.chaos.simulation.plan import Fault
from tests.chaos.simulation.service import Service


class Faults:
    def __init__(self, service: Service, faults: list[Fault]) -> None:
        self._service = service
        self._machine = service.machine
        self._faults = faults

    async def strike(self) -> None:
        loop = self._machine.loop
        for fault in self._faults:
            await asyncio.sleep(max(0.0, fault.at - loop.time()))
            self._machine.trace(f"fault {fault}")
            getattr(self, f"_{fault.kind}", self._open_window)(fault)
        await asyncio.sleep(0.05)

    def _open_window(self, fault: Fault) -> None:
        until = self._machine.loop.time() + fault.seconds
        probability = 1.0 if fault.kind == "hang" else (1.0, 0.5, 0.1)[fault.number % 3]
        self._machine.windows.append(Window(fault.kind, until, probability))

    # --- the agent, the machine ---

    def _crash(self, _fault: Fault) -> None:
        self._service.kill()

    def _crash_at_step(self, fault: Fault) -> None:
        self._machine.kill_at = self._machine.steps + 1 + fault.number

    def _term(self, _fault: Fault) -> None:
        if self._service.agent is not None:
            self._service.agent.stop.set()

    def _reboot(self, _fault: Fault) -> None:
        self._service.kill()
        self._machine.reboot()
        shutil.rmtree(self._service.directory / "state", ignore_errors=True)

    # --- other processes ---

    def _supervisor(self, fault: Fault) -> Process | None:
        pods = self._machine.pods.values()
        alive = [pod.supervisor for pod in pods if pod.supervisor is not None]
        return alive[fault.number % len(alive)] if alive else None

    def _kill_supervisor(self, fault: Fault) -> None:
        supervisor = self._supervisor(fault)
        if supervisor is not None:
            supervisor.kill()

    def _kill_init(self, _fault: Fault) -> None:
        for pod in list(self._machine.pods.values()):
            if pod.init is not None:
                pod.init.kill()

    def _kill_launcher(self, _fault: Fault) -> None:
        if self._machine.launcher is not None:
            self._machine.launcher.kill()

    def _stop_supervisor(self, fault: Fault) -> None:
        supervisor = self._supervisor(fault)
        if supervisor is not None:
            supervisor.stop_for(fault.seconds)

    def _stop_launcher(self, fault: Fault) -> None:
        if self._machine.launcher is not None:
            self._machine.launcher.stop_for(fault.seconds)

    def _stop_both(self, fault: Fault) -> None:
        self._stop_launcher(fault)
        self._stop_supervisor(fault)

    def _disconnect(self, fault: Fault) -> None:
        """Its connections end, of which both sides hear, though it lives."""
        supervisor = self._supervisor(fault)
        for connection in list(supervisor.connections) if supervisor is not None else ():
            connection.close_by_process()

    def _disconnect_launcher(self, _fault: Fault) -> None:
        launcher = self._machine.launcher
        for connection in list(launcher.connections) if launcher is not None else ():
            connection.close_by_process()

    def _kill_both(self, fault: Fault) -> None:
        self._kill_launcher(fault)
        self._kill_supervisor(fault)
