"""The files of a modelled disk, by their paths: to compare them with real ones, and to make them."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.chaos.power.disk import ROOT, Disk, Nodes

Tree = dict[str, bytes | str | None]


def tree(nodes: Nodes, inode: int = ROOT, prefix: str = "") -> Tree:
    """All paths below a directory: content of files, targets of links, None for directories."""
    found: Tree = {}
    for name, child in nodes[inode].entries.items():
        node, path = nodes[child], f"{prefix}{name}"
        if node.kind == "directory":
            found[path] = None
            found.update(tree(nodes, child, f"{path}/"))
        else:
            found[path] = node.target if node.kind == "link" else bytes(node.data)
    return found


def tree_of(path: Path) -> Tree:
    """The same of a real directory."""
    return tree(Disk(path).now)


def write_out(nodes: Nodes, target: Path) -> None:
    """Make the files of a disk below an empty directory."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(mode=0o700)
    for path, content in tree(nodes).items():
        if content is None:
            (target / path).mkdir()
        elif isinstance(content, str):
            (target / path).symlink_to(content)
        else:
            (target / path).write_bytes(content)
