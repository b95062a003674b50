"""The write log: what is acknowledged is replayed, in order, and nothing else ever is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from struct import Struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silofs import failpoints
from silofs.errors import BadFormat, TooManyOpen
from silofs.layers import memfd as layout
from silofs.layers.locks import WRITE as FOR_WRITING
from silofs.layers.log import WriteLog
from silofs.layers.memfd import SLOT, Memfd
from silofs.layers.records import HEADER, WRITE, ZERO, Record, header_at

STORE = b"S" * 16
VOLUME = b"V" * 16
RING = 16 * 1024


@contextmanager
def memfd(ring: int = RING, slots: int = 8) -> Iterator[int]:
    fd = os.memfd_create("log")
    try:
        WriteLog.format(fd, STORE, ring, slots)
        yield fd
    finally:
        os.close(fd)


def append(log: WriteLog, payload: bytes, offset: int = 0) -> tuple[int, int]:
    assert log.room(len(payload))
    return log.append(WRITE, VOLUME, 1, log.next_lsn - 1, offset, len(payload), payload)


def contents(log: WriteLog) -> list[tuple[int, bytes]]:
    return [(r.lsn, bytes(log.ring[r.position : r.position + r.length])) for r in log.replay() if r.kind == WRITE]


def test_replay_gives_what_was_appended() -> None:
    with memfd() as fd:
        log = WriteLog.open(fd, STORE)
        append(log, b"one", 7)
        log.append(ZERO, VOLUME, 3, 1, 1 << 40, 1 << 45)
        again = WriteLog.open(fd, STORE)
        first, second = again.replay()
        assert first == Record(WRITE, 1, 0, VOLUME, 1, 7, 3, HEADER)
        assert bytes(again.ring[first.position : first.position + 3]) == b"one"
        assert second[:7] == (ZERO, 2, 1, VOLUME, 3, 1 << 40, 1 << 45)
        assert again.next_lsn == 3
        assert again.mark() == log.mark()


def test_records_of_daemons_that_knew_no_synced_are_the_same_records() -> None:
    """Eight of what were forty unused bytes: zero from them, and of no interest to them."""
    early = Struct("<IHHQQQ16sQQQQ40x")
    with memfd() as fd:
        log = WriteLog.open(fd, STORE)
        append(log, b"one")
        assert bytes(log.ring[:120]) == early.pack(*early.unpack(log.ring[:120]))
        log.synced = 2
        position = append(log, b"two")[1] - HEADER
        found = header_at(log.ring, log.memory.superblock.secret, position)
        assert found is not None and found.synced == 2
        assert early.unpack(log.ring[position : position + 120])[4:6] == (2, 1)
        assert contents(WriteLog.open(fd, STORE)) == [(1, b"one"), (2, b"two")]


def test_an_unknown_version_is_refused_and_not_touched() -> None:
    with memfd() as fd:
        append(WriteLog.open(fd, STORE), b"data")
        os.pwrite(fd, (9).to_bytes(4, "little"), 8)
        before = os.pread(fd, 1 << 20, 0)
        with pytest.raises(BadFormat, match="version 9"):
            WriteLog.open(fd, STORE)
        assert os.pread(fd, 1 << 20, 0) == before


def test_what_is_no_log_of_this_store_is_refused() -> None:
    with memfd() as fd:
        with pytest.raises(BadFormat, match="another store"):
            WriteLog.open(fd, b"T" * 16)
        os.pwrite(fd, b"\xff", 16)
        with pytest.raises(BadFormat, match="damaged"):
            WriteLog.open(fd, STORE)
        os.ftruncate(fd, 10)
        with pytest.raises(BadFormat, match="no write log"):
            WriteLog.open(fd, STORE)


def test_a_log_cut_short_is_refused() -> None:
    with memfd() as fd:
        os.ftruncate(fd, os.fstat(fd).st_size - 64)
        with pytest.raises(BadFormat, match="cut short"):
            WriteLog.open(fd, STORE)


def test_the_tail_survives_a_torn_slot() -> None:
    with memfd() as fd:
        log = WriteLog.open(fd, STORE)
        append(log, b"a")
        log.release(log.mark())
        append(log, b"b")
        mark = log.mark()
        append(log, b"c")
        log.release(mark)
        assert contents(WriteLog.open(fd, STORE)) == [(3, b"c")]
        # The newest slot (sequence 3, odd) is torn: the one before names an earlier tail.
        os.pwrite(fd, b"\x00" * 5, 4096 + 64)
        assert contents(WriteLog.open(fd, STORE)) == [(2, b"b"), (3, b"c")]
        os.pwrite(fd, b"\x00" * 5, 4096)
        with pytest.raises(BadFormat, match="tail"):
            WriteLog.open(fd, STORE)


def test_lsns_can_start_above_what_the_store_has_applied() -> None:
    with memfd() as fd:
        log = WriteLog.open(fd, STORE)
        log.raise_lsn(1000)
        assert append(log, b"x")[0] == 1000
        assert contents(WriteLog.open(fd, STORE)) == [(1000, b"x")]
        log.raise_lsn(5)
        assert log.next_lsn == 1001
        with pytest.raises(ValueError, match="not empty"):
            log.raise_lsn(2000)


def test_a_full_ring_has_no_room_until_it_is_released() -> None:
    with memfd() as fd:
        log = WriteLog.open(fd, STORE)
        payload = b"p" * 1920  # 2048 with its header: eight fill the ring exactly
        for _ in range(8):
            append(log, payload)
        assert not log.room(0)
        assert log.used == log.size
        assert len(contents(WriteLog.open(fd, STORE))) == 8
        log.release(log.mark())
        assert log.room(1920)
        assert not log.room(RING)
        assert contents(WriteLog.open(fd, STORE)) == []


def test_an_earlier_lap_is_never_replayed() -> None:
    with memfd() as fd:
        log = WriteLog.open(fd, STORE)
        for _ in range(5):
            for _ in range(8):
                append(log, b"q" * 1920)
            log.release(log.mark())
        # Head and tail stand at the end, the whole ring holds well-formed records of this lap, and no other is begun.
        assert contents(WriteLog.open(fd, STORE)) == []
        append(log, b"new")
        assert contents(WriteLog.open(fd, STORE)) == [(41, b"new")]


def test_a_guest_cannot_forge_a_record() -> None:
    """Bytes of a genuine record of one log, placed where the next header of another with the same history belongs."""
    with memfd() as real, memfd() as forged:
        a, b = WriteLog.open(real, STORE), WriteLog.open(forged, STORE)
        append(b, b"evil")
        a.ring[: HEADER + 64] = b.ring[: HEADER + 64]
        assert contents(WriteLog.open(real, STORE)) == []


class Recorder:
    """A ring that notes every store instead of doing it."""

    def __init__(self, ring: memoryview) -> None:
        self.ring = ring
        self.stores: list[tuple[int, bytes]] = []

    def __setitem__(self, where: slice, value: Any) -> None:
        self.stores.append((where.start, bytes(value)))
        assert where.stop - where.start == len(bytes(value))


sizes = st.lists(st.integers(0, 5000), max_size=12)


@settings(max_examples=150)
@given(
    before=sizes, releases=st.lists(st.booleans(), min_size=12, max_size=12), last=st.integers(0, 5000), data=st.data()
)
def test_any_prefix_of_an_append_leaves_exactly_the_acknowledged_records(
    before: list[int], releases: list[bool], last: int, data: st.DataObject
) -> None:
    with memfd() as fd:
        log = WriteLog.open(fd, STORE)
        live: list[tuple[int, bytes]] = []
        for at, size in enumerate(before):
            if not log.room(size):
                log.release(log.mark())
                live.clear()
            payload = bytes([at + 1]) * size
            live.append((append(log, payload)[0], payload))
            if releases[at]:
                log.release(log.mark())
                live.clear()
        if not log.room(last):
            log.release(log.mark())
            live.clear()
        recorder = Recorder(log.ring)
        log.ring = recorder  # type: ignore[assignment]
        lsn, _ = append(log, b"L" * last)
        total = sum(len(value) for _, value in recorder.stores)
        cut = data.draw(st.integers(0, total), label="bytes stored before the kill")
        left = cut
        for start, value in recorder.stores:
            piece = value[:left]
            recorder.ring[start : start + len(piece)] = piece
            left -= len(piece)
        expected = [*live, (lsn, b"L" * last)] if cut == total else live
        again = WriteLog.open(fd, STORE)
        assert contents(again) == expected
        # And it can go on from there.
        if again.room(10):
            after = append(again, b"after")[0]
            assert contents(WriteLog.open(fd, STORE)) == [*expected, (after, b"after")]


@settings(max_examples=100)
@given(flip=st.integers(0, (HEADER + 64) * 3 - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_ends_the_replay_before_its_record(flip: int, bit: int) -> None:
    with memfd() as fd:
        log = WriteLog.open(fd, STORE)
        for name in (b"a" * 64, b"b" * 64, b"c" * 64):
            append(log, name)
        log.ring[flip] ^= 1 << bit
        assert [lsn for lsn, _ in contents(WriteLog.open(fd, STORE))] == list(range(1, flip // (HEADER + 64) + 1))


# Versions


def make_version_1(fd: int) -> None:
    """Turn a log of today into what the program before locks made: the same areas, and nothing behind the ring."""
    block = Memfd(fd).superblock._replace(version=1, locks=0, notes=0)
    os.pwrite(fd, block.encode(), 0)
    os.ftruncate(fd, block.total)


def version_1_takes(fd: int) -> bool:
    """What that program asked before it touched anything."""
    size, version = os.fstat(fd).st_size, int.from_bytes(os.pread(fd, 4, 8), "little")
    return version == 1 and size == Memfd(fd).superblock.total


def test_a_log_of_version_1_is_taken_over_and_becomes_one_of_today() -> None:
    with memfd() as fd:
        make_version_1(fd)
        log = WriteLog.open(fd, STORE)
        append(log, b"written by the old program")
        handle = log.handles.allocate(VOLUME, os.O_RDWR)
        assert version_1_takes(fd)
        log = WriteLog.open(fd, STORE)
        assert log.locks is None and version_1_takes(fd), "nothing is changed by looking"
        log.upgrade()
        assert log.locks is not None and not version_1_takes(fd)
        append(log, b"by the new one")
        log.locks.set(handle, 7, 0, 99, FOR_WRITING)
        log = WriteLog.open(fd, STORE)
        assert log.memory.superblock.version == layout.VERSION
        assert contents(log) == [(1, b"written by the old program"), (2, b"by the new one")]
        assert log.locks is not None and [lock.handle for lock in log.locks.items(VOLUME)] == [handle]


def test_an_upgrade_that_is_killed_is_begun_again() -> None:
    with memfd() as fd:
        make_version_1(fd)
        append(WriteLog.open(fd, STORE), b"old")
        failpoints.rearm("log.upgrade:raise")
        with pytest.raises(failpoints.FailpointReached):
            WriteLog.open(fd, STORE).upgrade()
        failpoints.rearm("")
        log = WriteLog.open(fd, STORE)
        assert log.locks is None and contents(log) == [(1, b"old")]
        log.upgrade()
        assert contents(WriteLog.open(fd, STORE)) == [(1, b"old")]


# Handles


def test_handles_survive_the_daemon_and_ids_are_never_reused() -> None:
    with memfd() as fd:
        table = WriteLog.open(fd, STORE).handles
        first = table.allocate(VOLUME, os.O_RDWR, request=77)
        second = table.allocate(VOLUME, os.O_RDONLY, layer=5)
        assert table.allocate(VOLUME, os.O_RDWR, request=77) == first
        table.release(second)
        again = WriteLog.open(fd, STORE).handles
        assert [h.id for h in again.items()] == [first]
        handle = again.get(first)
        assert handle is not None
        assert (handle.uuid, handle.flags, handle.layer, handle.request) == (VOLUME, os.O_RDWR, 0, 77)
        assert again.allocate(VOLUME, 0, request=77) == first
        assert again.allocate(VOLUME, 0) == second + 1
        assert again.release(second) is None
        for handle in again.items():
            again.release(handle.id)
        assert len(WriteLog.open(fd, STORE).handles) == 0


def test_the_table_is_bounded() -> None:
    with memfd(slots=4) as fd:
        table = WriteLog.open(fd, STORE).handles
        ids = [table.allocate(VOLUME, 0) for _ in range(4)]
        with pytest.raises(TooManyOpen):
            table.allocate(VOLUME, 0)
        table.release(ids[1])
        assert table.allocate(VOLUME, 0) == 5


@pytest.mark.parametrize("cut", range(SLOT))
def test_a_torn_slot_is_free(cut: int) -> None:
    with memfd(slots=1) as fd:
        log = WriteLog.open(fd, STORE)
        log.handles.allocate(VOLUME, 2)
        whole = os.pread(fd, SLOT, 8192)
        os.pwrite(fd, whole[:cut] + bytes(SLOT - cut), 8192)
        again = WriteLog.open(fd, STORE).handles
        assert len(again) == 0
        assert again.allocate(VOLUME, 2) == 2


# Payloads that the kernel puts into the ring itself


def room_of(log: WriteLog) -> memoryview:
    words = memoryview(bytearray(16)).cast("Q")
    log.show_room(words)
    return words


def test_a_payload_that_lies_in_its_place_is_not_copied() -> None:
    with memfd() as fd:
        log = WriteLog.open(fd, STORE)
        room = room_of(log)
        append(log, b"one")
        place = room[0]
        log.ring[place : place + 4] = b"two!"
        payload = log.placed(place, 4)
        assert payload is not None and log.room(4)
        assert log.append(WRITE, VOLUME, 1, 1, 0, 4, payload, placed=True) == (2, place)
        assert contents(WriteLog.open(fd, STORE)) == [(1, b"one"), (2, b"two!")]


def test_a_payload_elsewhere_is_not_taken_for_one_in_its_place() -> None:
    with memfd() as fd:
        log = WriteLog.open(fd, STORE)
        room = room_of(log)
        stale = room[0]
        append(log, b"something came in between")
        assert log.placed(stale, 4) is None
        assert log.placed(room[0], room[1] - room[0] + 1) is None
        assert log.placed(room[0], room[1] - room[0]) is not None


@given(st.lists(st.tuples(st.integers(0, 5000), st.booleans()), max_size=60))
def test_what_may_be_scribbled_on_is_never_a_record(steps: list[tuple[int, bool]]) -> None:
    """Whatever lies between the two words can be overwritten at any time: a replay finds every record all the same."""
    with memfd() as fd:
        log = WriteLog.open(fd, STORE)
        room = room_of(log)
        kept: list[tuple[int, bytes]] = []
        for length, release in steps:
            if room[0] < room[1]:
                log.ring[room[0] : room[1]] = b"\xee" * (room[1] - room[0])
            if release:
                log.release(log.mark())
                kept = []
            if log.room(length):
                payload = os.urandom(length)
                kept.append((append(log, payload)[0], payload))
            assert contents(WriteLog.open(fd, STORE)) == kept
