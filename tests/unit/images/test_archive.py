"""Documents in archives of images that are none."""

from pathlib import Path

import pytest

from nodeagent.errors import InvalidArgument, NotFound
from nodeagent.images import manifest
from nodeagent.images.archive import Archive, File, spool
from tests.support import tars


@pytest.mark.parametrize("text", [b"", b'[{"Config":"\xff"}]', b"[" * 200_000])
def test_a_malformed_list_of_images_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "0"
    path.write_bytes(text)
    archive = Archive({"manifest.json": File(path, "", len(text))}, {})
    with pytest.raises(InvalidArgument, match=r"manifest\.json"):
        archive.images()


@pytest.mark.parametrize("member", [tars.file("a" * 5_000), tars.symlink("a", "b" * 5_000)])
def test_names_of_any_length_are_not_remembered(tmp_path: Path, member: tars.Member) -> None:
    path = tmp_path / "archive.tar"
    path.write_bytes(tars.archive(member))
    with pytest.raises(InvalidArgument, match="too long"):
        spool(path, tmp_path / "spool", 1 << 20)


def test_what_is_no_archive_of_images_is_told_what_it_lacks() -> None:
    with pytest.raises(
        InvalidArgument, match=r"neither index\.json .* nor manifest\.json .*docker save"
    ):
        Archive({}, {}).images()


def test_an_archive_for_other_platforms_names_the_one_of_this_node(tmp_path: Path) -> None:
    path = tmp_path / "0"
    path.write_bytes(b"[]")
    with pytest.raises(NotFound, match=f"no image for {manifest.PLATFORM}, which this node runs"):
        Archive({"manifest.json": File(path, "", 2)}, {}).images()
