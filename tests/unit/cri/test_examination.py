import json
import os
from pathlib import Path
from typing import Any

import pytest

from nodeagent.config import Config
from nodeagent.cri import examination
from nodeagent.errors import InvalidArgument
from nodeagent.records import Image, ImageConfig, Layer
from nodeagent.store import Store

SANDBOX = {"metadata": {"name": "p", "uid": "u", "namespace": "n"}, "hostname": "p"}
CONTAINER = {"metadata": {"name": "c"}, "image": {"image": "busybox"}, "command": ["sleep"]}


def written(path: Path, document: Any) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_files_as_crictl_takes_them(tmp_path: Path) -> None:
    paths = [
        written(tmp_path / "container.json", CONTAINER),
        written(tmp_path / "sandbox.json", SANDBOX),
        written(tmp_path / "other.json", CONTAINER),
    ]
    pod = examination.load(paths)
    assert (pod.sandbox.hostname, pod.handler, pod.unknown) == ("p", "", [])
    assert [container.metadata.name for container in pod.containers] == ["c", "c"]


def test_one_file_with_both(tmp_path: Path) -> None:
    both = {"sandbox": SANDBOX, "containers": [CONTAINER], "runtime_handler": "fast"}
    pod = examination.load([written(tmp_path / "pod.json", both)])
    assert (pod.sandbox.metadata.name, pod.handler) == ("p", "fast")
    assert list(pod.containers[0].command) == ["sleep"]


def test_values_of_variables_are_text(tmp_path: Path) -> None:
    """crictl writes them so; the contract has bytes, which protobuf's JSON writes in base64."""
    values = ["B", "QkI=", "", "ü", "\ud800"]
    envs = [{"key": "A", "value": value} for value in values]
    both = {"sandbox": SANDBOX, "containers": [{**CONTAINER, "envs": [*envs, {"key": "A"}]}]}
    pod = examination.load([written(tmp_path / "pod.json", both)])
    found = [env.value for env in pod.containers[0].envs]
    assert found == [b"B", b"QkI=", b"", "ü".encode(), b"?", b""]


@pytest.mark.parametrize("envs", [5, [5], [{"key": "A", "value": 5}]])
def test_malformed_variables_are_refused_with_the_container(tmp_path: Path, envs: Any) -> None:
    both = {"sandbox": SANDBOX, "containers": [{**CONTAINER, "envs": envs}]}
    with pytest.raises(InvalidArgument, match=r"containers\[0\]: .*env"):
        examination.load([written(tmp_path / "pod.json", both)])


def test_fields_of_a_newer_contract_are_passed_over(tmp_path: Path) -> None:
    both = {"sandbox": {**SANDBOX, "novelty": 1}, "containers": [CONTAINER]}
    pod = examination.load([written(tmp_path / "pod.json", both)])
    assert pod.sandbox.hostname == "p"
    assert len(pod.unknown) == 1
    assert "novelty" in pod.unknown[0]


@pytest.mark.parametrize(
    ("documents", "text"),
    [
        ([SANDBOX, SANDBOX], "a second pod"),
        ([CONTAINER], "there is no pod"),
        (["{"], "is not JSON: Expecting"),
        (["metadata:\n  name: p\n"], "is not JSON"),
        (
            [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}}],
            "a manifest of Kubernetes",
        ),
        (["[" * 100_000], "file-0"),
        (["[]"], "is not a JSON object"),
        ([{"sandbox": []}], "sandbox: is not a JSON object"),
        ([{"sandbox": SANDBOX, "containers": 5}], "containers: is not a JSON array"),
        ([{"sandbox": SANDBOX, "containers": None}], "containers: is not a JSON array"),
        ([{"sandbox": SANDBOX, "containers": {"image": {}}}], "containers: is not a JSON array"),
        ([{"sandbox": SANDBOX, "containers": [1]}], r"containers\[0\]: is not a JSON object"),
        ([{**SANDBOX, "hostname": {}}], "hostname"),
        ([{"sandbox": SANDBOX, "runtime_handler": [1]}], "runtime_handler: is not a JSON string"),
        ([{**SANDBOX, "hostname": "\ud800"}], "surrogates"),
        ([{**SANDBOX, "\ud800": 1}], "surrogates"),
        ([{"sandbox": SANDBOX, "runtime_handler": "\udc80"}], "surrogates"),
    ],
)
def test_what_is_no_pod_is_refused_with_the_file(
    tmp_path: Path, documents: list[Any], text: str
) -> None:
    paths = [
        written(tmp_path / f"file-{number}", document) for number, document in enumerate(documents)
    ]
    with pytest.raises(InvalidArgument, match=text) as caught:
        examination.load(paths)
    assert str(tmp_path) in str(caught.value)


def examined(place: Path, document: Any) -> list[str]:
    config = Config(root=str(place / "root"), state=str(place / "state"))
    (place / "pod.json").unlink(missing_ok=True)
    pod = examination.load([written(place / "pod.json", document)])
    return [str(finding) for finding in examination.examine(config, pod)]


def test_a_finding_is_a_line_that_no_terminal_obeys(tmp_path: Path) -> None:
    name = "\x1b[2J\nrefused"
    sandbox = {**SANDBOX, "metadata": {"name": name, "uid": "u", "namespace": "n"}}
    found = examined(tmp_path, {"sandbox": sandbox, "containers": [{"\x1b[2J": 1, **CONTAINER}]})
    assert any("control character" in line for line in found)
    assert all(line.isprintable() for line in found)


def test_nothing_of_an_agent_is_written(tmp_path: Path) -> None:
    """Be it that one runs, of an earlier version, or that none does."""
    both = {"sandbox": SANDBOX, "containers": [CONTAINER]}
    examined(tmp_path, both)
    assert os.listdir(tmp_path) == ["pod.json"]
    (tmp_path / "root").mkdir()
    for is_running in (True, False):
        store = Store.open(tmp_path / "root/state.db")
        if not is_running:
            store.close()
        before = content(tmp_path / "root")
        assert not any("refused" in line for line in examined(tmp_path, both))
        assert content(tmp_path / "root") == before
        store.close()


def content(directory: Path) -> dict[str, bytes]:
    """But for the index of a log, in which readers mark where they are."""
    return {
        path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".db-shm"
    }


@pytest.mark.parametrize(
    ("path", "outcome"),
    [
        ("absent/below", "made"),
        ("file/below", "refused"),
        ("dangling", "refused"),
        ("dangling/below", "refused"),
        ("link/below", "made"),
    ],
)
def test_host_paths_that_are_absent(tmp_path: Path, path: str, outcome: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("directory")
    mount = {"container_path": "/a", "host_path": str(tmp_path / path)}
    found = examined(
        tmp_path, {"sandbox": SANDBOX, "containers": [{**CONTAINER, "mounts": [mount]}]}
    )
    assert [line.split()[0] for line in found if path in line] == [outcome]
    assert not (tmp_path / "absent").exists()


OCI = {"profile_type": "OCI", "oci_ref": f"r.example/p@sha256:{'a' * 64}"}


def with_seccomp(profile: dict[str, Any], **security: Any) -> dict[str, Any]:
    linux = {"security_context": {"seccomp": profile, **security}}
    return {"sandbox": SANDBOX, "containers": [{**CONTAINER, "linux": linux}]}


def test_a_profile_of_a_registry_is_not_seen(tmp_path: Path) -> None:
    """Only a running agent has it; the rest of the container is looked at as ever."""
    found = examined(tmp_path, with_seccomp(OCI))
    assert not any(line.startswith("refused") for line in found)
    assert any(line.startswith("not seen") and OCI["oci_ref"] in line for line in found)


def test_a_privileged_container_needs_no_profile_of_a_registry(tmp_path: Path) -> None:
    found = examined(tmp_path, with_seccomp(OCI, privileged=True))
    assert not any(OCI["oci_ref"] in line for line in found)


def test_the_base_of_a_profile_of_a_registry_is_looked_at(tmp_path: Path) -> None:
    base = {"type": "Localhost", "localhost_ref": str(tmp_path / "absent.json")}
    found = examined(tmp_path, with_seccomp({**OCI, "base_profile": base}))
    assert any(line.startswith("refused") and "absent.json" in line for line in found)


def test_layers_are_where_the_agent_has_them(tmp_path: Path) -> None:
    """Down to one that hides the others; an image without any has an empty directory."""
    chains = [f"sha256:{digit * 64}" for digit in "abc"]
    store = Store.open(tmp_path / "state.db")
    for chain in chains:
        layer = Layer(
            chain_id=chain,
            diff_id=chain,
            blob=chain,
            size_bytes=1,
            used_bytes=1,
            inodes=1,
            opaque=chain == chains[1],
        )
        store.put(layer)
    stored = examination._StoredImages(store, tmp_path / "layers")
    store.close()

    def lower_dirs(*layers: str) -> list[str]:
        image = Image(
            id="i", manifest="", layers=layers, size_bytes=0, config=ImageConfig(), pulled_at=0
        )
        return [str(path.relative_to(tmp_path)) for path in stored.lower_dirs(image)]

    assert lower_dirs(*chains) == [f"layers/{digit * 64}" for digit in "cb"]
    assert lower_dirs() == ["empty"]
