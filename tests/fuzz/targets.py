"""The table of fuzz targets: everything that reads what others wrote, by name."""

from tests.fuzz import cri, images, node, output, sandbox, streaming

TARGETS = {
    target.name: target
    for module in (images, sandbox, output, node, cri, streaming)
    for target in module.TARGETS
}
