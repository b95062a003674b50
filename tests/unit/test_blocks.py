"""Page arithmetic: every byte of a range is named once, whole pages are those wholly inside."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from silofs.blocks import LEAF_PAGES, PAGE, leaves_for, pages_for, split_by_page, whole_pages

offsets = st.integers(0, 5 * PAGE)


@given(offsets, offsets)
def test_split_covers_the_range_in_order(offset: int, length: int) -> None:
    position = offset
    for page, start, end, done in split_by_page(offset, length):
        assert 0 <= start < end <= PAGE
        assert page * PAGE + start == position == offset + done
        position += end - start
    assert position == offset + length


@given(offsets, offsets)
def test_whole_pages_are_inside(offset: int, length: int) -> None:
    first, end = whole_pages(offset, length)
    inside = [p for p in range(12) if p * PAGE >= offset and (p + 1) * PAGE <= offset + length]
    assert list(range(first, end)) == inside


def test_sizes_round_up() -> None:
    assert [pages_for(n) for n in (0, 1, PAGE, PAGE + 1)] == [0, 1, 1, 2]
    assert [leaves_for(n) for n in (0, 1, LEAF_PAGES * PAGE, LEAF_PAGES * PAGE + 1)] == [0, 1, 1, 2]
