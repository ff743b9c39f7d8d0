"""The documents that are made from the code, by their paths in the project."""

from collections.abc import Callable, Mapping

from deploy.documents import manual, metrics, settings

PAGES: Mapping[str, Callable[[], str]] = {
    "docs/config.md": settings.page,
    "docs/metrics.md": metrics.page,
    "docs/man/nodeagent.8": manual.manual,
    "docs/man/nodeagent.toml.5": settings.manual,
}
