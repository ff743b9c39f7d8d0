"""Documents in archives of images that are none."""

from pathlib import Path

import pytest

from nodeagent.errors import InvalidArgument
from nodeagent.images.archive import Archive, File


@pytest.mark.parametrize("text", [b"", b'[{"Config":"\xff"}]', b"[" * 200_000])
def test_a_malformed_list_of_images_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "0"
    path.write_bytes(text)
    archive = Archive({"manifest.json": File(path, "", len(text))}, {})
    with pytest.raises(InvalidArgument, match=r"manifest\.json"):
        archive.images()
