"""What can be told of the root of a hierarchy."""

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from nodeagent.cgroups.covering import Watched
from nodeagent.cgroups.hierarchy import Hierarchy


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(Hierarchy(str(tmp_path / "root"), frozenset(), ""))


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENOTDIR, errno.ELOOP])
def test_where_nothing_is_there_it_is_covered(
    watched: Watched, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", _failing(code))
    assert watched.is_covered()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_lack_of_the_agent_s_own_is_no_cover(
    watched: Watched, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", _failing(code))
    with pytest.raises(OSError, match=re.escape(os.strerror(code))):
        watched.is_covered()


def _failing(code: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail
