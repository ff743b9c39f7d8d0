"""Whatever a client sends is translated or refused on purpose, never anything else."""

from typing import Any

from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri.translate_container import container_config
from nodeagent.cri.translate_sandbox import sandbox_config
from nodeagent.errors import InvalidArgument, Unsupported
from nodeagent.requests import ContainerConfig, MountConfig, SandboxConfig

POD = SandboxConfig(name="p", uid="u", namespace="n", privileged=True)

# Texts that are near to what fields want, and what attacks are made of.
TEXTS = st.sampled_from(
    [
        *"a 0-3 2MB rwm 10.0.0.1 noexec NET_RAW ALL localhost/x net.core.somaxconn memory.max v/c=d é".split(),
        "",
        "\x00",
        "a\n",
    ]
) | st.text(max_size=8)
PATHS = st.sampled_from([*"/ /a /a/b //a/./b/ /a/../.. .. a/b".split(), "", "/a\x00"])
NUMBERS = st.sampled_from([-(1 << 31), -2, -1, 0, 1, 80, 1000, 65_535, 100_000, (1 << 31) - 1])


def messages(cls: type[Message], depth: int = 6) -> st.SearchStrategy[Any]:
    """Messages of a type with any of its fields set."""
    fields = {
        field.name: values
        for field in cls.DESCRIPTOR.fields
        if (values := _values(field, depth)) is not None
    }
    return st.fixed_dictionaries({}, optional=fields).map(lambda given: cls(**given))


def _values(field: Any, depth: int) -> st.SearchStrategy[Any] | None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return st.dictionaries(TEXTS, TEXTS, max_size=3)
    single = _single(field, depth)
    if single is None or not field.is_repeated:
        return single
    return st.lists(single, max_size=3)


def _single(field: Any, depth: int) -> st.SearchStrategy[Any] | None:
    if field.message_type is not None:
        return messages(field.message_type._concrete_class, depth - 1) if depth else None
    kinds: dict[int, st.SearchStrategy[Any]] = {
        field.TYPE_STRING: PATHS if "path" in field.name else TEXTS,
        field.TYPE_BYTES: st.binary(max_size=4),
        field.TYPE_BOOL: st.booleans(),
        field.TYPE_ENUM: st.integers(0, 4),
        field.TYPE_UINT32: NUMBERS.map(abs),
        field.TYPE_UINT64: NUMBERS.map(abs),
    }
    return kinds.get(field.type, NUMBERS)


def clean(path: str) -> bool:
    parts = path.split("/")
    return path == "/" or (parts[0] == "" and all(p not in ("", ".", "..") for p in parts[1:]))


def check_mount(mount: MountConfig) -> None:
    assert clean(mount.container_path)
    assert bool(mount.host_path) != bool(mount.image)
    assert not mount.host_path or clean(mount.host_path)
    assert not mount.recursive_read_only or mount.readonly


def check_container(config: ContainerConfig) -> None:
    assert config.name
    assert config.image
    for mount in config.mounts:
        check_mount(mount)
    for path in (*(config.masked_paths or ()), *(config.readonly_paths or ())):
        assert clean(path)
    for name, value in config.envs:
        assert not {"\0", "="} & set(name)
        assert b"\0" not in value
    assert not any("\0" in argument for argument in (*config.command, *config.args))


@settings(max_examples=100)
@given(messages(pb.PodSandboxConfig))
def test_sandboxes(config: pb.PodSandboxConfig) -> None:
    config.ClearField("windows")
    config.metadata.MergeFrom(pb.PodSandboxMetadata(name="n", uid="u", namespace="s"))
    try:
        record = sandbox_config(config)
    except (InvalidArgument, Unsupported):
        return
    assert record.labels == dict(config.labels)
    assert not record.log_directory or clean(record.log_directory)
    assert not record.cgroup_parent or clean(record.cgroup_parent)


@settings(max_examples=100)
@given(messages(pb.ContainerConfig))
def test_containers(config: pb.ContainerConfig) -> None:
    config.ClearField("windows")
    config.metadata.MergeFrom(pb.ContainerMetadata(name="n"))
    config.image.MergeFrom(pb.ImageSpec(image="i"))
    try:
        record = container_config(config, POD)
    except (InvalidArgument, Unsupported):
        return
    check_container(record)


@settings(max_examples=100)
@given(messages(pb.LinuxContainerSecurityContext), st.lists(messages(pb.Mount, 2), max_size=2))
def test_parts_of_containers(
    context: pb.LinuxContainerSecurityContext, mounts: list[pb.Mount]
) -> None:
    config = pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name="n"), image=pb.ImageSpec(image="i"), mounts=mounts
    )
    config.linux.security_context.CopyFrom(context)
    try:
        record = container_config(config, POD)
    except (InvalidArgument, Unsupported):
        return
    check_container(record)
