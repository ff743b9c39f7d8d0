"""The limit of file descriptors, and those that are reserved for containers, image pulls and calls of the CRI.

Whoever can connect to a TCP listener, or forward ports, can make the agent open descriptors. The kernel gives a new
one the lowest number that is free (open(2)), so a number close to the limit says that all below it are in use. A server
that closes new connections whose number `is_reserved` never takes the last descriptors of the process, whatever else
uses the others, and nothing has to be counted.
"""

import resource

RESERVED = 4096  # enough for the accounting of 200 containers, at about 20 each


def raise_limit() -> None:
    """Raise the soft limit to the hard one: the agent has about 20 files open for each container's accounting."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def is_reserved(descriptor: int) -> bool:
    """Whether a new descriptor is one of the last; a quarter of them where the limit is low."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit != resource.RLIM_INFINITY and descriptor >= limit - min(RESERVED, limit // 4)
