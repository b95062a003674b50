"""The lock table against a model that knows of every byte who has locked it, and how (fcntl(2))."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from silofs import failpoints, limits
from silofs.errors import NoLocks
from silofs.layers.handles import SLOT, HandleTable
from silofs.layers.locks import READ, TO_EOF, UNLOCK, WRITE, Lock, LockTable

ONE, TWO = b"1" * 16, b"2" * 16
BYTES = 12  # the model's; the last one stands for all up to the end
KINDS = st.sampled_from([READ, WRITE, UNLOCK])


class Memory:
    """The areas of a memfd, which outlive the tables over them."""

    def __init__(self, slots: int = 64) -> None:
        self.area = memoryview(bytearray((1 + slots) * SLOT))
        self._handles, self._counter = memoryview(bytearray(16 * SLOT)), memoryview(bytearray(b"\1" + bytes(7)))
        self.start()

    def start(self) -> None:
        """As the next daemon does."""
        self.handles = HandleTable(self._handles, self._counter)
        self.locks = LockTable(self.area, self.handles)

    def open(self, uuid: bytes = ONE, layer: int = 0) -> int:
        return self.handles.allocate(uuid, os.O_RDWR, layer=layer)

    def all(self) -> set[Lock]:
        return {lock for uuid in (ONE, TWO) for lock in self.locks.items(uuid)}


def last(byte: int) -> int:
    return TO_EOF if byte == BYTES - 1 else byte


ranges = st.tuples(st.integers(0, BYTES - 1), st.integers(0, BYTES - 1)).map(lambda pair: (min(pair), max(pair)))


OWNERS = {1: 100, 2: 100, 3: 300, 4: 400}


class LockMachine(RuleBasedStateMachine):
    """Handles 1 and 2 are of one process on one file (POSIX locks), 3 has its own locks there, 4 is another file."""

    @initialize()
    def make(self) -> None:
        self.memory = Memory()
        assert [self.memory.open(uuid) for uuid in (ONE, ONE, ONE, TWO)] == [1, 2, 3, 4]
        self.bytes: dict[bytes, list[dict[int, tuple[int, int]]]] = {
            uuid: [{} for _ in range(BYTES)] for uuid in (ONE, TWO)
        }

    def file(self, handle: int) -> list[dict[int, tuple[int, int]]]:
        return self.bytes[TWO if handle == 4 else ONE]

    def forbids(self, handle: int, where: tuple[int, int], kind: int) -> bool:
        return kind != UNLOCK and any(
            owner != OWNERS[handle] and WRITE in (kind, theirs)
            for at in self.file(handle)[where[0] : where[1] + 1]
            for owner, (theirs, _) in at.items()
        )

    @rule(handle=st.sampled_from([1, 2, 3, 4]), where=ranges, kind=KINDS)
    def set(self, handle: int, where: tuple[int, int], kind: int) -> None:
        owner = OWNERS[handle]
        found = self.memory.locks.set(handle, owner, where[0], last(where[1]), kind, pid=handle)
        assert (found is not None) == self.forbids(handle, where, kind)
        if found is None:
            for at in self.file(handle)[where[0] : where[1] + 1]:
                at.pop(owner, None)
                if kind != UNLOCK:
                    at[owner] = (kind, handle)

    @rule(handle=st.sampled_from([1, 2, 3, 4]), where=ranges, kind=KINDS)
    def test(self, handle: int, where: tuple[int, int], kind: int) -> None:
        found = self.memory.locks.test(handle, OWNERS[handle], where[0], last(where[1]), kind)
        assert (found is not None) == self.forbids(handle, where, kind)
        if found is not None:
            assert found.overlaps(where[0], last(where[1])) and found.owner != OWNERS[handle]
            assert found in self.memory.all()

    @rule(handle=st.sampled_from([1, 2, 3, 4]))
    def drop(self, handle: int) -> None:
        self.memory.locks.drop(handle)
        for at in self.file(handle):
            for owner in [owner for owner, (_, by) in at.items() if by == handle]:
                del at[owner]

    @rule()
    def next_daemon(self) -> None:
        self.memory.start()

    @rule(
        handle=st.sampled_from([1, 2, 3, 4]),
        where=ranges,
        kind=KINDS,
        place=st.sampled_from(["locks.written", "locks.marked"]),
    )
    def killed_in_a_change(self, handle: int, where: tuple[int, int], kind: int, place: str) -> None:
        """Before the last step nothing has happened."""
        before = self.memory.all()
        failpoints.rearm(f"{place}:raise")
        try:
            self.memory.locks.set(handle, OWNERS[handle], where[0], last(where[1]), kind)
        except failpoints.FailpointReached:
            self.memory.start()
        finally:
            failpoints.rearm("")
        # Without a kill it was refused, or unlocked what was not locked.
        assert self.memory.all() == before

    @invariant()
    def as_few_as_can_be(self) -> None:
        """The table has exactly the model's runs: nothing lost, nothing twice, neighbours merged."""
        expected = set()
        for uuid, at in self.bytes.items():
            for owner in (100, 300, 400):
                runs = groupby(range(BYTES), key=lambda byte: at[byte].get(owner))
                for locked, members in runs:
                    if locked is not None:
                        run = list(members)
                        expected.add((uuid, locked[1], owner, run[0], last(run[-1]), locked[0]))
        found = [(uuid, *lock[:5]) for uuid in (ONE, TWO) for lock in self.memory.locks.items(uuid)]
        assert len(found) == len(set(found)) == len(self.memory.locks)
        assert set(found) == expected


LockMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestLocks = LockMachine.TestCase


def test_locks_survive_the_daemon() -> None:
    memory = Memory()
    first, second = memory.open(), memory.open()
    assert memory.locks.set(first, 0xFFFF_FFFF_FFFF_FFFF, 100, TO_EOF, WRITE, pid=4242) is None
    memory.start()
    assert memory.locks.set(second, 1, 101, 101, READ) == Lock(first, 0xFFFF_FFFF_FFFF_FFFF, 100, TO_EOF, WRITE, 4242)
    assert memory.locks.set(second, 1, 0, 99, WRITE) is None


def test_unlocking_the_middle_leaves_both_ends() -> None:
    memory = Memory()
    handle = memory.open()
    memory.locks.set(handle, 1, 0, 99, WRITE)
    memory.locks.set(handle, 1, 40, 59, UNLOCK)
    assert sorted((lock.start, lock.end) for lock in memory.all()) == [(0, 39), (60, 99)]
    memory.locks.set(handle, 1, 40, 59, WRITE)
    assert [(lock.start, lock.end) for lock in memory.all()] == [(0, 99)]


def test_locks_go_with_their_handle_also_when_the_daemon_dies_in_between() -> None:
    memory = Memory()
    first, second = memory.open(), memory.open()
    memory.locks.set(first, 1, 0, 99, WRITE)
    memory.locks.set(second, 2, 100, 199, WRITE)
    memory.handles.closing = lambda fh: None
    memory.handles.release(first)
    memory.start()
    assert [lock.handle for lock in memory.all()] == [second]
    assert memory.locks.set(second, 2, 0, TO_EOF, WRITE) is None
    memory.start()
    assert len(memory.locks) == 1


def test_a_snapshot_is_another_file_than_its_volume() -> None:
    memory = Memory()
    volume, snapshot, same = memory.open(), memory.open(layer=7), memory.open(TWO, layer=7)
    assert memory.locks.set(volume, 1, 0, 9, WRITE) is None
    assert memory.locks.set(snapshot, 2, 0, 9, WRITE) is None
    assert memory.locks.test(same, 3, 0, 9, READ) is not None


def test_who_waits_is_told_when_a_lock_may_have_gone() -> None:
    memory = Memory()
    told: list[str] = []
    memory.locks.released = lambda: told.append("")
    handle = memory.open()
    memory.locks.set(handle, 1, 0, 99, WRITE)
    assert not told
    memory.locks.set(handle, 1, 0, 99, READ)
    memory.locks.set(handle, 1, 0, 9, UNLOCK)
    memory.handles.release(handle)
    assert len(told) == 3 and not len(memory.locks)


@contextmanager
def full(slots: int) -> Iterator[tuple[Memory, int]]:
    memory = Memory(slots)
    handle = memory.open()
    for at in range(slots):
        assert memory.locks.set(handle, 1, at * 10, at * 10 + 4, WRITE) is None
    yield memory, handle


def test_a_full_table_refuses_and_stays_as_it_is() -> None:
    with full(4) as (memory, handle):
        before = memory.all()
        with pytest.raises(NoLocks):
            memory.locks.set(handle, 1, 2, 2, UNLOCK)
        with pytest.raises(NoLocks):
            memory.locks.set(handle, 1, 1000, 1000, READ)
        assert memory.all() == before
        memory.locks.set(handle, 1, 0, 4, UNLOCK)
        assert memory.locks.set(handle, 1, 1000, 1000, READ) is None


def test_one_file_cannot_take_all_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("silofs.layers.locks.LOCKS_HANDLE_MAX", 3)
    assert limits.LOCKS_HANDLE_MAX < limits.LOCKS_MAX
    with full(3) as (memory, handle), pytest.raises(NoLocks, match="one open file"):
        memory.area = memoryview(bytearray(64 * SLOT))
        memory.start()
        for at in range(4):
            memory.locks.set(handle, 1, at * 10, at * 10, WRITE)


@pytest.mark.parametrize("bad", [(5, 4), (-1, 4), (0, TO_EOF + 1)])
def test_ranges_that_are_none_are_refused(bad: tuple[int, int]) -> None:
    memory = Memory()
    handle = memory.open()
    with pytest.raises(ValueError, match="cannot be locked"):
        memory.locks.set(handle, 1, *bad, WRITE)
    with pytest.raises(ValueError, match="cannot be locked"):
        memory.locks.set(handle + 1, 1, 0, 0, WRITE)


@settings(max_examples=200)
@given(st.data())
def test_any_bytes_are_a_table(data: Any) -> None:
    """Whatever is in the slots, a daemon comes up: what belongs to no open handle is free."""
    memory = Memory(4)
    memory.area[:] = data.draw(st.binary(min_size=5 * SLOT, max_size=5 * SLOT))
    memory.start()
    assert len(memory.locks) == 0
