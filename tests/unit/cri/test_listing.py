"""Lists from memory: the bytes are the messages, the filters hold together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri import listing, messages
from nodeagent.cri.listing import Listing
from nodeagent.records import Container, Sandbox
from tests.unit.cri import records


def item(record: Container) -> bytes:
    return messages.container_item(record).SerializeToString()


def everything(found: list[Container]) -> list[Container]:
    return found


def parsed(reply: bytes) -> pb.ListContainersResponse:
    return pb.ListContainersResponse.FromString(reply)


@given(st.lists(st.text(max_size=300), max_size=5))
def test_the_reply_is_the_serialised_message(labels: list[str]) -> None:
    found = [
        records.container(f"{number:064x}", config={"labels": {"a": label}})
        for number, label in enumerate(labels)
    ]
    built = pb.ListContainersResponse(containers=map(messages.container_item, found))
    assert parsed(Listing(lambda: found, item).reply(everything)) == built


def test_an_item_is_encoded_once_for_each_record() -> None:
    encoded: list[Container] = []

    def encode(record: Container) -> bytes:
        encoded.append(record)
        return item(record)

    first, second = records.container("1"), records.container("2")
    found = [first, second]
    lists = Listing(lambda: found, encode)
    for _ in range(3):
        lists.reply(everything)
    assert encoded == [first, second]
    found[1] = records.container("2", started_at=99)
    reply = parsed(lists.reply(everything))
    assert encoded == [first, second, found[1]]
    assert reply.containers[1].state == pb.CONTAINER_RUNNING


def test_what_is_gone_is_forgotten() -> None:
    found = [records.container(str(number)) for number in range(1000)]
    lists = Listing(lambda: found, item)
    lists.reply(everything)
    del found[1:]
    lists.reply(everything)
    assert set(lists._known) == {"0"}


def test_a_stream_has_each_item_once_in_bounded_messages() -> None:
    labels = {"a": "x" * 300_000}
    found = [records.container(f"{number:064x}", config={"labels": labels}) for number in range(8)]
    parts = list(Listing(lambda: found, item).stream(everything))
    assert len(parts) == 3
    assert all(len(part) <= listing.STREAM_MESSAGE_BYTES for part in parts)
    ids = [c.id for part in parts for c in pb.StreamContainersResponse.FromString(part).containers]
    assert ids == [record.id for record in found]


def test_a_stream_of_nothing_has_no_message() -> None:
    empty: list[Container] = []
    assert list(Listing(lambda: empty, item).stream(everything)) == []


@pytest.mark.parametrize(
    "message",
    [
        pb.ListContainersResponse,
        pb.StreamContainersResponse,
        pb.ListPodSandboxResponse,
        pb.StreamPodSandboxesResponse,
        pb.ListImagesResponse,
        pb.StreamImagesResponse,
    ],
)
def test_items_are_field_1_of_every_list(message: type[pb.ListContainersResponse]) -> None:
    assert [(field.number, field.is_repeated) for field in message.DESCRIPTOR.fields] == [(1, True)]


CONTAINERS = [
    records.container("aa1", sandbox_id="pod1", config={"labels": {"app": "x", "tier": "1"}}),
    records.container("aa2", sandbox_id="pod2", started_at=5, config={"labels": {"app": "x"}}),
    records.container("ab", sandbox_id="pod2", started_at=5, finished_at=6),
    records.container("a", sandbox_id="other"),
]


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        (pb.ContainerFilter(), ["aa1", "aa2", "ab", "a"]),
        (pb.ContainerFilter(id="aa1"), ["aa1"]),
        (pb.ContainerFilter(id="ab"), ["ab"]),
        (pb.ContainerFilter(id="a"), ["a"]),
        (pb.ContainerFilter(id="aa"), []),
        (pb.ContainerFilter(id="b"), []),
        (pb.ContainerFilter(pod_sandbox_id="pod2"), ["aa2", "ab"]),
        (pb.ContainerFilter(pod_sandbox_id="ot"), ["a"]),
        (pb.ContainerFilter(pod_sandbox_id="pod"), []),
        (
            pb.ContainerFilter(state=pb.ContainerStateValue(state=pb.CONTAINER_CREATED)),
            ["aa1", "a"],
        ),
        (pb.ContainerFilter(state=pb.ContainerStateValue(state=pb.CONTAINER_RUNNING)), ["aa2"]),
        (pb.ContainerFilter(state=pb.ContainerStateValue(state=pb.CONTAINER_EXITED)), ["ab"]),
        (pb.ContainerFilter(state=pb.ContainerStateValue(state=pb.CONTAINER_UNKNOWN)), []),
        (pb.ContainerFilter(label_selector={"app": "x"}), ["aa1", "aa2"]),
        (pb.ContainerFilter(label_selector={"app": "x", "tier": "1"}), ["aa1"]),
        (pb.ContainerFilter(label_selector={"app": ""}), []),
        (pb.ContainerFilter(label_selector={"app": "x"}, pod_sandbox_id="pod2"), ["aa2"]),
        (pb.ContainerFilter(id="aa1", pod_sandbox_id="pod2"), []),
    ],
)
def test_filters_of_containers(given: pb.ContainerFilter, ids: list[str]) -> None:
    assert [record.id for record in listing.containers(CONTAINERS, given)] == ids


SANDBOXES: list[Sandbox] = [
    records.sandbox("p1", config={"labels": {"app": "x"}}),
    records.sandbox("p2", stopped_at=30, config={"labels": {"app": "x"}}),
    records.sandbox("q"),
]


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        (pb.PodSandboxFilter(), ["p1", "p2", "q"]),
        (pb.PodSandboxFilter(id="p1"), ["p1"]),
        (pb.PodSandboxFilter(id="p"), []),
        (pb.PodSandboxFilter(state=pb.PodSandboxStateValue(state=pb.SANDBOX_READY)), ["p1", "q"]),
        (pb.PodSandboxFilter(state=pb.PodSandboxStateValue(state=pb.SANDBOX_NOTREADY)), ["p2"]),
        (pb.PodSandboxFilter(label_selector={"app": "x"}), ["p1", "p2"]),
        (
            pb.PodSandboxFilter(
                label_selector={"app": "x"},
                state=pb.PodSandboxStateValue(state=pb.SANDBOX_NOTREADY),
            ),
            ["p2"],
        ),
    ],
)
def test_filters_of_sandboxes(given: pb.PodSandboxFilter, ids: list[str]) -> None:
    assert [record.id for record in listing.sandboxes(SANDBOXES, given)] == ids
