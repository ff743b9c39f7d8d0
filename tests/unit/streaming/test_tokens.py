import pytest

from nodeagent.errors import InvalidArgument, ResourceExhausted
from nodeagent.streaming.backend import AttachRequest, ExecRequest, PortForwardRequest, Request
from nodeagent.streaming.tokens import LIFETIME_S, MAX_TICKETS, Tickets

EXEC = ExecRequest(container_id="c", command=("ls",), stdout=True)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tickets(clock: Clock) -> Tickets:
    return Tickets(clock)


def test_a_token_is_good_once(tickets: Tickets) -> None:
    token = tickets.issue(EXEC)
    assert tickets.redeem("exec", token) == EXEC
    assert tickets.redeem("exec", token) is None


def test_a_token_is_good_for_its_path_only(tickets: Tickets) -> None:
    assert tickets.redeem("attach", tickets.issue(EXEC)) is None


def test_a_token_is_good_for_a_minute(tickets: Tickets, clock: Clock) -> None:
    early, late = tickets.issue(EXEC), tickets.issue(EXEC)
    clock.now += LIFETIME_S - 0.1
    assert tickets.redeem("exec", early) == EXEC
    clock.now += 0.1
    assert tickets.redeem("exec", late) is None


def test_tokens_cannot_be_guessed(tickets: Tickets) -> None:
    tokens = {tickets.issue(EXEC) for _ in range(100)}
    assert len(tokens) == 100
    assert min(map(len, tokens)) >= 22  # 128 bits


def test_their_number_is_bounded(tickets: Tickets, clock: Clock) -> None:
    for _ in range(MAX_TICKETS):
        token = tickets.issue(EXEC)
    with pytest.raises(ResourceExhausted, match=f"{MAX_TICKETS} sessions"):
        tickets.issue(EXEC)
    tickets.redeem("exec", token)
    tickets.issue(EXEC)
    clock.now += LIFETIME_S
    tickets.issue(EXEC)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (ExecRequest(container_id="", command=("ls",), stdout=True), "container_id"),
        (ExecRequest(container_id="c", command=(), stdout=True), "cmd"),
        (ExecRequest(container_id="c", command=("ls",)), "stdin, stdout, stderr"),
        (ExecRequest(container_id="c", command=("ls",), tty=True, stderr=True), "stderr"),
        (AttachRequest(container_id="", stdout=True), "container_id"),
        (AttachRequest(container_id="c"), "stdin, stdout, stderr"),
        (AttachRequest(container_id="c", tty=True, stdout=True, stderr=True), "stderr"),
        (PortForwardRequest(sandbox_id=""), "pod_sandbox_id"),
        (PortForwardRequest(sandbox_id="s", ports=(80, 0)), "port"),
        (PortForwardRequest(sandbox_id="s", ports=(65536,)), "port"),
    ],
)
def test_what_no_session_could_serve_is_refused(
    tickets: Tickets, request_: Request, field: str
) -> None:
    with pytest.raises(InvalidArgument, match=f"^{field}: "):
        tickets.issue(request_)
