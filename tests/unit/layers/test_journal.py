"""The journal's file: what was made durable is replayed from the mark that the store names, nothing else ever is."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from silofs.errors import BadFormat, StoreError
from silofs.layers import journal
from silofs.layers.journal import BLOCK, Journal, Replay, remove_others
from silofs.layers.log import WriteLog
from silofs.layers.records import HEADER, WRITE, Mark
from silofs.layers.store import Store

STORE = b"S" * 16
VOLUME = b"V" * 16
RING = 16 * BLOCK


class Ring:
    """A write log and its journal. `sync` copies what is new."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.fd = os.memfd_create("log")
        WriteLog.format(self.fd, STORE, RING)
        self.log = WriteLog.open(self.fd, STORE)
        self.secret = self.log.memory.superblock.secret
        self.mark = self.end = self.log.mark()
        self.journal = Journal.make(directory, self.secret, STORE, RING)

    def append(self, payload: bytes) -> None:
        if not self.log.room(len(payload)):
            self.release()
        self.log.append(WRITE, VOLUME, 1, self.log.next_lsn - 1, 0, len(payload), payload)

    def release(self) -> None:
        """As after a commit of everything."""
        self.mark = self.end = self.log.mark()
        self.log.release(self.mark)

    def sync(self) -> None:
        end = self.log.mark()
        self.journal.write(self.journal.stretch(self.log.ring, self.end, end))
        self.end = end

    @property
    def path(self) -> Path:
        return self.directory / f"{self.journal.id:016x}"

    def replay(self) -> list[bytes]:
        source = Replay(self.directory, self.journal.id, STORE, self.mark)
        return [bytes(source.ring[r.position : r.position + r.length]) for r in source.records()]


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[Ring]:
    made = Ring(tmp_path / "journal")
    yield made
    os.close(made.fd)


def test_what_was_synced_is_replayed_and_what_was_not_is_not(ring: Ring) -> None:
    assert ring.replay() == []
    ring.append(b"one")
    ring.append(b"two" * 3000)
    ring.sync()
    ring.append(b"three")
    assert ring.replay() == [b"one", b"two" * 3000]
    ring.sync()
    assert ring.replay()[2:] == [b"three"]


def test_its_space_is_held_and_a_sync_changes_no_metadata(ring: Ring) -> None:
    before = ring.path.stat()
    assert before.st_size == BLOCK + RING
    assert before.st_blocks * 512 >= BLOCK + RING
    ring.append(b"x" * 5000)
    ring.sync()
    assert ring.path.stat().st_blocks == before.st_blocks


def test_laps_come_and_go_and_only_the_present_records_are_replayed(ring: Ring) -> None:
    for number in range(200):
        ring.append(bytes([number]) * (700 + 61 * number % 2500))
        if number % 3 == 0:
            ring.sync()
        if number % 17 == 0:
            ring.release()
            assert ring.replay() == []
        if number % 17 == 16:
            ring.sync()
            assert [piece[0] for piece in ring.replay()] == list(range(number - 15, number + 1))


def test_a_stretch_over_the_end_of_a_lap_has_both_its_parts(ring: Ring) -> None:
    while ring.log.mark().position < RING - 3000:
        ring.append(b"a" * 1920)
        ring.release()
    lap = ring.log.mark().lap
    for letter in (b"b", b"c", b"d"):
        ring.append(letter * 1900)
    assert ring.log.mark().lap == lap + 1
    ring.sync()
    assert ring.replay() == [b"b" * 1900, b"c" * 1900, b"d" * 1900]


def test_a_gap_ends_the_replay(ring: Ring) -> None:
    for letter in (b"a", b"b", b"c"):
        ring.append(letter * BLOCK)
    start = ring.log.mark()
    ring.append(b"d" * BLOCK)
    ring.end = start  # what came before was never written
    ring.sync()
    assert ring.replay() == []


def test_each_torn_block_ends_the_replay_before_its_record(ring: Ring) -> None:
    pieces = [bytes([number + 1]) * 3000 for number in range(6)]
    for piece in pieces:
        ring.append(piece)
    ring.sync()
    whole = ring.path.read_bytes()
    starts = [number * (HEADER + 3000 + 8) for number in range(6)]
    for sector in range(0, starts[-1] + 3000, 512):
        torn = bytearray(whole)
        torn[BLOCK + sector : BLOCK + sector + 512] = bytes(512)
        ring.path.write_bytes(torn)
        found = ring.replay()
        assert found == pieces[: len(found)]
        assert starts[len(found)] < sector + 512


def test_a_mark_beside_the_records_finds_none(ring: Ring) -> None:
    ring.append(b"x" * 100)
    ring.sync()
    for mark in (Mark(2, 0, 1), Mark(1, 64, 1), Mark(1, 0, 2)):
        ring.mark = mark
        assert ring.replay() == []


def test_another_logs_records_are_none(ring: Ring, tmp_path: Path) -> None:
    """The same bytes at the same places under another secret: what is left of the log before."""
    ring.append(b"old")
    ring.sync()
    newer = Journal.make(ring.directory, ring.secret ^ 1, STORE, RING)
    path = ring.directory / f"{newer.id:016x}"
    content = bytearray(ring.path.read_bytes())
    content[:BLOCK] = path.read_bytes()[:BLOCK]
    path.write_bytes(content)
    ring.journal = newer
    assert ring.replay() == []


def test_a_later_daemon_uses_it_again_only_for_the_same_log(ring: Ring) -> None:
    made = ring.journal.id
    again = Journal.reuse(ring.directory, made, ring.secret, STORE, RING)
    assert again is not None
    assert again.id == made
    again.close()
    assert Journal.reuse(ring.directory, made, ring.secret ^ 1, STORE, RING) is None
    assert Journal.reuse(ring.directory, made, ring.secret, STORE, 2 * RING) is None
    assert Journal.reuse(ring.directory, made ^ 2, ring.secret, STORE, RING) is None
    ring.path.write_bytes(ring.path.read_bytes()[:-1])
    assert Journal.reuse(ring.directory, made, ring.secret, STORE, RING) is None


def test_a_retired_one_is_read_and_never_used_again(ring: Ring) -> None:
    ring.append(b"synced")
    ring.sync()
    ring.journal.retire()
    assert Journal.reuse(ring.directory, ring.journal.id, ring.secret, STORE, RING) is None
    assert ring.replay() == [b"synced"]
    remove_others(ring.directory, ring.journal.id)
    assert ring.replay() == [b"synced"]
    remove_others(ring.directory)
    assert list(ring.directory.iterdir()) == []


@pytest.mark.parametrize("damage", ["superblock", "version", "short", "foreign"])
def test_one_that_cannot_be_read_is_an_error_and_no_end(ring: Ring, damage: str) -> None:
    content = bytearray(ring.path.read_bytes())
    if damage == "superblock":
        content[17] ^= 1
    elif damage == "version":
        content[8] = 9
    elif damage == "short":
        del content[-1]
    else:
        content[:BLOCK] = bytes(BLOCK)
    ring.path.write_bytes(content)
    with pytest.raises(BadFormat) as caught:
        ring.replay()
    assert str(ring.path) in caught.value.hint


def test_a_sector_that_cannot_be_read_is_an_error(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(StoreError, match="cannot be read"):
        ring.replay()


def test_an_interrupted_making_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "journal"
    for call in ("_fill", "_write"):
        with monkeypatch.context() as patch:

            def full(*_: object) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(journal, call, full)
            with pytest.raises(OSError, match="No space"):
                Journal.make(directory, 1, STORE, RING)
        assert list(directory.iterdir()) == []
    (directory / "new").write_bytes(b"half")
    Journal.make(directory, 1, STORE, RING).close()
    assert len(list(directory.iterdir())) == 1


def test_a_store_whose_journal_was_removed_opens_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "store"
    Store.create(path)
    with Store.open(path) as store:
        store.write(lambda txn: txn.count(journal=77, mark=Mark(1, 0, 1)))
    Store.open(path).close()
    assert "is gone" in caplog.text
    with Store.open(path) as store, store.reader() as txn:
        assert txn.state.journal == 0
