"""The index over the write log says of every page what was written last, whatever came before; to a commit as well."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from silofs.blocks import PAGE
from silofs.layers import pending as pending_module
from silofs.layers.pending import ZERO, Patch, Pending

PAGES = 6
BASE = bytes([255]) * PAGE

WRITE = st.tuples(st.just("write"), st.integers(0, PAGES * PAGE - 1), st.integers(1, 3 * PAGE))
WHOLE = st.tuples(st.just("whole"), st.integers(0, PAGES - 1), st.integers(1, 3))
CLEAR = st.tuples(st.just("zero"), st.integers(0, PAGES - 1), st.integers(0, PAGES))
LOOK = st.tuples(st.just("look"), st.integers(0, PAGES - 1), st.just(0))


@pytest.fixture(autouse=True)
def long_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pages are a long write."""
    monkeypatch.setattr(pending_module, "LONG_BYTES", 2 * PAGE)


@settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(WRITE, WHOLE, CLEAR, LOOK), max_size=25), st.booleans())
def test_against_bytes(operations: list[tuple[str, int, int]], committed: bool) -> None:
    ring, expected, pending = bytearray(), bytearray(BASE * PAGES), Pending(b"u" * 16)
    for lsn, (kind, first, length) in enumerate(operations, 1):
        if kind == "look":
            pending.lookup(first)
            pending.zero(0, 0, lsn)
            continue
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
    if committed:
        pending.seal()
    entries = [pending.lookup(page) for page in range(PAGES)]
    # What a commit gets, also when somebody looks meanwhile: the same but for zeros, which it applies first.
    numbers, positions, patches = pending.split()
    whole = dict(zip(numbers.tolist(), positions.tolist(), strict=True))
    assert numbers.tolist() == sorted(whole) and not whole.keys() & patches.keys()
    seen = {page: entry for page, entry in enumerate(entries) if entry is not None and entry != ZERO}
    assert {**whole, **patches} == seen
    for page, entry in enumerate(entries):
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


def test_a_commit_gets_long_writes_as_they_came_whoever_looks_meanwhile() -> None:
    pending = Pending(b"u" * 16)
    pending.write(0, 0, 10, 1)
    pending.write(PAGE, 1 << 20, 4 * PAGE, 2)
    pending.seal()
    assert pending._sealed is not None
    pages, late = pending._sealed
    assert pending.lookup(2) == (1 << 20) + PAGE and len(pending.pages) == 5
    assert list(pages) == [0] and len(late) == 1  # what another thread is going through
    numbers, positions, patches = pending.split()
    assert numbers.tolist() == [1, 2, 3, 4] and positions[0] == 1 << 20 and list(patches) == [0]
    with pytest.raises(AssertionError):
        pending.write(0, 0, PAGE, 3)
