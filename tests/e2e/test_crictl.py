"""The real crictl, by hand: what a user of the node types."""

import json
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.support.node import RunningAgent, free_port, wait_for
from tests.support.registry import Registry


class Crictl:
    """One crictl call a method; it fails the test with what crictl printed."""

    def __init__(self, program: Path, agent: RunningAgent) -> None:
        self.command = [str(program), "-r", agent.endpoint, "-i", agent.endpoint, "-t", "30s"]

    def __call__(self, *arguments: str | Path) -> str:
        command = [*self.command, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def json(self, verb: str, name: str) -> Any:
        return json.loads(self(verb, "-o", "json", name))


@pytest.fixture
def run(crictl: Path, agent: RunningAgent) -> Crictl:
    return Crictl(crictl, agent)


def write(path: Path, **document: object) -> Path:
    path.write_text(json.dumps(document))
    return path


def test_a_web_server_by_hand(run: Crictl, registry: Registry, tmp_path: Path) -> None:
    nginx = images.nginx()
    image = f"{registry.host}/{nginx.repository}:{nginx.tags[0]}"
    port = free_port()
    pod_file = write(
        tmp_path / "pod.json",
        metadata={"name": "web", "uid": "web-1", "namespace": "hand"},
        log_directory=str(tmp_path / "logs"),
        port_mappings=[{"container_port": 80, "host_port": port}],
        linux={},
    )
    container_file = write(
        tmp_path / "container.json",
        metadata={"name": "nginx"},
        image={"image": image},
        log_path="nginx.log",
        linux={"resources": {"memory_limit_in_bytes": 64 << 20}},
    )
    assert "Image is up to date" in run("pull", image)
    assert nginx.repository in run("images")
    pod = run("runp", pod_file)
    container = run("create", pod, container_file, pod_file)
    run("start", container)
    assert container[:13] in run("ps")
    assert pod[:13] in run("pods")
    inspected = run.json("inspect", container)
    assert inspected["status"]["state"] == "CONTAINER_RUNNING"
    assert inspected["info"]
    address = run.json("inspectp", pod)["status"]["network"]["ip"]
    for url in (f"http://{address}/", f"http://127.0.0.1:{port}/"):
        wait_for(url, lambda url=url: images.PAGE.strip() in fetch(url))  # type: ignore[misc]
    assert run("exec", "--sync", container, "cat", "/etc/hostname")
    wait_for("the access log", lambda: "GET /" in run("logs", container))
    assert container[:13] in run("stats", "-a")
    assert pod[:13] in run("statsp")
    run("stop", container)
    run("rm", container)
    run("stopp", pod)
    run("rmp", pod)
    run("rmi", image)
    assert nginx.repository not in run("images")


def test_logs_follow(run: Crictl, registry: Registry, tmp_path: Path) -> None:
    busybox = images.busybox()
    image = f"{registry.host}/{busybox.repository}:{busybox.tags[0]}"
    pod_file = write(
        tmp_path / "pod.json",
        metadata={"name": "follow", "uid": "follow-1", "namespace": "hand"},
        log_directory=str(tmp_path / "logs"),
        linux={},
    )
    script = "for i in 1 2 3; do echo line $i; sleep 0.2; done; exit 3"
    container_file = write(
        tmp_path / "container.json",
        metadata={"name": "talker"},
        image={"image": image},
        command=["sh", "-c", script],
        log_path="talker.log",
        linux={},
    )
    run("pull", image)
    pod = run("runp", pod_file)
    container = run("create", pod, container_file, pod_file)
    run("start", container)
    assert run("logs", "-f", container).splitlines() == ["line 1", "line 2", "line 3"]
    wait_for("the end", lambda: '"exitCode": 3' in run("inspect", container))
    run("rmp", "-f", pod)


def test_the_same_files_start_a_pod_and_are_looked_at(
    run: Crictl, agent: RunningAgent, registry: Registry, tmp_path: Path
) -> None:
    """In them a variable's value is text, which neither side takes for base64."""
    busybox = images.busybox()
    image = f"{registry.host}/{busybox.repository}:{busybox.tags[0]}"
    pod_file = write(
        tmp_path / "pod.json",
        metadata={"name": "same", "uid": "same-1", "namespace": "hand"},
        log_directory=str(tmp_path / "logs"),
        linux={},
    )
    container_file = write(
        tmp_path / "container.json",
        metadata={"name": "printer"},
        image={"image": image},
        command=["sh", "-c", "echo $A $B"],
        envs=[{"key": "A", "value": "x"}, {"key": "B", "value": "QkI="}],
        log_path="printer.log",
        linux={},
    )
    run("pull", image)
    command = agent.command("check", "--pod", str(pod_file), str(container_file))
    looked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (looked.returncode, looked.stdout) == (0, "nothing is refused\n"), looked.stderr
    pod = run("runp", pod_file)
    run("start", run("create", pod, container_file, pod_file))
    wait_for("the values", lambda: (tmp_path / "logs/printer.log").read_text().endswith("x QkI=\n"))
    run("rmp", "-f", pod)


def test_version_info_and_images(run: Crictl) -> None:
    assert "RuntimeName:  nodeagent" in run("version")
    info = json.loads(run("info"))
    conditions = {c["type"]: c["status"] for c in info["status"]["conditions"]}
    assert conditions == {"RuntimeReady": True, "NetworkReady": True}
    assert "usedBytes" in run("imagefsinfo", "-o", "json")


def fetch(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=60) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""
