"""What all tests share: a temporary directory of a known name, registries, real clients, the check for leaks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import images, leaks
from tests.support.registry import Registry, fill, running_registry

PROJECT = Path(__file__).parent.parent
TOOLS = PROJECT / ".tools/bin"
IN_CI = bool(os.environ.get("CI"))
WITHOUT_ROOT = PROJECT / "tests/unit"
CLONING = (
    PROJECT / "tests/kernel/sandbox",
    PROJECT / "tests/kernel/linux",
    PROJECT / "tests/security",
)

# Nothing is timed: the machine may be busy.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

_FAILED = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    """Names the run, for the check of what it leaves behind."""
    run = f"na-test-{os.getpid()}"
    os.environ[leaks.VARIABLE] = run
    if config.option.basetemp is None:
        config.option.basetemp = f"/tmp/{run}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First those that clone this process: later it has threads of gRPC, whose locks no child can take."""
    items.sort(key=lambda item: item.path.parent not in CLONING)
    if os.geteuid() == 0:
        return
    for item in items:
        if not item.path.is_relative_to(WITHOUT_ROOT):
            item.add_marker(pytest.mark.skip(reason="needs root"))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_FAILED] = exitstatus != 0


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the files of a run that was all right; those of a failed one are kept to look at."""
    session_failed = config.stash.get(_FAILED, True)
    if not session_failed:
        shutil.rmtree(config.option.basetemp, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def machine_as_before(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails the run, as an error of its last test, when it leaves anything on the machine."""
    machine = leaks.Machine(os.environ[leaks.VARIABLE], tmp_path_factory.getbasetemp())
    yield
    left = machine.left()
    if left:
        pytest.fail("left on the machine:\n" + "\n".join(left), pytrace=False)


@pytest.fixture(scope="session", name="registry")
def registry_of_images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that has every image of `tests.support.images.catalog`."""
    with running_registry(tmp_path_factory.mktemp("registry")) as registry:
        fill(registry, images.catalog())
        yield registry


@pytest.fixture(scope="session")
def private_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that asks for `USERNAME` and `PASSWORD` of `tests.support.registry`; it has one image."""
    with running_registry(tmp_path_factory.mktemp("private"), authenticated=True) as registry:
        registry.push(images.busybox())
        yield registry


@pytest.fixture(scope="session")
def crictl() -> Path:
    return _tool("crictl")


@pytest.fixture(scope="session")
def critest() -> Path:
    return _tool("critest")


def _tool(name: str) -> Path:
    """A real client that `make tools` built. In CI it must be there."""
    path = TOOLS / name
    if not path.exists():
        message = f"{name} is not there: `make tools` builds it with Go 1.26 or newer"
        pytest.fail(message) if IN_CI else pytest.skip(message)
    return path
