"""The journal: an entry is there as a whole or not at all, and the files take turns without losing the order."""

import os
import stat
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nodeagent import journal
from nodeagent.errors import IncompatibleVersion, ResourceExhausted
from nodeagent.journal import NAMES, Journal
from tests.support.scratch import scratch

ENTRIES = [b"one", b"two" * 1000, b"three"]


class Machine(RuleBasedStateMachine):
    """An agent that writes, turns and empties its journal, and others that come after it was killed."""

    complete: list[bytes]
    current: list[bytes]

    @initialize()
    def make(self) -> None:
        self.place = scratch("journal")
        self.folder = self.place.__enter__()
        self.journal = Journal.open(self.folder)
        self.complete, self.current = [], []

    @rule(entry=st.binary(min_size=1, max_size=100))
    def append(self, entry: bytes) -> None:
        self.journal.append(entry)
        self.current.append(entry)

    @precondition(lambda self: not self.complete)
    @rule()
    def turn(self) -> None:
        self.journal.empty()
        self.journal.turn()
        self.complete, self.current = self.current, []

    @rule()
    def empty(self) -> None:
        self.journal.empty()
        self.complete = []

    @rule()
    def kill(self) -> None:
        self.journal.close()
        self.journal = Journal.open(self.folder)
        earlier, latest = self.journal.earlier
        assert earlier + latest == self.complete + self.current
        self.complete, self.current = earlier, latest

    @invariant()
    def is_read_by_others(self) -> None:
        assert journal.read(self.folder) == self.complete + self.current

    def teardown(self) -> None:
        self.journal.close()
        self.place.__exit__(None, None, None)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=30, stateful_step_count=30)


def filled(folder: Path) -> Path:
    """Three entries, in a file that has had others before; the file."""
    with closing(Journal.open(folder)) as files:
        for _ in range(2):
            for _ in range(5):
                files.append(b"before" * 100)
            files.turn()
            files.empty()
        for entry in ENTRIES:
            files.append(entry)
    assert journal.read(folder) == ENTRIES
    newest = max(folder.iterdir(), key=lambda path: path.read_bytes()[18:26])
    return next(path for path in folder.iterdir() if path != newest)


@settings(max_examples=50)
@given(length=st.floats(0, 1))
def test_whatever_is_cut_off_the_entries_before_it_are_there(length: float) -> None:
    with scratch("journal") as folder:
        file = filled(folder)
        used = 26 + sum(16 + len(entry) for entry in ENTRIES)
        os.truncate(file, int(length * used))
        left = journal.read(folder)
        assert left == ENTRIES[: len(left)]
        assert len(left) < 3 or length == 1
        with closing(Journal.open(folder)) as files:
            files.append(b"next")
        assert journal.read(folder) == [*left, b"next"]


def test_an_entry_that_is_not_whole_ends_what_is_read(tmp_path: Path) -> None:
    file = filled(tmp_path)
    with file.open("r+b") as opened:
        opened.seek(26 + 16 + 3 + 16 + 100)  # in the second entry
        opened.write(b"\0")
    assert journal.read(tmp_path) == ENTRIES[:1]


def test_what_is_not_a_journal_is_begun_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in NAMES:
        (tmp_path / name).write_bytes(b"x" * 100)
    with closing(Journal.open(tmp_path)) as files:
        files.append(b"one")
    assert "journal.0: is not a journal; what it had is lost" in caplog.text
    assert journal.read(tmp_path) == [b"one"]


def test_the_journal_of_a_later_release_is_refused(tmp_path: Path) -> None:
    file = filled(tmp_path)
    with file.open("r+b") as opened:
        opened.seek(17)
        opened.write(b"\2")
    with pytest.raises(
        IncompatibleVersion, match=r"version 2 is newer than 1.*install the release"
    ):
        Journal.open(tmp_path)
    with pytest.raises(IncompatibleVersion):
        journal.read(tmp_path)


def test_the_files_are_the_owner_s_alone_and_have_their_room(tmp_path: Path) -> None:
    with closing(Journal.open(tmp_path)) as files:
        for path in tmp_path.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert path.stat().st_blocks * 512 >= 512 << 10
        files.remove()
    assert list(tmp_path.iterdir()) == []
    assert journal.read(tmp_path) == []


def test_the_room_of_many_entries_is_given_back(tmp_path: Path) -> None:
    """Else the state directory, which others write as well, would stay full after a disk has stood still."""
    with closing(Journal.open(tmp_path)) as files:
        for _ in range(3):
            files.append(b"x" * (512 << 10))
        files.turn()
        files.empty()
        files.append(b"one")
        assert [path.stat().st_blocks * 512 for path in tmp_path.iterdir()] == [512 << 10] * 2
        assert journal.read(tmp_path) == [b"one"]


def test_what_is_of_an_earlier_boot_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power loss may bring back a file on a disk that had been emptied, and its entries were undone since."""
    with closing(Journal.open(tmp_path)) as files:
        files.append(b"one")
        files.turn()
        files.append(b"two")
    monkeypatch.setattr(journal, "_boot", lambda: b"another")
    assert journal.read(tmp_path) == []
    with closing(Journal.open(tmp_path)) as files:
        assert files.earlier == ([], [])
        files.append(b"three")
    assert journal.read(tmp_path) == [b"three"]


def test_a_link_in_the_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "else").touch()
    (tmp_path / NAMES[1]).symlink_to("else")
    with pytest.raises(OSError, match="symbolic links"):
        Journal.open(tmp_path)


def test_a_full_directory_is_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that found room for a part of the entry has written nothing."""
    with closing(Journal.open(tmp_path)) as files:
        files.append(b"one")
        with monkeypatch.context() as patch:
            write = os.pwrite
            patch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[: len(data) // 2], at))
            with pytest.raises(
                ResourceExhausted, match=rf"journal\..: no space is left in {tmp_path}"
            ):
                files.append(b"two" * 100)
        assert journal.read(tmp_path) == [b"one"]
        files.append(b"three")
    assert journal.read(tmp_path) == [b"one", b"three"]
