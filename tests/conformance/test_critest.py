"""critest, the public validation suite of the CRI: a test for each spec; the first one runs those that are selected."""

from pathlib import Path

import pytest

from tests.conformance import critest as suite_of_specs
from tests.conformance import suite
from tests.conformance.critest import FAILED, SKIPPED, Critest, Spec
from tests.conftest import TOOLS
from tests.support.registry import Registry

PROGRAM = TOOLS / "critest"
SECONDS = 600.0
ABSENT = "all specs"  # stands for them where critest is not built


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = suite_of_specs.names(PROGRAM) if PROGRAM.exists() else [ABSENT]
    metafunc.parametrize("name", names, ids=[name.removeprefix("[k8s.io] ") for name in names])


@pytest.fixture(scope="module")
def results(
    critest: Path,
    registry: Registry,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> dict[str, Spec]:
    """How the specs ended, by their names."""
    folder = tmp_path_factory.mktemp("critest")
    selected = [
        str(item.callspec.params["name"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path
    ]
    wanted, skipped = suite.split(selected, suite.absences())
    with suite.agent_with_mirrors(folder / "agent", registry) as agent:
        ended = Critest(critest, folder).run(agent.endpoint, wanted, SECONDS)
    return {spec.name: spec for spec in [*ended, *skipped]}


@pytest.mark.timeout(SECONDS + 60)
def test_critest(name: str, results: dict[str, Spec]) -> None:
    spec = results[name]
    if spec.state == SKIPPED:
        pytest.skip(spec.reason)
    if spec.state == FAILED:
        pytest.fail(f"{spec.reason}\n{spec.timeline}", pytrace=False)
