"""What the node is short of is not told as a fault of what a request or an image has named."""

import errno
import os
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from nodeagent.cri import scarcity
from nodeagent.errors import SHORTAGES, FailedPrecondition, NodeAgentError, Unsupported
from nodeagent.linux import confined, mounts, syscalls
from nodeagent.sandbox import host_path, idmaps
from nodeagent.sandbox.init import console, credentials, hooks, main, relabel, rootfs
from nodeagent.sandbox.spec import Mount
from nodeagent.sandbox.supervisor import sysctls

MOUNT: Mount = {
    "kind": "bind",
    "source": "/dev",
    "target": "/v",
    "attributes": [],
    "propagation": "private",
    "recursive": True,
}  # type: ignore[typeddict-item]


def in_the_working_directory() -> None:
    with main._working_directory("/v"):
        os.chdir("/v")


# Who meets an error of the kernel, and in which of its calls.
SITES: dict[str, tuple[Callable[[], object], object, str]] = {
    "host path": (lambda: host_path.open_host_path(MOUNT), syscalls, "open_tree"),
    "clone of a host path": (
        lambda: rootfs._clone_host_path(MOUNT, idmaps.IdMaps(-1)),
        mounts,
        "clone_tree",
    ),
    "device": (lambda: console._find_device(0, "/dev/null", 0), confined, "open_path"),
    "working directory": (in_the_working_directory, os, "chdir"),
    "hook": (lambda: hooks._trusted("hook", "/bin/sh"), os, "stat"),
    "relabelling": (lambda: relabel.relabel_file(0, "label", "/v"), os, "getxattr"),
    "label": (
        lambda: credentials._write_label("SELinux label", "a", "attr/exec", ""),
        credentials,
        "_write_own",
    ),
    "idmapped mount": (lambda: idmaps.map_tree(0, 0, 0, "layers"), mounts, "map_ids"),
    "sysctl": (lambda: sysctls._write(0, "net.core.somaxconn", "1"), syscalls, "openat2"),
}


@pytest.fixture(params=SITES)
def met(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], Exception]:
    """The error that comes of one of the kernel."""
    act, module, name = SITES[request.param]

    def meet(code: int) -> Exception:
        def fail(*_: Any, **__: Any) -> NoReturn:
            raise OSError(code, os.strerror(code), "/v")

        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            patch.setattr(mounts, "filesystem_of", lambda _: "ext4")
            with pytest.raises((NodeAgentError, OSError)) as caught:
                act()
        return caught.value

    return meet


@pytest.mark.parametrize("code", sorted(SHORTAGES), ids=errno.errorcode.get)
def test_a_shortage_passes(met: Callable[[int], Exception], code: int) -> None:
    error = met(code)
    assert isinstance(error, OSError)
    assert error.errno == code
    assert scarcity.of(error) is not None
    assert os.strerror(code) in str(error)


def test_other_errors_are_of_what_was_named(met: Callable[[int], Exception]) -> None:
    assert isinstance(met(errno.EACCES), FailedPrecondition | Unsupported)
