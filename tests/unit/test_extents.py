"""Extents against a plain set of integers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from silofs.extents import Extents

ranges = st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda pair: (min(pair), max(pair)))
changes = st.lists(st.tuples(st.booleans(), ranges), max_size=30)


def build(steps: list[tuple[bool, tuple[int, int]]]) -> tuple[Extents, set[int]]:
    extents, model = Extents(), set[int]()
    for adding, (start, end) in steps:
        if adding:
            extents.add(start, end)
            model |= set(range(start, end))
        else:
            extents.remove(start, end)
            model -= set(range(start, end))
    return extents, model


@given(changes)
def test_add_and_remove_behave_like_a_set(steps: list[tuple[bool, tuple[int, int]]]) -> None:
    extents, model = build(steps)
    assert {n for start, end in extents for n in range(start, end)} == model
    assert extents.total == len(model)
    assert all(n in extents for n in model)
    assert not any(n in extents for n in set(range(62)) - model)


@given(changes)
def test_ranges_are_sorted_disjoint_and_do_not_touch(steps: list[tuple[bool, tuple[int, int]]]) -> None:
    flat = [edge for pair in build(steps)[0] for edge in pair]
    assert flat == sorted(set(flat))


@given(changes, ranges)
def test_overlap_and_gaps_partition_a_window(
    steps: list[tuple[bool, tuple[int, int]]], window: tuple[int, int]
) -> None:
    extents, model = build(steps)
    inside = {n for start, end in extents.overlap(*window) for n in range(start, end)}
    outside = {n for start, end in extents.gaps(*window) for n in range(start, end)}
    assert inside == model & set(range(*window))
    assert outside == set(range(*window)) - model


def test_a_copy_is_independent() -> None:
    first = Extents([(0, 4)])
    second = first.copy()
    second.add(10, 12)
    assert list(first) == [(0, 4)]
    assert second == Extents([(10, 12), (0, 4)])
