"""`nodeagent check --pod` on the same node: it refuses no chart, and tells what the agent skips of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import json_format

from tests.charts import images
from tests.charts.chart import Chart, Json, charts
from tests.charts.kubelet import Kubelet
from tests.charts.node import Node


def document(chart: Chart) -> Json:
    """The requests of a chart as a file has them."""
    kubelet = Kubelet(chart, "/kubelet")
    containers = [
        kubelet.container(spec, images.reference(spec.get("image", {})), "10.88.0.7")
        for spec in chart.all_containers
    ]
    return {
        "sandbox": json_format.MessageToDict(kubelet.sandbox(), preserving_proto_field_name=True),
        "containers": [
            json_format.MessageToDict(container, preserving_proto_field_name=True)
            for container in containers
        ],
    }


def check(node: Node, *paths: Path) -> tuple[int, list[str]]:
    """Its exit status and what it says."""
    command = node.command("check", "--pod", *map(str, paths))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, done.stdout.splitlines()


@pytest.fixture
def place(node: Node, tmp_path: Path) -> Path:
    """A directory that the node sees as the tests do."""
    place = node.root / tmp_path.name
    place.mkdir()
    return place


# One process for all of them: an interpreter takes a second to start on a busy machine.
ALL = """
import sys
from nodeagent.cli import main
for path in sys.argv[4:]:
    print("status", main(["check", *sys.argv[1:4], "--pod", path]), path)
"""


def test_no_chart_is_refused(node: Node, place: Path) -> None:
    for chart in charts():
        (place / chart.name).write_text(json.dumps(document(chart)))
    root = f"--root={node.root}/lib"
    options = [f"--config={node.root}/config.toml", root, f"--state={node.root}/run"]
    paths = [str(place / chart.name) for chart in charts()]
    (place / "all.py").write_text(ALL)
    said = node.run(sys.executable, f"{place}/all.py", *options, *paths).splitlines()
    assert [line for line in said if line.startswith("refused")] == []
    assert [line for line in said if "is not on this node" in line] == []
    assert [line for line in said if line.startswith("status")] == [
        f"status 0 {path}" for path in paths
    ]


def test_what_is_skipped_is_told(node: Node, place: Path) -> None:
    (chart,) = (chart for chart in charts() if chart.name == "cilium-agent")
    wanted = document(chart)
    mount = {"container_path": "/x", "host_path": "/srv/no-such-directory"}
    wanted["containers"][1]["mounts"].append(mount)
    wanted["containers"][1]["of_a_newer_contract"] = True
    wanted["containers"][1]["image"]["image"] = "charts.example/absent:1"
    path = place / "cilium.json"
    path.write_text(json.dumps(wanted))
    status, said = check(node, path)
    assert status == 0
    for text in (
        "skipped   fields that this agent does not know: ",
        'skipped   container "mount-cgroup": this kernel has no SELinux',
        'made      container "mount-cgroup": "/srv/no-such-directory" does not exist: a directory, for /x',
        'not seen  container "mount-cgroup": image "charts.example/absent:1" is not on this node',
        'not seen  container "cilium-agent": whether the kernel takes its limits',
    ):
        assert [line for line in said if line.startswith(text)], (text, said)
    assert node.shell("ls /srv") == ""


def test_what_is_refused_is_told_with_the_field(node: Node, place: Path) -> None:
    (chart,) = (chart for chart in charts() if chart.name == "coredns")
    wanted = document(chart)
    sandbox, container = place / "sandbox.json", place / "container.json"
    sandbox.write_text(json.dumps(wanted["sandbox"]))
    wanted["containers"][0]["linux"]["security_context"]["privileged"] = True
    container.write_text(json.dumps(wanted["containers"][0]))
    status, said = check(node, sandbox, container)
    field = "config.linux.security_context.privileged"
    assert status == 1
    assert said == [
        f'refused   container "coredns": {field}: the pod is not privileged',
        "1 refused",
    ]


REJECTING = 'absent_mount_sources_to_reject = ["/srv/rejected"]'


def test_host_paths_are_looked_at_as_the_agent_does(node: Node, place: Path) -> None:
    (chart,) = (chart for chart in charts() if chart.name == "kube-proxy")
    wanted = document(chart)
    mounts = wanted["containers"][0]["mounts"]
    mounts[0]["host_path"] = "/srv/rejected"
    (place / "config.toml").write_text(REJECTING)
    (place / "absent").write_text(json.dumps(wanted))
    mounts[0].update(host_path="/srv", propagation="PROPAGATION_BIDIRECTIONAL")
    (place / "private").write_text(json.dumps(wanted))
    node.shell("mount -t tmpfs private /srv; mount --make-private /srv")
    for name, text in (
        ("absent", "No such file or directory, and absent_mount_sources_to_reject has it"),
        ("private", "/srv"),
    ):
        command = node.command("check", f"--config={place}/config.toml", "--pod", f"{place}/{name}")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        (refused,) = (line for line in done.stdout.splitlines() if line.startswith("refused"))
        assert (done.returncode, text in refused) == (1, True), refused
    node.shell("umount /srv")
