"""Credentials: to whom they go, and how."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.errors import InvalidArgument, PermissionDenied
from nodeagent.images.remote.auth import (
    ANONYMOUS,
    Auth,
    Challenge,
    Credentials,
    credentials,
    parse_challenges,
    parse_token,
    token_request,
)
from nodeagent.images.remote.hosts import Host

USER = Auth(username="me", password="secret")
REGISTRY = Host(root="https://a.b/v2")
MIRROR = Host(root="https://mirror/v2", mirror=True)
HUB = Host(root="https://registry-1.docker.io/v2")


@pytest.mark.parametrize(
    ("auth", "domain", "host"),
    [
        (USER, "a.b", REGISTRY),
        (USER, "a.b:443", REGISTRY),
        (USER, "docker.io", HUB),
        (USER, "a.b", Host(root="https://other-name/v2")),  # what the operator calls the registry
        (USER, "a.b", Host(root="http://a.b:443/v2", mirror=False)),
        (USER, "a.b", Host(root="https://a.b/v2", mirror=True)),
        (Auth(username="me", server_address="https://a.b/v1/"), "a.b", REGISTRY),
        (Auth(username="me", server_address="https://index.docker.io/v1/"), "docker.io", HUB),
        (Auth(username="me", server_address="mirror"), "a.b", MIRROR),
    ],
)
def test_sent_to_whom_they_belong(auth: Auth, domain: str, host: Host) -> None:
    assert credentials(auth, domain, host).username == "me"


@pytest.mark.parametrize(
    ("auth", "domain", "host"),
    [
        (None, "a.b", REGISTRY),
        (USER, "a.b", MIRROR),
        (USER, "docker.io", MIRROR),
        (USER, "a.b", Host(root="https://a.b:8443/v2", mirror=True)),
        (Auth(username="me", server_address="c.d"), "a.b", REGISTRY),
        (Auth(username="me", server_address="a.b"), "a.b", MIRROR),
    ],
)
def test_sent_to_nobody_else(auth: Auth | None, domain: str, host: Host) -> None:
    assert credentials(auth, domain, host) is ANONYMOUS


def test_encoded_pair() -> None:
    auth = Auth(auth=base64.b64encode(b"me:se:cret\0").decode())
    got = credentials(auth, "a.b", REGISTRY)
    assert (got.username, got.password) == ("me", "se:cret")
    assert got.basic == "Basic " + base64.b64encode(b"me:se:cret").decode()


@pytest.mark.parametrize("text", ["x", base64.b64encode(b"me").decode(), "c2Vjcm!0", "//79/A=="])
def test_malformed_pair_is_not_shown(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        credentials(Auth(auth=text), "a.b", REGISTRY)
    assert text not in str(caught.value).replace("auth: not base64 of a name and a password", "")


@pytest.mark.parametrize("address", ["a:b", "https://[::1", "http://a:99999"])
def test_malformed_address(address: str) -> None:
    with pytest.raises(InvalidArgument, match="server_address"):
        credentials(Auth(username="me", server_address=address), "a.b", Host(root="https://a.b/v2"))


def test_secrets_are_in_no_repr() -> None:
    auth = Auth(
        username="me",
        password="hidden",
        auth="hidden",
        identity_token="hidden",
        registry_token="hidden",
    )
    assert "hidden" not in repr(auth)
    assert "hidden" not in repr(Credentials("me", "hidden", "hidden", "hidden"))


@pytest.mark.parametrize(
    ("headers", "challenges"),
    [
        ([], []),
        (["Basic"], [Challenge("basic", {})]),
        (['Basic realm="a b"'], [Challenge("basic", {"realm": "a b"})]),
        (
            ['Bearer realm="https://t/x?y=1,2",service=r , scope="repository:a:pull,push"'],
            [
                Challenge(
                    "bearer",
                    {
                        "realm": "https://t/x?y=1,2",
                        "service": "r",
                        "scope": "repository:a:pull,push",
                    },
                )
            ],
        ),
        (
            ['Basic realm="b", BEARER Realm="c"'],
            [Challenge("basic", {"realm": "b"}), Challenge("bearer", {"realm": "c"})],
        ),
        (
            ["Negotiate", 'Basic realm="a\\"b"'],
            [Challenge("negotiate", {}), Challenge("basic", {"realm": 'a"b'})],
        ),
        (['Bearer realm="open'], [Challenge("bearer", {})]),
    ],
)
def test_challenges(headers: list[str], challenges: list[Challenge]) -> None:
    assert parse_challenges(headers) == challenges


@given(st.lists(st.text(max_size=200), max_size=3))
def test_any_header_is_read(headers: list[str]) -> None:
    for challenge in parse_challenges(headers):
        assert challenge.scheme == challenge.scheme.lower()


@given(st.lists(st.sampled_from(['"', "a", "=", ",", " ", "\\", 'b="c"', "Bearer "]), max_size=40))
def test_any_header_of_such_parts_is_read(parts: list[str]) -> None:
    parse_challenges(["".join(parts)])


BEARER = Challenge("bearer", {"realm": "https://auth/token", "service": "registry"})


def test_token_for_a_name_and_a_password() -> None:
    request = token_request(BEARER, Credentials("me", "pw"), "repository:a:pull", root="https://a/")
    assert request.query == {
        "scope": "repository:a:pull",
        "service": "registry",
        "account": "me",
    }
    assert request.authorization.startswith("Basic ")
    assert not request.form


def test_token_for_nobody() -> None:
    request = token_request(BEARER, ANONYMOUS, "repository:a:pull", root="https://a/")
    assert (request.authorization, "account" in request.query) == ("", False)


def test_token_for_a_refresh_token() -> None:
    request = token_request(
        BEARER, Credentials(identity_token="refresh"), "repository:a:pull", root="https://a/"
    )
    assert request.form["grant_type"] == "refresh_token"
    assert request.form["refresh_token"] == "refresh"
    assert request.form["scope"] == "repository:a:pull"
    assert not request.query


@pytest.mark.parametrize(
    ("realm", "root"),
    [
        ("", "https://a/"),
        ("http://auth/token", "https://a/"),
        ("file:///etc/passwd", "http://a/"),
        ("//auth/token", "https://a/"),
        ("https://user@auth/token", "https://a/"),
        ("https://", "https://a/"),
        ("https://[::1", "https://a/"),
        ("https://auth:99999/", "https://a/"),
    ],
)
def test_realms_that_get_nothing(realm: str, root: str) -> None:
    with pytest.raises(PermissionDenied):
        token_request(
            Challenge("bearer", {"realm": realm}), Credentials("me", "pw"), "s", root=root
        )


def test_a_plain_realm_of_a_plain_registry() -> None:
    challenge = Challenge("bearer", {"realm": "http://auth/token"})
    assert token_request(challenge, ANONYMOUS, "s", root="http://a/").realm == "http://auth/token"


@pytest.mark.parametrize("body", [b'{"token": "t"}', b'{"access_token": "t", "token": null}'])
def test_token(body: bytes) -> None:
    assert parse_token(body) == "t"


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b'{"token": 5}', b'{"token": "a\\nb"}', b'{"token": ""}', b"\xff"]
)
def test_no_token(body: bytes) -> None:
    with pytest.raises(PermissionDenied):
        parse_token(body)


@pytest.mark.parametrize("text", ["http://[", "a.b:port", "https://a.b:99999/v1/"])
def test_a_malformed_server_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="server_address"):
        credentials(Auth(username="me", server_address=text), "a.b", REGISTRY)


@pytest.mark.parametrize("token", ["a\nb", "a b", "é"])
def test_what_is_no_token_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(InvalidArgument, match="registry_token") as refusal:
        credentials(Auth(registry_token=token), "a.b", REGISTRY)
    assert token not in str(refusal.value)


@pytest.mark.parametrize(
    "realm", ["https://t.\udc94/", "https://t.é/", "\x00https://t/", "https://t/ ", "https://t\\\\"]
)
def test_a_realm_is_one_word(realm: str) -> None:
    """What urllib and yarl would understand differently, or a header cannot hold."""
    with pytest.raises(PermissionDenied, match="no token service"):
        token_request(Challenge("bearer", {"realm": realm}), ANONYMOUS, "s", root=REGISTRY.root)


def test_bytes_that_are_no_text_end_the_challenges() -> None:
    assert parse_challenges(["Basic", 'Bearer realm="https://t/",service="\udcff"', "Basic"]) == [
        Challenge("basic", {})
    ]


def test_a_token_answer_without_a_bottom_is_malformed() -> None:
    with pytest.raises(PermissionDenied, match="malformed"):
        parse_token(b'{"token":"t","x":' + b"[" * 200_000)
