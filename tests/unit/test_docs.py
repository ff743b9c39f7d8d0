"""The documents say what is so: they are compared with the contract, the code and each other."""

import ast
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deploy.documents.metrics import rows as metric_rows
from nodeagent.api import runtime_pb2 as pb
from nodeagent.config import Config
from nodeagent.config_reference import sections
from nodeagent.cri.image_service import ImageService
from nodeagent.cri.runtime_containers import ContainerCalls
from nodeagent.cri.runtime_node import NodeCalls
from nodeagent.cri.runtime_sandboxes import SandboxCalls
from nodeagent.cri.runtime_stats import StatsCalls
from nodeagent.cri.runtime_streams import StreamCalls
from nodeagent.images.remote.hosts import hosts_of
from nodeagent.metrics.pod_metrics import DESCRIPTORS

PROJECT = Path(__file__).parents[2]
PACKAGE = PROJECT / "nodeagent"
README = (PROJECT / "README.md").read_text()
SERVED = (NodeCalls, SandboxCalls, ContainerCalls, StreamCalls, StatsCalls, ImageService)
METHODS = [
    method for service in pb.DESCRIPTOR.services_by_name.values() for method in service.methods
]

# Refused by this name; nothing in it is looked at.
WHOLE = "windows"


def requested() -> dict[str, set[str]]:
    """The fields of all messages that a request may hold, but for those of another system."""
    found: dict[str, set[str]] = {}
    pending = [method.input_type for method in METHODS]
    while pending:
        message = pending.pop()
        if message.name in found or message.GetOptions().map_entry:
            continue
        found[message.name] = set(message.fields_by_name)
        fields = (field for field in message.fields if field.name != WHOLE)
        pending += [field.message_type for field in fields if field.message_type is not None]
    return {name: fields for name, fields in found.items() if fields}


def rows() -> Iterator[tuple[list[str], set[str]]]:
    """The rows of the tables of fields: the messages that each is about, and the names in code style in it."""
    for line in (PROJECT / "docs/fields.md").read_text().splitlines():
        if line.startswith("|") and not line.startswith(("| Message |", "|---")):
            messages, text = line.removeprefix("| ").split(" | ", 1)
            yield messages.split(", "), set(re.findall(r"`(\w+)`", text))


def test_every_message_of_a_request_has_one_row() -> None:
    listed = [message for messages, _ in rows() for message in messages]
    assert sorted(listed) == sorted(requested())


@pytest.mark.parametrize(
    ("messages", "fields"), [pytest.param(*row, id=row[0][0]) for row in rows()]
)
def test_a_row_has_the_fields_of_its_messages(messages: list[str], fields: set[str]) -> None:
    contract = requested()
    assert fields == {field for message in messages for field in contract[message]}


def test_the_readme_names_the_calls_that_are_not_served() -> None:
    listed = re.findall(r"(?m)^\| (\w+) \| not yet \|$", README)
    assert sorted(listed) == sorted(method.name for method in METHODS if refuses(method.name))
    assert f"Of the {len(METHODS)} calls of the CRI" in README


def refuses(call: str) -> bool:
    """Whether all that a call does is to raise an error."""
    (method,) = (getattr(part, call) for part in SERVED if hasattr(part, call))
    definition = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0]
    assert isinstance(definition, ast.AsyncFunctionDef)
    return isinstance(definition.body[0], ast.Raise)


def test_the_readme_has_every_module() -> None:
    table = README.partition("## Modules")[2].partition("\n## ")[0]
    cells = " ".join(re.findall(r"(?m)^\| (.*?) \|", table))
    named = set(re.findall(r"`(?:nodeagent/)?([\w/]+(?:/|\.py))`", cells))
    packages = {f"{path.parent.relative_to(PACKAGE)}/" for path in PACKAGE.rglob("*/__init__.py")}
    files = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert named == packages | files


def test_the_kubelet_is_led_to_the_socket() -> None:
    text = (PROJECT / "docs/kubelet.md").read_text()
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    documents = [document for block in blocks for document in yaml.safe_load_all(block)]
    kinds = [document["kind"] for document in documents]
    assert kinds.count("KubeletConfiguration") == 2
    kubelet = documents[kinds.index("KubeletConfiguration")]
    kubeadm = documents[kinds.index("InitConfiguration")]
    assert kubelet["containerRuntimeEndpoint"] == Config().listen
    assert kubeadm["nodeRegistration"]["criSocket"] == Config().listen


def test_the_example_of_registry_hosts_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "registry.example.com"
    directory.mkdir()
    shutil.copy(PROJECT / "deploy/hosts.toml", directory)
    mirror, cache, proxy, server = hosts_of("registry.example.com", tmp_path)
    assert (server.root, server.mirror) == ("https://registry.example.com/v2", False)
    assert mirror.ca == (directory / "mirror-ca.crt",)
    assert (cache.resolve, cache.pull, cache.dial_seconds) == (False, True, 2.0)
    assert proxy.client == ((directory / "node.crt", directory / "node.key"),)
    assert proxy.headers == (("x-team", "platform"),)
    assert caplog.text == ""  # an unknown key would be noted


DOCUMENTS = [*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_link_leads_somewhere(path: Path) -> None:
    text = path.read_text()
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)", text):
        led = path.parent / target if target else path
        assert led.exists(), target
        if anchor:
            assert anchor in anchors(led.read_text()), f"{target}#{anchor}"


def anchors(text: str) -> list[str]:
    """Those that a forge makes of headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_file_of_the_project_that_is_named_is_there(path: Path) -> None:
    folders = "nodeagent|tests|docs|deploy|bench|protos"
    named = re.findall(rf"`((?:{folders})/[\w./-]*)`", path.read_text())
    assert [name for name in named if not (PROJECT / name).exists()] == []


def test_the_glossary_is_short_and_of_words_in_use() -> None:
    sections_of_design = (PROJECT / "docs/design.md").read_text().split("\n## ")
    (glossary,) = (text for text in sections_of_design if re.match(r"[\d. ]*Glossary\n", text))
    words = re.findall(r"(?m)^\| ([a-z ]+) \|", glossary)
    assert 0 < len(words) <= 20
    code = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py")).lower()
    assert [word for word in words if not re.search(rf"\b{word}|_{word}", code)] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_setting_or_a_metric_that_is_named_exists(path: Path) -> None:
    text = path.read_text()
    keys = {section.name: {key.name for key in section.settings} for section in sections()}
    named = re.findall(rf"`({'|'.join(filter(None, keys))})\.(\w+)(?![\w.])", text)
    named = [each for each in named if each != ("cgroup", "procs")]  # a file of the kernel
    assert [(table, key) for table, key in named if key not in keys[table]] == []
    metrics = {row.name for row in metric_rows()} | {descriptor.name for descriptor in DESCRIPTORS}
    named_metrics = re.findall(r"`((?:nodeagent|container)_\w+_(?:total|bytes|info|pods))", text)
    assert [name for name in named_metrics if name not in metrics] == []
