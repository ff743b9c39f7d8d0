"""Translation of errors to gRPC status: one table, for every RPC.

The kubelet reads codes and texts: NotFound is success for a stop, DeadlineExceeded is a probe's timeout, and the reason
of a failed pull is found at the start of the text, but only with code Unknown. SecurityProfileInvalid, of a profile
that can never be used, is found there with any code.
"""

import grpc

from nodeagent import errors
from nodeagent.cri import scarcity

MAX_DETAILS = 2_000  # of a text: it travels in a header, percent-encoded, and peers bound those

# The first class that an error is an instance of decides; `TimeoutError` is an `OSError`, so it comes first.
_CODES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (errors.InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (errors.FailedPrecondition, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.PermissionDenied, grpc.StatusCode.PERMISSION_DENIED),
    (errors.ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.RegistryUnavailable, grpc.StatusCode.UNKNOWN),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.Unsupported, grpc.StatusCode.UNIMPLEMENTED),
    (errors.DataLoss, grpc.StatusCode.DATA_LOSS),
    (TimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED),
)

# The kubelet takes the code off the text of a failed pull only where it is Unknown, which is what containerd gives for
# all of these: "rpc error: code = PermissionDenied desc =" would stand before what the owner of a pod is to read.
_PULLS = frozenset(("PullImage", "PullSecurityProfile"))
_UNKNOWN_OF_PULLS = frozenset(
    (
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    )
)
# The kubelet looks for the names of these at the start of the text.
_NAMED = (errors.RegistryUnavailable, errors.SecurityProfileInvalid)


def code_of(error: Exception, method: str = "") -> grpc.StatusCode:
    """The status code of an error. method: the name of the RPC that failed."""
    code = _code_of(error)
    return grpc.StatusCode.UNKNOWN if method in _PULLS and code in _UNKNOWN_OF_PULLS else code


def _code_of(error: Exception) -> grpc.StatusCode:
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    shortage = scarcity.of(error)
    return shortage.code if shortage else grpc.StatusCode.INTERNAL


def is_expected(error: Exception) -> bool:
    """Whether the agent raises it on purpose; anything else is a defect, or a failure of the machine."""
    return isinstance(error, errors.NodeAgentError | TimeoutError) or scarcity.of(error) is not None


def details_of(error: Exception) -> str:
    text = str(error)
    for kind in _NAMED:
        if isinstance(error, kind) and not text.startswith(kind.__name__):
            text = f"{kind.__name__}: {text}"
    shortage = scarcity.of(error)
    if shortage is not None:
        text = scarcity.text(error, shortage)
    elif not isinstance(error, errors.NodeAgentError | OSError):
        text = f"internal error: {type(error).__name__}: {text}"
    return (text or type(error).__name__)[:MAX_DETAILS]
