"""Names of images as users write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.errors import InvalidArgument
from nodeagent.images.reference import Reference, id_prefix, parse

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("library/busybox", "docker.io/library/busybox:latest"),
        ("grafana/grafana", "docker.io/grafana/grafana:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/library/busybox:1", "docker.io/library/busybox:1"),
        ("registry-1.docker.io/a/b", "docker.io/a/b:latest"),
        ("localhost/busybox", "localhost/busybox:latest"),
        ("localhost:5000/busybox", "localhost:5000/busybox:latest"),
        ("localhosts/busybox", "docker.io/localhosts/busybox:latest"),
        ("127.0.0.1:5000/a/b/c:v1.0_x-Y", "127.0.0.1:5000/a/b/c:v1.0_x-Y"),
        ("[fd00::1]:5000/a", "[fd00::1]:5000/a:latest"),
        ("Registry/a", "Registry/a:latest"),
        ("host:80/a", "host:80/a:latest"),
        ("a.b/c__d.e-f---g", "a.b/c__d.e-f---g:latest"),
        (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        (f"busybox:1.36@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        ("a" * 63, "docker.io/library/" + "a" * 63 + ":latest"),
        ("registry.example:5000/" + "a" * 255, "registry.example:5000/" + "a" * 255 + ":latest"),
    ],
)
def test_normalises(text: str, normal: str) -> None:
    assert str(parse(text)) == normal
    assert parse(normal) == parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":tag",
        "/a",
        "a/",
        "a//b",
        "a b",
        "A",
        "a/B",
        "a.b/",
        "a:",
        "a:-x",
        "a:" + "x" * 129,
        "a\n",
        "a:latest\n",
        "a\0",
        "a/../b",
        "a.b/../../etc",
        "ä/b",
        "https://a.b/c",
        "a@",
        "a@sha256:abc",
        "a@md5:" + "0" * 32,
        "a@" + DIGEST.upper(),
        "a@" + DIGEST + "@" + DIGEST,
        "-a.b/c",
        "[::1/a",
        "[::1::]/a",
        "[abc]/a",
        "a.b:65536/c",
        "a.b:0/c",
        "a_b.c:5000/d",
        "0123456789abcdef" * 4,
        "a." + "b" * 260 + "/c",
        "a.b/" + "c" * 256,
        "a/" * 5000 + "a",
    ],
)
def test_refuses(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^image "):
        parse(text)


def test_tag_and_digest_exclude_each_other() -> None:
    assert parse(f"a:1@{DIGEST}") == Reference("docker.io", "library/a", "", DIGEST)
    assert parse(f"a:1@{DIGEST}").version == DIGEST
    assert parse("a:1").version == "1"


@pytest.mark.parametrize(
    ("text", "digits"),
    [
        ("0123456789abcdef" * 4, "0123456789abcdef" * 4),
        (DIGEST, DIGEST[7:]),
        (DIGEST[:20], DIGEST[7:20]),
        ("0123456789abc", "0123456789abc"),
        ("cafe", None),
        ("sha256:", None),
        ("busybox", None),
        ("0" * 65, None),
        ("ABCDEF0123456", None),
    ],
)
def test_id_prefix(text: str, digits: str | None) -> None:
    assert id_prefix(text) == digits


@given(st.text(max_size=400))
def test_any_text_is_a_name_or_refused(text: str) -> None:
    try:
        reference = parse(text)
    except InvalidArgument:
        return
    assert parse(str(reference)) == reference
    assert bool(reference.tag) != bool(reference.digest)


COMPONENT = st.from_regex(r"[a-z0-9]{1,8}(([._]|__|-{1,3})[a-z0-9]{1,4}){0,2}", fullmatch=True)
TAG = st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,20}", fullmatch=True)
DOMAIN = st.from_regex(r"([a-z0-9]{1,6}\.[a-z]{2,4}|localhost)(:[1-9][0-9]{0,3})?", fullmatch=True)


@given(DOMAIN, st.lists(COMPONENT, min_size=2, max_size=4), TAG)
def test_full_names_stay_as_they_are(domain: str, components: list[str], tag: str) -> None:
    text = f"{domain}/{'/'.join(components)}:{tag}"
    if domain in ("index.docker.io", "registry-1.docker.io"):
        return
    assert str(parse(text)) == text
