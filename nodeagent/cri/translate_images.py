"""Checks of an ImageSpec: what a request may say of an image besides its name."""

from collections.abc import Collection

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri import validate


def check(message: pb.ImageSpec, field: str, handlers: Collection[str]) -> None:
    """Refuse what is no request for an image. handlers: the known ones; all have the same images.

    Annotations are ignored: they choose no image.
    """
    if message.runtime_handler not in handlers:
        known = ", ".join(f'"{name}"' for name in sorted(handlers))
        validate.refuse(
            f"{field}.runtime_handler", f'"{message.runtime_handler}" is none of {known}'
        )
    if message.image_ref:
        validate.refuse(f"{field}.image_ref", "is for answers; the image is named by image")
