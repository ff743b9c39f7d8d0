"""Errors as clients see them."""

import errno

import grpc
import pytest

from nodeagent import errors
from nodeagent.cri import status

C = grpc.StatusCode


@pytest.mark.parametrize(
    ("error", "code", "details"),
    [
        (errors.InvalidArgument("a: b"), C.INVALID_ARGUMENT, "a: b"),
        (errors.NotFound("x"), C.NOT_FOUND, "x"),
        (errors.AlreadyExists("x"), C.ALREADY_EXISTS, "x"),
        (errors.FailedPrecondition("x"), C.FAILED_PRECONDITION, "x"),
        (errors.StartError("x"), C.FAILED_PRECONDITION, "x"),
        (errors.PermissionDenied("x"), C.PERMISSION_DENIED, "x"),
        (errors.ResourceExhausted("x"), C.RESOURCE_EXHAUSTED, "x"),
        (errors.Unavailable("x"), C.UNAVAILABLE, "x"),
        (errors.Unsupported("x"), C.UNIMPLEMENTED, "x"),
        (errors.DataLoss("x"), C.DATA_LOSS, "x"),
        (errors.RegistryUnavailable("x"), C.UNKNOWN, "RegistryUnavailable: x"),
        (errors.RegistryUnavailable("RegistryUnavailable: x"), C.UNKNOWN, "RegistryUnavailable: x"),
        (errors.SecurityProfileInvalid("x"), C.INVALID_ARGUMENT, "SecurityProfileInvalid: x"),
        (TimeoutError("x"), C.DEADLINE_EXCEEDED, "x"),
        (TimeoutError(), C.DEADLINE_EXCEEDED, "TimeoutError"),
        (OSError(errno.EIO, "io", "/f"), C.INTERNAL, "[Errno 5] io: '/f'"),
        (FileNotFoundError(2, "no", "/f"), C.INTERNAL, "[Errno 2] no: '/f'"),
        (ValueError("x"), C.INTERNAL, "internal error: ValueError: x"),
        (errors.NodeAgentError("x"), C.INTERNAL, "x"),
    ],
)
def test_codes_and_texts(error: Exception, code: grpc.StatusCode, details: str) -> None:
    assert status.code_of(error) == code
    assert status.details_of(error) == details


@pytest.mark.parametrize(
    ("error", "code", "beginning"),
    [
        (OSError(errno.ENOSPC, "full", "/f"), C.RESOURCE_EXHAUSTED, "/f: full; free space"),
        (OSError(errno.EDQUOT, "quota"), C.RESOURCE_EXHAUSTED, "quota; free space"),
        (OSError(errno.EMFILE, "files", "/f"), C.RESOURCE_EXHAUSTED, "/f: files; a process of"),
        (OSError(errno.ENFILE, "files"), C.RESOURCE_EXHAUSTED, "files; the node has reached"),
        (OSError(errno.ENOMEM, "memory"), C.RESOURCE_EXHAUSTED, "memory; the node, or"),
        (OSError(errno.EAGAIN, "clone3: no"), C.RESOURCE_EXHAUSTED, "clone3: no; a limit of"),
        (OSError(errno.EROFS, "fixed", "/f"), C.FAILED_PRECONDITION, "/f: fixed; the kernel's"),
        (RuntimeError("can't start new thread"), C.RESOURCE_EXHAUSTED, "no thread can be started"),
    ],
)
def test_what_has_run_out_is_named(error: Exception, code: grpc.StatusCode, beginning: str) -> None:
    """Never INTERNAL with a Python text: every process of a node can run into these."""
    assert status.code_of(error) == code
    assert status.details_of(error).startswith(beginning)
    assert status.is_expected(error)


def test_another_error_of_the_runtime_is_a_defect() -> None:
    assert status.code_of(RuntimeError("x")) == C.INTERNAL
    assert not status.is_expected(RuntimeError("x"))


@pytest.mark.parametrize("method", ["PullImage", "PullSecurityProfile"])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.PermissionDenied("x"), C.UNKNOWN),
        (errors.ResourceExhausted("x"), C.UNKNOWN),
        (OSError(errno.ENOSPC, "full"), C.UNKNOWN),
        (errors.DataLoss("x"), C.UNKNOWN),
        (errors.Unavailable("x"), C.UNKNOWN),
        (errors.RegistryUnavailable("x"), C.UNKNOWN),
        (errors.NotFound("x"), C.NOT_FOUND),
        (errors.InvalidArgument("x"), C.INVALID_ARGUMENT),
        (errors.Unsupported("x"), C.UNIMPLEMENTED),
        (TimeoutError("x"), C.DEADLINE_EXCEEDED),
        (OSError(errno.EIO, "io"), C.INTERNAL),
    ],
)
def test_codes_of_failed_pulls(error: Exception, code: grpc.StatusCode, method: str) -> None:
    """The codes are containerd's: the kubelet shows a text without its code where that is Unknown."""
    assert status.code_of(error, method) == code


def test_every_class_has_a_code() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(kinds) > 10
    for kind in kinds:
        if kind is not errors.NodeAgentError:
            assert status.code_of(kind("x")) != C.INTERNAL, kind


def test_texts_are_bounded() -> None:
    assert len(status.details_of(errors.NotFound("x" * 10_000))) == status.MAX_DETAILS


def test_what_is_reported_on_purpose() -> None:
    assert status.is_expected(errors.NotFound("x"))
    assert status.is_expected(TimeoutError())
    assert not status.is_expected(OSError(errno.EIO, "io"))
    assert not status.is_expected(KeyError("x"))
