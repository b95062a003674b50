"""Which cells are free: against plain sets, and never a cell that is in use or that a reader may still see."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from silofs.layers import cell_map
from silofs.layers.cell_map import CellMap, changed_map
from silofs.layers.schema import MAP_BYTES, MAP_CELLS

MAPS_MAX = 3
CELLS = st.integers(0, MAPS_MAX * MAP_CELLS - 1)
EVERY = 1 << 62  # a transaction that is newer than all


def bitmap(cells: set[int], number: int) -> bytes:
    """The record of one map."""
    bits = np.zeros(MAP_CELLS, np.uint8)
    bits[[cell - number * MAP_CELLS for cell in cells if cell // MAP_CELLS == number]] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def spread(cells: range, share: float, seed: int) -> set[int]:
    """Some of a range: everywhere, so that the lowest free one is hard to find."""
    rng = np.random.default_rng(seed)
    return {cell for cell, chosen in zip(cells, rng.random(len(cells)) < share, strict=True) if chosen}


@pytest.fixture(autouse=True, scope="module")
def small_strides() -> Iterator[None]:
    """So that few cells lie in many strides, and the last one is not whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cell_map, "STRIDE", 100)
        yield


class Cells(RuleBasedStateMachine):
    """Transactions that take cells and give some up, readers that come and go, and a file that grows."""

    @initialize(maps=st.integers(0, 2), share=st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]), seed=st.integers(0, 99))
    def begin(self, maps: int, share: float, seed: int) -> None:
        self.cells = maps * MAP_CELLS
        self.used = spread(range(self.cells), share, seed)
        self.solid, self.hollow = set(range(self.cells)) - self.used, set[int]()
        self.waiting: list[tuple[int, set[int]]] = []
        self.txn_id = 10
        records = {number: bitmap(self.used, number) for number in range(maps)}
        self.map = CellMap(self.cells, {number: each for number, each in records.items() if any(each)})

    def take(self, count: int, hollow: bool) -> list[int]:
        """Takes from the map, and from the sets by the rule."""
        expected = sorted(self.solid)[:count]
        if hollow:
            expected += sorted(self.hollow)[: count - len(expected)]
        taken = self.map.take(count, hollow=hollow)
        assert taken == expected
        self.solid -= set(taken)
        self.hollow -= set(taken)
        return taken

    @rule(count=st.integers(0, 3000) | st.integers(0, 20), hollow=st.booleans(), dropped=st.integers(0, 3000))
    def transaction_lands(self, count: int, hollow: bool, dropped: int) -> None:
        """It takes some, and gives up some that were in use or that it has just taken."""
        taken = self.take(count, hollow)
        self.used |= set(taken)
        given_up = set(sorted(self.used)[-dropped:] if dropped % 2 else sorted(self.used)[:dropped])
        self.txn_id += 1
        self.map.given_up(self.txn_id, given_up)
        self.used -= given_up
        self.waiting.append((self.txn_id, given_up))

    @rule(count=st.integers(0, 3000), hollow=st.booleans())
    def transaction_fails(self, count: int, hollow: bool) -> None:
        """Blocks may have been written by then, whatever the cells were before."""
        taken = self.take(count, hollow)
        self.map.undone(taken)
        self.solid |= set(taken)

    @rule(back=st.integers(0, 4))
    def readers_go_on(self, back: int) -> None:
        oldest = self.txn_id - back
        self.map.ripen(oldest)
        for txn_id, cells in self.waiting:
            if txn_id <= oldest:
                self.solid |= cells
        self.waiting = [(txn_id, cells) for txn_id, cells in self.waiting if txn_id > oldest]

    @rule(keep=st.integers(0, 2000), runs=st.integers(1, 5))
    def blocks_go_back(self, keep: int, runs: int) -> None:
        found = self.map.excess(keep, runs)
        assert len(found) <= runs
        gone = [cell for first, count in found for cell in range(first, first + count)]
        assert all(count > 0 for _, count in found)
        assert len(set(gone)) == len(gone) <= max(0, len(self.solid) - keep)
        assert set(gone) == set(sorted(self.solid)[len(self.solid) - len(gone) :]), "the highest"
        assert gone or len(self.solid) <= keep
        for first, count in found:
            self.map.punched(first, count)
        self.solid -= set(gone)
        self.hollow |= set(gone)

    @precondition(lambda self: self.cells < MAPS_MAX * MAP_CELLS)
    @rule()
    def the_file_grows(self) -> None:
        self.map.grow(MAP_CELLS)
        self.hollow |= set(range(self.cells, self.cells + MAP_CELLS))
        self.cells += MAP_CELLS

    @invariant()
    def the_figures_are_right(self) -> None:
        assert self.map.cells == self.cells
        assert self.map.solid == len(self.solid)
        assert self.map.free == len(self.solid) + len(self.hollow)
        assert self.map.waiting == sum(len(cells) for _, cells in self.waiting)

    def teardown(self) -> None:
        """Nothing is lost: in the end every cell that nothing uses can be had, once."""
        if hasattr(self, "map"):
            self.map.ripen(EVERY)
            assert set(self.map.take(MAPS_MAX * MAP_CELLS, hollow=True)) == set(range(self.cells)) - self.used
            assert self.map.take(1, hollow=True) == [] and self.map.free == 0


TestCells = Cells.TestCase
TestCells.settings = settings(max_examples=40, stateful_step_count=25)


@given(
    st.sets(CELLS.map(lambda cell: cell % MAP_CELLS), max_size=60),
    st.sets(CELLS.map(lambda cell: cell % MAP_CELLS), max_size=30),
    st.sets(CELLS.map(lambda cell: cell % MAP_CELLS), max_size=30),
    st.integers(0, 1 << 20),
)
def test_a_map_is_changed_as_a_set_is(before: set[int], used: set[int], free: set[int], number: int) -> None:
    """A cell may be taken and given up in one transaction; one that is given up and was free is told."""
    first = number * MAP_CELLS
    found, wrong = changed_map(
        bitmap(before, 0), first, (first + cell for cell in used), [first + cell for cell in free]
    )
    assert found == bitmap((before | used) - free, 0)
    assert sorted(wrong) == sorted(first + cell for cell in free - before - used)


def test_an_unchanged_map_is_the_same_bytes() -> None:
    before = bytes(range(256)) * (MAP_BYTES // 256)
    assert changed_map(before, 0, [], []) == (before, [])


def test_blocks_that_nobody_needs_go_from_the_end_and_within_a_stride() -> None:
    free = CellMap(MAP_CELLS, {0: bitmap({5, 6, MAP_CELLS - 2}, 0)})
    assert free.excess(MAP_CELLS - 3, 9) == []
    assert free.excess(MAP_CELLS - 4, 9) == [(MAP_CELLS - 1, 1)]
    assert free.excess(MAP_CELLS - 5, 9) == [(MAP_CELLS - 1, 1), (MAP_CELLS - 3, 1)]
    runs = free.excess(0, 1000)
    assert sum(count for _, count in runs) == MAP_CELLS - 3 and max(count for _, count in runs) <= 800
    assert runs[-2:] == [(7, MAP_CELLS % 800 - 7), (0, 5)]


def test_a_map_that_has_become_longer_begins_with_its_old_end() -> None:
    """What was looked at already is looked at again once something is free there."""
    free = CellMap(0, {})
    assert free.take(1, hollow=True) == []
    free.grow(MAP_CELLS)
    assert free.take(MAP_CELLS, hollow=True) == list(range(MAP_CELLS))
    assert free.take(1, hollow=True) == []
    free.grow(MAP_CELLS)
    assert free.take(2, hollow=True) == [MAP_CELLS, MAP_CELLS + 1]
    free.undone([3, 1])
    assert free.take(3, hollow=False) == [1, 3], "cells without blocks are not wanted"
    assert free.take(1, hollow=True) == [MAP_CELLS + 2]
