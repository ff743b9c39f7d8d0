"""The errors that callers of the agent tell apart.

::

    NodeAgentError
    ├── InvalidArgument        a field of the request is malformed
    │   └── SecurityProfileInvalid
    ├── NotFound               the named object does not exist
    ├── AlreadyExists          another object holds the name
    ├── FailedPrecondition     the object is in a state that forbids the request
    │   ├── StartError         the program of a container could not be executed
    │   └── IncompatibleVersion   what another release runs, or has written, is not understood
    ├── PermissionDenied       policy or credentials forbid the request
    ├── ResourceExhausted      a bound of ours, or a disk, is full
    ├── Unavailable            a peer cannot be reached now; try again
    │   └── RegistryUnavailable
    ├── Unsupported            this kernel or this build cannot do it
    └── DataLoss               content does not match its digest

A text says what was asked, on which object and why it failed: ``container "abc": not running``.
`TimeoutError` and `OSError` keep their own types; ``cri.status`` gives every class its gRPC code.
"""

import errno

# The numbers of an `OSError` that say that a process, or the node, is short of something. What a request has named is
# not at fault then: the error is raised as it is, and not as one of the classes below.
SHORTAGES = frozenset(
    (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT)
)


class NodeAgentError(Exception):
    """Base of everything that the agent reports to its caller on purpose."""


class InvalidArgument(NodeAgentError):
    """A field of the request is malformed; the text names the field."""


class SecurityProfileInvalid(InvalidArgument):
    """A security profile can never be used; the kubelet looks for this name at the start of the text, and gives up."""


class NotFound(NodeAgentError):
    """The named object does not exist."""


class AlreadyExists(NodeAgentError):
    """Another object holds the name."""


class FailedPrecondition(NodeAgentError):
    """The object is in a state that forbids the request."""


class StartError(FailedPrecondition):
    """The program of a container could not be executed; the text names it and tells why."""


class IncompatibleVersion(FailedPrecondition):
    """A process of another release, or a file of one, is not understood; the text has both versions and the remedy."""


class PermissionDenied(NodeAgentError):
    """Policy or credentials forbid the request."""


class ResourceExhausted(NodeAgentError):
    """A bound of the agent, or a disk, is full."""


class Unavailable(NodeAgentError):
    """A peer cannot be reached now; the same request may succeed later."""


class RegistryUnavailable(Unavailable):
    """A registry cannot be reached; the kubelet looks for this name at the start of the text."""


class Unsupported(NodeAgentError):
    """This kernel, or this build, cannot do what was asked."""


class DataLoss(NodeAgentError):
    """Content does not match its digest."""
