"""What the log says of containers."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from nodeagent.lifecycle.containers.creation import Creation
from nodeagent.records import Container
from nodeagent.tasks import Tasks


def test_what_holds_for_every_container_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """A node's privileged pods would fill its log with what the agent lacks."""
    nothing = cast(Any, None)
    parts = (
        "inventory",
        "images",
        "cgroups",
        "groups",
        "planner",
        "cdi",
        "removal",
        "directories",
    )
    creation = Creation(**dict.fromkeys(parts, nothing), tasks=Tasks())
    missing, refused = "capability SYS_RESOURCE: not available", "oom_score_adj -997: not permitted"
    for name in ("first", "second", "third"):
        creation._warn(cast(Container, SimpleNamespace(id=name)), [missing, refused])
    assert caplog.messages == [
        f'container "first": {text}; not repeated for other containers'
        for text in (missing, refused)
    ]
