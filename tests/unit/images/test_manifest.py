"""Documents of images, well-formed and not."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.errors import InvalidArgument, NodeAgentError, NotFound, Unsupported
from nodeagent.images import manifest
from nodeagent.images.manifest import (
    Index,
    Manifest,
    chain_ids,
    choose,
    parse_image,
    parse_manifest,
)

DIGEST = "sha256:" + "0" * 64
LAYER = {
    "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
    "digest": DIGEST,
    "size": 5,
}
CONFIG = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": DIGEST, "size": 2}


def encoded(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def image(**run: Any) -> bytes:
    return encoded(
        architecture=manifest.ARCHITECTURE,
        os="linux",
        config=run,
        rootfs={"type": "layers", "diff_ids": [DIGEST]},
    )


def entry(digit: str, *platform: str) -> dict[str, Any]:
    names = ("os", "architecture", "variant")
    return {
        "mediaType": manifest.OCI_MANIFEST,
        "digest": f"sha256:{digit * 64}",
        "size": 5,
        "platform": dict(zip(names, platform, strict=False)),
    }


def test_manifest_of_either_family() -> None:
    for media_type in (manifest.OCI_MANIFEST, manifest.DOCKER_MANIFEST, ""):
        parsed = parse_manifest(encoded(schemaVersion=2, config=CONFIG, layers=[LAYER]), media_type)
        assert isinstance(parsed, Manifest)
        assert parsed.layers[0].size == 5


def test_null_means_absent() -> None:
    data = encoded(schemaVersion=2, config=CONFIG, layers=[LAYER], manifests=None, annotations=None)
    assert isinstance(parse_manifest(data), Manifest)


def test_ambiguous_documents_are_refused() -> None:
    both = encoded(schemaVersion=2, config=CONFIG, layers=[LAYER], manifests=[])
    with pytest.raises(InvalidArgument, match="both"):
        parse_manifest(both)
    plain = encoded(schemaVersion=2, config=CONFIG, layers=[LAYER])
    with pytest.raises(InvalidArgument, match="both"):
        parse_manifest(plain, manifest.OCI_INDEX)


def test_schema_1_is_named() -> None:
    old = encoded(schemaVersion=1, fsLayers=[])
    with pytest.raises(Unsupported, match="schema 1"):
        parse_manifest(old, "application/vnd.docker.distribution.manifest.v1+prettyjws")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"layers": [LAYER] * 201}, "201 layers"),
        ({"layers": [LAYER | {"size": -1}]}, "layers.*size"),
        ({"layers": [LAYER | {"size": "5"}]}, "layers.*size"),
        ({"layers": [LAYER | {"digest": "sha256:1"}]}, "layers.*digest"),
        ({"layers": [LAYER | {"digest": DIGEST + "\n"}]}, "layers.*digest"),
        ({"layers": [LAYER | {"digest": "../" + DIGEST}]}, "layers.*digest"),
        ({"config": None}, "config"),
        ({"config": 5}, "config"),
    ],
)
def test_malformed_manifests(change: dict[str, Any], text: str) -> None:
    document = {"schemaVersion": 2, "config": CONFIG, "layers": [LAYER]} | change
    with pytest.raises(InvalidArgument, match=text):
        parse_manifest(encoded(**document))


def test_encrypted_and_unknown_layers_are_unsupported() -> None:
    for media_type in (LAYER["mediaType"] + "+encrypted", "text/plain", ""):  # type: ignore[operator]
        data = encoded(schemaVersion=2, config=CONFIG, layers=[LAYER | {"mediaType": media_type}])
        with pytest.raises(Unsupported, match="layer 0"):
            parse_manifest(data)


def test_a_document_has_a_bound() -> None:
    data = encoded(schemaVersion=2, config=CONFIG, layers=[LAYER], x="y" * (4 << 20))
    with pytest.raises(InvalidArgument, match="longer"):
        parse_manifest(data)


def test_chooses_this_platform() -> None:
    here = manifest.ARCHITECTURE
    entries = [
        entry("1", "unknown", "unknown"),
        entry("2", "windows", here),
        entry("3", "linux", "s390x"),
        entry("4", "linux", here),
        entry("5", "linux", here),
    ]
    index = parse_manifest(encoded(schemaVersion=2, manifests=entries))
    assert isinstance(index, Index)
    assert choose(index).digest == entries[3]["digest"]


def chosen(*entries: dict[str, Any]) -> str:
    """The digit of the entry that this node takes."""
    index = parse_manifest(encoded(schemaVersion=2, manifests=entries))
    assert isinstance(index, Index)
    return choose(index).digest[-1]


@pytest.fixture(params=["amd64", "arm64"])
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the node is."""
    monkeypatch.setattr(manifest, "ARCHITECTURE", request.param)
    return str(request.param)


@pytest.mark.parametrize(
    "names",
    [
        {"amd64": ("amd64",), "arm64": ("arm64",)},
        {"amd64": ("x86_64",), "arm64": ("aarch64",)},
        {"amd64": ("x86-64",), "arm64": ("arm64", "8")},
        {"amd64": ("amd64", "v1"), "arm64": ("arm64", "v8")},
        {"amd64": ("AMD64",), "arm64": ("AARCH64", "V8")},
    ],
)
def test_other_names_of_this_platform(architecture: str, names: dict[str, tuple[str, ...]]) -> None:
    assert chosen(entry("1", "linux", "s390x"), entry("2", "linux", *names[architecture])) == "2"


@pytest.mark.parametrize(
    ("node", "worst_first"),
    [
        ("amd64", [("i386",), ("amd64",)]),
        ("arm64", [("arm", "v5"), ("armel",), ("arm", "7"), ("arm", "v8"), ("aarch64",)]),
    ],
)
def test_32_bit_images_come_last(
    monkeypatch: pytest.MonkeyPatch, node: str, worst_first: list[tuple[str, ...]]
) -> None:
    monkeypatch.setattr(manifest, "ARCHITECTURE", node)
    entries = [entry(str(n), "linux", *names) for n, names in enumerate(worst_first)]
    for count in range(1, len(entries) + 1):
        assert chosen(*entries[:count]) == str(count - 1)


@pytest.mark.parametrize("names", [("amd64", "v3"), ("arm", "v9"), ("s390x",), ("unknown",)])
def test_what_this_node_may_not_run_is_not_chosen(names: tuple[str, ...]) -> None:
    with pytest.raises(NotFound, match="/".join(("linux", *names))):
        chosen(entry("1", "linux", *names))


def test_an_entry_that_wants_a_feature_comes_after_one_that_wants_none() -> None:
    special = entry("1", "linux", manifest.ARCHITECTURE)
    special["platform"]["os.features"] = ["erofs"]
    assert chosen(special, entry("2", "linux", manifest.ARCHITECTURE)) == "2"
    assert chosen(special) == "1"


def test_nulls_in_an_index() -> None:
    ours = entry("1", "linux", manifest.ARCHITECTURE)
    ours["platform"] |= {"variant": None, "os.features": None}
    ours |= {"mediaType": None, "annotations": {"a": None}, "urls": None}
    assert chosen(ours) == "1"


def test_another_platform_is_named() -> None:
    with pytest.raises(NotFound, match="linux/s390x"):
        chosen(entry("1", "linux", "s390x"))


def test_a_config_of_another_platform_is_no_reason_not_to_take_it() -> None:
    other = encoded(os="linux", architecture="s390x", rootfs={"diff_ids": []})
    assert str(parse_image(other, 0).platform) == "linux/s390x"


def test_a_platform_is_short_and_on_one_line() -> None:
    """A config's is in the agent's log, where the image would write lines of its own."""
    document = encoded(os="linux\nERROR \x1b[2J", architecture="x" * 1000)
    shown = str(parse_image(document, 0).platform)
    assert shown.startswith("linux ERROR  [2J/xx")
    assert shown.isprintable()
    assert len(shown) == 100


@pytest.mark.parametrize("layers", [{}, {"layers": None}, {"layers": []}])
def test_an_image_without_layers(layers: dict[str, Any]) -> None:
    parsed = parse_manifest(encoded(schemaVersion=2, config=CONFIG, **layers))
    assert isinstance(parsed, Manifest)
    assert parsed.layers == ()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rootfs": None},
        {"rootfs": {}},
        {"rootfs": {"type": "", "diff_ids": None}},
        {"rootfs": {"type": "layers", "diff_ids": []}},
        {"rootfs": {"type": None, "diff_ids": []}, "config": None, "architecture": None},
    ],
)
def test_the_config_of_an_image_without_layers(config: dict[str, Any]) -> None:
    parsed = parse_image(encoded(**config), 0)
    assert parsed.chain_ids == ()
    assert manifest.is_for_this_node(parsed.platform)


def test_config_with_nulls() -> None:
    run = parse_image(image(Env=None, Entrypoint=None, Cmd=["sh"], User=None, Volumes=None), 1)
    assert run.config.cmd == ("sh",)
    assert run.config.env == ()
    run = parse_image(
        image(Env=["A=1", None], Cmd=[None], Labels={"a": None}, Volumes={"/v": None}), 1
    )
    assert (run.config.env, run.config.cmd) == (("A=1", ""), ("",))
    assert (run.config.labels, run.config.volumes) == ({"a": ""}, ("/v",))


def test_an_env_entry_without_a_name_is_no_reason_not_to_pull() -> None:
    assert parse_image(image(Env=["=1", "A"]), 1).config.env == ("=1", "A")


def test_config_is_read_whole() -> None:
    parsed = parse_image(
        image(
            User="1:2",
            Env=["A=1\n2", "B="],
            WorkingDir="srv",
            StopSignal="SIGQUIT",
            Labels={"a": "b"},
            Volumes={"/data": {}},
        ),
        1,
    )
    config = parsed.config
    assert (config.user, config.env, config.working_dir) == ("1:2", ("A=1\n2", "B="), "/srv")
    assert (config.stop_signal, config.labels, config.volumes) == (
        "SIGQUIT",
        {"a": "b"},
        ("/data",),
    )


@pytest.mark.parametrize(
    "run",
    [
        {"Env": ["A=1\0B=2"]},
        {"Env": "A=1"},
        {"Env": [1]},
        {"User": "root\0"},
        {"User": 0},
        {"User": "4294967295"},
        {"User": "1000:4294967295"},
        {"User": "9" * 5000},
        {"User": "١٠٠٠"},
        {"User": "app:" + "9" * 5000},
        {"User": "٣"},
        {"Entrypoint": "sh"},
        {"Cmd": {"a": "b"}},
        {"Labels": {"a\0": "b"}},
        {"Labels": {"a": 1}},
        {"Volumes": ["/data"]},
    ],
)
def test_malformed_configs(run: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="config"):
        parse_image(image(**run), 1)


@pytest.mark.parametrize("user", ["4294967294:0", "0001000", "a9:", ":5", "²"])
def test_users(user: str) -> None:
    assert parse_image(image(User=user), 1).config.user == user


def test_layers_and_diff_ids_must_agree() -> None:
    with pytest.raises(InvalidArgument, match="1 entries for 2 layers"):
        parse_image(image(), 2)


def test_chain_ids() -> None:
    one, two = "sha256:" + "1" * 64, "sha256:" + "2" * 64
    chain = chain_ids((one, two))
    assert chain == (one, manifest.digest(f"{one} {two}".encode()))
    assert chain_ids(()) == ()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just(DIGEST),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["schemaVersion", "mediaType", "manifests", "layers", "config", "rootfs", "os", "architecture"]
)


@given(st.dictionaries(KEYS, JSON | st.just(CONFIG) | st.just([LAYER])) | JSON)
def test_any_json_is_an_image_or_refused(document: Any) -> None:
    for parse in (parse_manifest, lambda data: parse_image(data, 1)):
        try:
            parse(json.dumps(document).encode())
        except NodeAgentError:
            pass


@given(st.binary(max_size=64))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgument):
        parse_manifest(data)
