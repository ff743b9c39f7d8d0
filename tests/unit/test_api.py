"""The generated code is the wire contract that clients were built against."""

import pytest
from google.protobuf import text_format
from google.protobuf.descriptor import FileDescriptor

from nodeagent.api import runtime_pb2 as pb

FILE: FileDescriptor = pb.DESCRIPTOR


def test_has_every_rpc() -> None:
    counts = {name: len(service.methods) for name, service in FILE.services_by_name.items()}
    assert counts == {"RuntimeService": 37, "ImageService": 9}


def test_lists_that_can_be_long_are_streamed_too() -> None:
    methods = [m for service in FILE.services_by_name.values() for m in service.methods]
    streamed = {method.name for method in methods if method.server_streaming}
    assert streamed == {
        "GetContainerEvents",
        "StreamContainers",
        "StreamContainerStats",
        "StreamImages",
        "StreamPodSandboxes",
        "StreamPodSandboxMetrics",
        "StreamPodSandboxStats",
    }


def test_the_paths_on_the_wire_name_version_v1() -> None:
    assert FILE.services_by_name["RuntimeService"].full_name == "runtime.v1.RuntimeService"
    assert FILE.services_by_name["ImageService"].full_name == "runtime.v1.ImageService"


@pytest.mark.parametrize("field", ["password", "auth", "identity_token", "registry_token"])
def test_secrets_are_marked_as_such(field: str) -> None:
    assert pb.AuthConfig.DESCRIPTOR.fields_by_name[field].GetOptions().debug_redact


def test_values_of_environment_variables_are_bytes() -> None:
    variable = pb.KeyValue(key="NAME", value=b"\xff\x00")
    assert pb.KeyValue.FromString(variable.SerializeToString()).value == b"\xff\x00"


def test_a_pod_survives_the_wire_with_its_annotations() -> None:
    config = pb.PodSandboxConfig(
        metadata=pb.PodSandboxMetadata(name="web", namespace="default", uid="u", attempt=2),
        annotations={"note": "line one\nline two\t"},
        port_mappings=[pb.PortMapping(protocol=pb.UDP, container_port=53, host_port=5353)],
    )
    again = pb.PodSandboxConfig.FromString(config.SerializeToString())
    assert text_format.MessageToString(again) == text_format.MessageToString(config)
    assert again.annotations["note"] == "line one\nline two\t"
