"""A clone without its history, as a shallow one is."""

from pathlib import Path

import pytest

from tests.upgrade import releases
from tests.upgrade.releases import Earlier


@pytest.mark.parametrize("in_ci", [True, False])
def test_a_commit_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_ci: bool
) -> None:
    monkeypatch.setattr(releases, "IN_CI", in_ci)
    outcome = pytest.fail.Exception if in_ci else pytest.skip.Exception
    with pytest.raises(outcome, match=f"commit {'0' * 40} is not in this clone"):
        Earlier("absent", "0" * 40, default_places=False, back=False).unpack(tmp_path / "code")
