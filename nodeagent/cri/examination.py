"""`nodeagent check --pod`: what this node would refuse or skip of a pod, and why, without an agent.

The requests pass through the code of RunPodSandbox and CreateContainer: the same translation, the same checks and the
same planner, up to the plans. Nothing is made, started or kept; what only an attempt can tell is reported as "not
seen". An object is refused with its first fault, as a request is.
"""

import asyncio
import base64
import json
import logging
import os
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

from nodeagent import probes
from nodeagent.api import runtime_pb2 as pb
from nodeagent.cgroups.manager import Cgroups
from nodeagent.config import Config
from nodeagent.cri.translate_container import container_config
from nodeagent.cri.translate_sandbox import sandbox_config
from nodeagent.errors import FailedPrecondition, InvalidArgument, NodeAgentError, Unsupported
from nodeagent.images import layer_store
from nodeagent.images.image_store import ImageStore
from nodeagent.lifecycle.events import Events
from nodeagent.lifecycle.inventory import Inventory
from nodeagent.lifecycle.places import Places
from nodeagent.lifecycle.plan import process
from nodeagent.lifecycle.plan.cdi import Cdi
from nodeagent.lifecycle.plan.planner import Planner
from nodeagent.lifecycle.plan.profiles import Profiles
from nodeagent.lifecycle.pods import sandboxes
from nodeagent.linux import capabilities, syscalls
from nodeagent.net.hostports import HostPorts
from nodeagent.records import Container, Image, ImageConfig, Layer, Sandbox
from nodeagent.requests import ContainerConfig, SandboxConfig
from nodeagent.sandbox import host_path
from nodeagent.sandbox.spec import ContainerPlan, Mount
from nodeagent.store import Store
from nodeagent.text import one_line

M = TypeVar("M", bound=Message)
T = TypeVar("T")

Outcome = Literal["refused", "skipped", "made", "not seen"]

MAX_FILE_BYTES = 16 << 20  # the limit of a gRPC message, see `server.MAX_MESSAGE_BYTES`
_ID = "0" * 64  # of a pod or container that there will never be
_JSON: dict[type, str] = {list: "array", str: "string"}


class Finding(NamedTuple):
    """A remark on one object. made: what the agent would make on the node. not seen: what could not be checked."""

    outcome: Outcome
    what: str
    text: str

    def __str__(self) -> str:
        return one_line(f"{self.outcome:9} {self.what}: {self.text}")


class Pod(NamedTuple):
    """The requests for one pod. unknown: fields of the files that are ignored."""

    sandbox: pb.PodSandboxConfig
    containers: list[pb.ContainerConfig]
    handler: str
    unknown: list[str]


# --- the files ---


def load(paths: Sequence[Path]) -> Pod:
    """A pod from JSON files: PodSandboxConfig and ContainerConfigs as crictl takes them, or one file with both.

    The latter has ``{"sandbox": …, "containers": […], "runtime_handler": …}``. Raises InvalidArgument, with the file.
    """
    sandbox: pb.PodSandboxConfig | None = None
    containers: list[pb.ContainerConfig] = []
    handler, unknown = "", list[str]()
    for path in paths:
        document = _read(path)
        both = "sandbox" in document
        is_container = not both and "image" in document
        if both or not is_container:
            if sandbox is not None:
                raise InvalidArgument(f"{path}: a second pod; there can be one")
            given = document["sandbox"] if both else document
            sandbox = _parse(given, pb.PodSandboxConfig(), f"{path}: sandbox", unknown)
            handler = _given(document, "runtime_handler", str, path) if both else ""
        listed = _given(document, "containers", list, path) if both else [document] * is_container
        for index, given in enumerate(listed):
            where = f"{path}: containers[{index}]" if both else f"{path}: container"
            container = _parse(_with_encoded_envs(given), pb.ContainerConfig(), where, unknown)
            containers.append(container)
    if sandbox is None:
        raise InvalidArgument(f"{', '.join(map(str, paths))}: there is no pod, only containers")
    return Pod(sandbox, containers, handler, unknown)


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise InvalidArgument(f"{path}: is larger than {MAX_FILE_BYTES} bytes")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path}: is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise InvalidArgument(f"{path}: is not a JSON object")
    if "apiVersion" in document:
        raise InvalidArgument(
            f"{path}: is a manifest of Kubernetes; give the requests that a kubelet makes of it: "
            "the JSON of a PodSandboxConfig and of ContainerConfigs"
        )
    return document


def _given(document: dict[str, Any], name: str, kind: type[T], path: Path) -> T:
    """A field, empty where it is absent."""
    value = document.get(name, kind())
    if not isinstance(value, kind):
        raise InvalidArgument(f"{path}: {name}: is not a JSON {_JSON[kind]}")
    if kind is str:
        _require_text(value, f"{path}: {name}")
    return value


def _require_text(document: object, where: str) -> None:
    """Refuse half a surrogate pair, which JSON can hold (RFC 8259, 8.2) and neither protobuf nor a terminal takes."""
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{where}: {error}") from None


def _with_encoded_envs(document: object) -> object:
    """Encode the values of variables in base64, as protobuf's JSON has bytes: crictl's files have plain text."""
    envs = document.get("envs") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(envs, list):
        return document
    return {**document, "envs": [_with_encoded_value(env) for env in envs]}


def _with_encoded_value(env: object) -> object:
    value = env.get("value") if isinstance(env, dict) else None
    if not isinstance(env, dict) or not isinstance(value, str):
        return env
    return {**env, "value": base64.b64encode(value.encode(errors="replace")).decode()}


def _parse(document: object, message: M, where: str, unknown: list[str]) -> M:
    """Fill `message`; fields that the contract lacks are ignored, as proto3 has it, and the first is noted."""
    if not isinstance(document, dict):
        raise InvalidArgument(f"{where}: is not a JSON object")
    _require_text(document, where)
    try:
        return json_format.ParseDict(document, message)
    except json_format.ParseError as error:
        first = one_line(f"{where}: {error}")
    message.Clear()
    try:
        json_format.ParseDict(document, message, ignore_unknown_fields=True)
    except json_format.ParseError as error:
        raise InvalidArgument(one_line(f"{where}: {error}")) from None
    unknown.append(first)
    return message


# --- the pod ---


def examine(config: Config, pod: Pod) -> list[Finding]:
    """Return all findings, in the order of the objects. Raises Unsupported on a machine without cgroups."""
    places = Places.of(config)
    store = Store.copy_of(places.database, places.journal)
    try:
        return asyncio.run(_Examination(config, places, store).run(pod))
    finally:
        store.close()


class _StoredImages:
    """The images of the node. An empty image stands in for one that is missing, and `missing` lists its name.

    directory: where their layers are.
    """

    def __init__(self, store: Store, directory: Path) -> None:
        self._images = ImageStore(store, ())
        self._layers = {layer.chain_id: layer for layer in store.all(Layer)}
        self._directory = directory
        self.missing: list[str] = []

    def find(self, name_or_id: str) -> Image:
        found = self._images.find(name_or_id)
        if found is not None:
            return found
        self.missing.append(name_or_id)
        unknown = ImageConfig(cmd=("unknown",))
        return Image(id="", manifest="", layers=(), size_bytes=0, config=unknown, pulled_at=0)

    def lower_dirs(self, image: Image) -> tuple[Path, ...]:
        return layer_store.stack(self._directory, self._layers, image.layers)


class _Artifacts:
    """A stand-in for the security profiles of a running agent: none is read, `asked` lists their names."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def read(self, reference: str) -> None:
        self.asked.append(reference)


class _Examination:
    def __init__(self, config: Config, places: Places, store: Store) -> None:
        self._config = config
        self._places = places
        self._host_ports = HostPorts(store)
        self._images = _StoredImages(store, places.root / "layers")
        self._cgroups = Cgroups.open(
            driver=config.cgroup.driver,
            default_parent=config.cgroup.parent or f"/nodeagent-{places.instance}",
        )
        self._artifacts = _Artifacts()
        self._planner = Planner(
            Inventory(store, Events()),
            self._images,
            self._cgroups,
            Profiles(config.seccomp.default_profile),
            self._artifacts,
            config,
            pods=places.pods,
        )
        self._cdi = Cdi([Path(each) for each in config.cdi.directories], config.cdi.hook_programs)
        self._findings: list[Finding] = []

    async def run(self, pod: Pod) -> list[Finding]:
        for text in pod.unknown:
            self._found("skipped", "fields that this agent does not know", text)
        metadata = pod.sandbox.metadata
        what = f'pod sandbox "{metadata.namespace}/{metadata.name}"'
        sandbox = await self._try(what, self._sandbox(pod.sandbox, pod.handler, what))
        for message in pod.containers:
            what = f'container "{message.metadata.name}"'
            if sandbox is None:
                self._found("not seen", what, "its pod is refused")
            else:
                await self._try(what, self._container(sandbox, message, what))
        return self._findings

    def _found(self, outcome: Outcome, what: str, text: str) -> None:
        self._findings.append(Finding(outcome, what, text))

    async def _try(self, what: str, look: Awaitable[T]) -> T | None:
        """Await `look`: an error means that the object is refused, log lines name what was skipped."""
        log = logging.getLogger("nodeagent")
        heard = _Heard()
        before = log.level, log.propagate
        log.addHandler(heard)
        log.setLevel(logging.INFO)
        # The planner says only in its log what it leaves out of a plan: its lines become findings, and are not printed.
        log.propagate = False
        try:
            return await look
        except (NodeAgentError, OSError) as error:
            self._found("refused", what, str(error))
            return None
        finally:
            log.removeHandler(heard)
            log.level, log.propagate = before
            for text in heard.texts:
                self._found("skipped", what, text)

    async def _sandbox(self, message: pb.PodSandboxConfig, handler: str, what: str) -> Sandbox:
        config = sandbox_config(message)
        parent = sandboxes.admit(config, handler, self._config.handlers, self._cgroups)
        self._require_user_namespaces(config)
        self._look_at_ports(config)
        if config.sysctls:
            self._found("not seen", what, "whether the kernel takes the values of its sysctls")
        return Sandbox(
            id=_ID,
            config=config,
            runtime_handler=handler,
            cgroup_parent=parent or self._cgroups.pod_path(_ID),
            boot_id="",
            created_at=0,
        )

    def _require_user_namespaces(self, config: SandboxConfig) -> None:
        if config.namespaces.user_mapping is None:
            return
        try:
            mapped = probes.maps_ids(self._places.root)
        except OSError as error:
            raise Unsupported(f"user namespaces: {error.strerror}") from None
        if not mapped:
            raise Unsupported("user namespaces: this kernel maps no ids of layers")

    def _look_at_ports(self, config: SandboxConfig) -> None:
        wanted = [mapping for mapping in config.port_mappings if mapping.host_port]
        if config.namespaces.network == "node" or not wanted:
            return
        network = self._config.network
        subnets = {4: network.subnet4, 6: network.subnet6}
        self._host_ports.wanted(_ID, wanted, [version for version in subnets if subnets[version]])
        if not network.host_ports:
            raise FailedPrecondition("host ports: network.host_ports of the configuration is off")
        if not probes.forwards_ports():
            raise Unsupported("host ports: this kernel has no nf_tables")

    async def _container(self, sandbox: Sandbox, message: pb.ContainerConfig, what: str) -> None:
        config = container_config(message, sandbox.config, sandbox.runtime_handler)
        in_userns = sandbox.config.namespaces.user_mapping is not None
        config = self._cdi.inject(config, userns=in_userns)
        self._images.missing.clear()
        self._artifacts.asked.clear()
        image = self._images.find(config.image)
        container = Container(
            id=_ID,
            sandbox_id=sandbox.id,
            config=config,
            image_id=image.id,
            image_ref="",
            image_name=config.image,
            cgroup_path=self._cgroups.container_path(sandbox.cgroup_parent, _ID),
            resources=config.resources,
            stop_signal=process.stop_signal(config, image.config),
        )
        inputs = await self._planner.resolve(config)
        directory = self._places.containers / _ID
        plan = self._planner.plan(sandbox, container, image, inputs, directory)
        for name in dict.fromkeys(self._images.missing):
            text = f'image "{name}" is not on this node: its user, command, environment, volumes'
            self._found("not seen", what, text)
        for name in self._artifacts.asked:
            text = f'security profile "{name}": whether it is on this node, and what it forbids'
            self._found("not seen", what, text)
        self._look_at_mounts(plan, what)
        self._look_at_rights(config, plan, what)
        if config.resources != type(config.resources)():
            self._found("not seen", what, "whether the kernel takes its limits")

    def _look_at_mounts(self, plan: ContainerPlan, what: str) -> None:
        """Check host paths as the container's first process will; they may change before it does."""
        for mount in plan["mounts"]:
            own = Path(mount["source"]).is_relative_to(self._places.pods)
            if mount["kind"] != "bind" or own:
                continue
            if mount.get("absent") == "make" and not os.path.exists(mount["source"]):
                _require_place(mount)
                text = f'"{mount["source"]}" does not exist: a directory, for {mount["target"]}'
                self._found("made", what, text)
                continue
            origin = host_path.open_host_path(mount)
            try:
                host_path.require_propagation(mount, origin)
            finally:
                os.close(origin)

    def _look_at_rights(self, config: ContainerConfig, plan: ContainerPlan, what: str) -> None:
        """Note rights that a container cannot get because the agent lacks them; this command stands for the agent."""
        _, held, _ = syscalls.capget()
        lacking = plan["process"]["capabilities"]["bounding"] & ~held
        for name in capabilities.names(lacking):
            self._found("skipped", what, f"capability {name}: the agent does not have it itself")
        if config.resources.oom_score_adj < _own_oom_score() and not held & probes.SYS_RESOURCE:
            text = f"oom_score_adj {config.resources.oom_score_adj}: takes CAP_SYS_RESOURCE"
            self._found("skipped", what, text)


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _require_place(mount: Mount) -> None:
    """Raise FailedPrecondition where an absent host path cannot be made: see `host_path.open_host_path`."""
    path = above = mount["source"]
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if above == path or not os.path.isdir(above):
        raise FailedPrecondition(
            f'host path "{path}" for {mount["target"]}: "{above}" is no directory, or a link to nothing'
        )


def _own_oom_score() -> int:
    return int(Path("/proc/self/oom_score_adj").read_text())
