"""One shortage, from its beginning to the removal of everything."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nodeagent.linux import mountinfo, syscalls
from tests.chaos.scarce.node import Outcome, node
from tests.chaos.scarce.shortages import Shortage
from tests.support.node import RunningAgent
from tests.support.registry import Registry


@dataclass(slots=True)
class Report:
    shortage: Shortage
    outcomes: list[Outcome] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def run(shortage: Shortage, root: Path, registry: Registry, code: Path | None = None) -> Report:
    """Let something be scarce for a node of its own below `root`. code: of its agent, as in `RunningAgent`."""
    report = Report(shortage)
    agent = RunningAgent(root, config=shortage.config)
    agent.code = code
    with shortage.place(agent):
        with node(agent, registry) as made:
            lines = made.lines()
            with contextmanager(shortage.last)(made):
                made.leave()
                report.outcomes = made.outcomes()
                report.complaints += made.complaints(lines)
            names = tuple(shortage.names)
            report.complaints += filter(None, (each.complaint(names) for each in report.outcomes))
            if not shortage.ends_all:
                report.complaints += made.works_again()
        report.complaints += [f"left mounted: {point}" for point in unmounted(root / "run/pods")]
    return report


def unmounted(directory: Path) -> list[str]:
    """What an agent that has ended has left mounted below it; it is unmounted."""
    points = [mount.point for mount in mountinfo.parse(mountinfo.table())]
    left = [point for point in points if Path(point).is_relative_to(directory)]
    for point in reversed(left):
        syscalls.umount2(point, syscalls.MNT_DETACH)
    return left
