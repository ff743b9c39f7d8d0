"""A whole machine whose power is cut: the guest, on a disk that is kept, is killed while its agent works.

What the guest's kernel has written to the disk by then is there, in the order in which it has written it, and nothing
of its memory. That is ext4 with its journal, as it is; what a drive loses of its own cache is left to `disk`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from nodeagent.api import runtime_pb2 as pb
from tests.chaos.power.walk import Step, Walk
from tests.guest.machine import make_disk
from tests.support.cri import Cri
from tests.support.node import RunningAgent
from tests.support.registry import running_registry

PROJECT = Path(__file__).parents[3]
HOST = "power.example"
RECOVERED = "recovered"
BOOT_SECONDS = 300.0
DISK_MIB = 2048


@dataclass(slots=True)
class Cuts:
    """boots: that have recovered from a power loss. violations: what a boot complained of."""

    boots: int = 0
    steps: int = 0
    violations: list[str] = field(default_factory=list)


def cut_power(folder: Path, rounds: int, chance: random.Random) -> Cuts:
    """Boot the machine, let its agent work for a while, and cut its power, so many times."""
    cuts, disk = Cuts(), folder / "disk"
    make_disk(disk, DISK_MIB)
    present: list[str] = []
    for number in range(rounds + 1):
        lines = _boot(disk, present, chance)
        if RECOVERED not in lines:
            cuts.violations.append(f"boot {number}: {' '.join(lines[-20:])}")
            break
        cuts.boots += number > 0
        present = _promised(present, lines)
        cuts.steps += len(lines) // 2
    return cuts


def _boot(disk: Path, present: list[str], chance: random.Random) -> list[str]:
    """The lines that the guest has printed until its power was cut."""
    environment = f"POWER={json.dumps(present, separators=(chr(59), ':'))}"
    command = [sys.executable, "-m", "tests.guest", "--memory", "2000", "--disk", str(disk)]
    command += ["--timeout", "3000", "--env", environment, str(PROJECT), "--"]
    command += [sys.executable, "-m", "tests.chaos.power.machine", str(chance.randrange(1 << 30))]
    lines: list[str] = []
    recovered = threading.Event()

    def read(output: subprocess.Popen[str]) -> None:
        assert output.stdout is not None
        for line in output.stdout:
            lines.append(line.strip())
            if lines[-1] == RECOVERED:
                recovered.set()
        recovered.set()

    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=PROJECT
    ) as guest:
        reader = threading.Thread(target=read, args=(guest,))
        reader.start()
        recovered.wait(BOOT_SECONDS)
        time.sleep(chance.uniform(0.5, 12))
        guest.terminate()  # which kills the machine
        reader.join()
    return lines


def _promised(present: list[str], lines: list[str]) -> list[str]:
    """The images whose pull was answered, and whose removal was not begun."""
    names = set(present)
    for line in lines:
        word, _, rest = line.partition(" ")
        verb, _, name = rest.rpartition(" ")
        if word == "begins" and name in names:
            names.discard(name)
        elif word == "ended" and verb in ("pull", "load"):
            names.add(name)
    return sorted(names)


# --- in the guest ---


def main() -> None:
    """What the guest does: recover, check, serve, and go on until its power is cut."""
    present = [name for name in os.environ["POWER"].strip("[]").replace('"', "").split(";") if name]
    folder = Path("/tmp/power")
    folder.mkdir(exist_ok=True)
    subprocess.run(["rm", "-rf", "--one-file-system", folder / "registry"], check=True)
    with running_registry(folder / "registry") as registry:
        agent = RunningAgent(folder / "agent")
        agent.trust(registry.host, HOST)
        agent.log.write_text("")
        agent.start()
        walk = Walk(agent, registry, folder, HOST)
        try:
            _check(agent, walk, present)
        except BaseException as error:
            print(f"{error}: {agent.log.read_text()[-3000:]}", flush=True)
            raise
        print(RECOVERED, flush=True)
        chance = random.Random(int(sys.argv[1]))
        while True:
            verbs = walk.verbs()
            verb = chance.choice(sorted(verbs))
            image, call = verbs[verb]
            step = Step(verb, walk.names.get(image, "-"), 0, 0)
            print(f"begins {step.verb} {step.image}", flush=True)
            call()
            print(f"ended {step.verb} {step.image}", flush=True)


def _check(agent: RunningAgent, walk: Walk, present: list[str]) -> None:
    listed = agent.images.ListImages(pb.ListImagesRequest()).images
    names = {name for image in listed for name in image.repo_tags}
    assert names >= set(present), f"{set(present) - names} was promised, and is not there"
    checked = subprocess.run(
        agent.command("check", "--data"), check=False, capture_output=True, text=True, timeout=300
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    for sandbox in agent.runtime.ListPodSandbox(pb.ListPodSandboxRequest()).items:
        assert sandbox.state == pb.SANDBOX_NOTREADY
    for container in agent.runtime.ListContainers(pb.ListContainersRequest()).containers:
        assert container.state == pb.CONTAINER_EXITED
    agent.remove_pods()
    walk.here = {name for name, full in walk.names.items() if full in names}
    for name in sorted(walk.here):  # those that are there can be used
        container = Cri(agent, walk.names[name], walk.cri.logs).run("/pause")
        container.pod.remove()
    for name in set(walk.names) - walk.here - {"loaded"}:
        walk.pull(name)
    left = agent.root / "lib/containers"
    assert not list(left.iterdir()), "containers without a record are left"


if __name__ == "__main__":
    main()
