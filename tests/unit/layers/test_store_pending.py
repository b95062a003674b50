"""The index over the write log says of every page what was written last, whatever came before."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from silofs.blocks import PAGE
from silofs.layers.pending import ZERO, Patch, Pending

PAGES = 6
BASE = bytes([255]) * PAGE

WRITE = st.tuples(st.just("write"), st.integers(0, PAGES * PAGE - 1), st.integers(1, 3 * PAGE))
WHOLE = st.tuples(st.just("whole"), st.integers(0, PAGES - 1), st.integers(1, 3))
CLEAR = st.tuples(st.just("zero"), st.integers(0, PAGES - 1), st.integers(0, PAGES))


@settings(max_examples=300)
@given(st.lists(st.one_of(WRITE, WHOLE, CLEAR), max_size=25))
def test_against_bytes(operations: list[tuple[str, int, int]]) -> None:
    ring, expected, pending = bytearray(), bytearray(BASE * PAGES), Pending(b"u" * 16)
    for lsn, (kind, first, length) in enumerate(operations, 1):
        if kind == "zero":
            end = min(PAGES, first + length)
            pending.zero(first, end, lsn)
            expected[first * PAGE : end * PAGE] = bytes(max(0, end - first) * PAGE)
            continue
        offset = first if kind == "write" else first * PAGE
        size = min(length if kind == "write" else length * PAGE, len(expected) - offset)
        data = bytes([lsn % 250 + 1]) * size
        ring += bytes(-len(ring) % 64)
        pending.write(offset, len(ring), size, lsn)
        ring += data
        expected[offset : offset + size] = data
    view = memoryview(ring)
    for page in range(PAGES):
        entry = pending.lookup(page)
        if entry is None:
            found = BASE
        elif isinstance(entry, Patch):
            assert sorted(entry.ranges) == entry.ranges
            assert all(a[1] <= b[0] for a, b in zip(entry.ranges, entry.ranges[1:], strict=False))
            found = entry.render(view, None if entry.complete else BASE)
        else:
            found = bytes(PAGE) if entry == ZERO else bytes(view[entry : entry + PAGE])
        assert found == expected[page * PAGE : (page + 1) * PAGE], page
    assert pending.last_lsn == len(operations)
    assert bool(pending) == bool(operations)


def test_thresholds() -> None:
    pending = Pending(b"u" * 16)
    pending.write(0, 0, PAGE, 4)
    pending.write(600 * PAGE, PAGE, 2 * PAGE, 5)
    assert (pending.bytes, pending.leaves_touched, pending.first_lsn, pending.last_lsn) == (3 * PAGE, 2, 4, 5)


def test_a_page_is_complete_without_its_base_once_covered() -> None:
    pending = Pending(b"u" * 16)
    pending.write(0, 0, 4000, 1)
    assert not pending.pages[0].complete  # type: ignore[union-attr]
    pending.write(3000, 4096, 1096, 2)
    assert pending.pages[0].complete  # type: ignore[union-attr]
    pending.zero(0, 1, 3)
    pending.write(10, 0, 10, 4)
    assert pending.pages[0].base == ZERO  # type: ignore[union-attr]
