"""What one volume has in the write log and not yet in LMDB: an index over the ring, not a copy of it. Pure.

Positions are byte positions of a page's (or a range's) first byte in the log's ring, which is passed to whoever needs
the bytes. A `Pending` is written by the engine only until it is handed to a commit; after that nobody changes it.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Final, cast

import numpy as np

from silofs.blocks import LEAF_SHIFT, PAGE, PAGE_SHIFT
from silofs.extents import Extents
from silofs.layers.ahead import Ahead, Numbers
from silofs.layers.schema import OBJECT_PAGES

ZERO: Final = -1
"""In place of a ring position: the page is all zeros, and has no bytes in the ring."""

LONG_BYTES: Final = 1 << 16
"""Of a write that is written ahead."""

IN_ORDER: Final = "records are indexed in the order of the log"

Buffer = bytes | bytearray | memoryview


class Patch:
    """A page of which only some bytes are in the ring.

    `ranges` are (start, end, ring position) with 0 <= start < end <= 4096, sorted and disjoint: a newer write has
    already cut what it hides out of the older ones. `base` is what lies beneath them: a ring position, ZERO, or None
    when it is the page as the store has it.
    """

    __slots__ = ("base", "ranges")

    def __init__(self, base: int | None) -> None:
        self.base = base
        self.ranges: list[tuple[int, int, int]] = []

    @property
    def complete(self) -> bool:
        """Whether the page can be built from the ring alone."""
        if self.base is not None:
            return True
        at = 0
        for start, end, _ in self.ranges:
            if start != at:
                return False
            at = end
        return at == PAGE

    def put(self, start: int, end: int, position: int) -> None:
        """Lay bytes [start, end) of the page, found at `position`, over what is there."""
        kept = [(start, end, position)]
        for old_start, old_end, old_position in self.ranges:
            if old_start < start:
                kept.append((old_start, min(old_end, start), old_position))
            if old_end > end:
                cut = max(old_start, end)
                kept.append((cut, old_end, old_position + cut - old_start))
        kept.sort()
        self.ranges = kept

    def render(self, ring: memoryview, base: Buffer | None = None) -> bytes:
        """The page's 4096 bytes; `base` is the page of the store, needed only while `complete` is false."""
        if self.base is None:
            page = bytearray(PAGE if base is None else base)
        elif self.base == ZERO:
            page = bytearray(PAGE)
        else:
            page = bytearray(ring[self.base : self.base + PAGE])
        for start, end, position in self.ranges:
            page[start:end] = ring[position : position + end - start]
        return bytes(page)

    def __repr__(self) -> str:
        return f"Patch(base={self.base}, ranges={self.ranges})"


class Pending:
    """One volume's writes since a cut of the log. `zeros` (page ranges) lie beneath `pages`."""

    __slots__ = ("ahead", "bytes", "first_lsn", "last_lsn", "leaves", "long", "pages", "uuid", "zeros")

    def __init__(self, uuid: bytes) -> None:
        self.uuid = uuid
        self.first_lsn = 0  # of the oldest record indexed here; 0 while there is none
        self.last_lsn = 0
        self.pages: dict[int, int | Patch] = {}
        self.zeros = Extents()
        self.bytes = 0  # payload indexed, overwritten pages counted again: what the ring holds for it
        self.leaves: set[int] = set()  # touched by writes; zeroed ranges are not counted
        self.long: list[tuple[int, int, int]] = []  # (first page, end, ring position) of long writes, not written ahead
        self.ahead: list[Future[Ahead | None]] = []  # what was

    def __bool__(self) -> bool:
        return self.last_lsn != 0

    @property
    def leaves_touched(self) -> int:
        return len(self.leaves)

    def write(self, offset: int, position: int, length: int, lsn: int) -> None:
        """Index `length` bytes for the volume's byte `offset`, which lie at ring `position`."""
        assert lsn > self.last_lsn, IN_ORDER
        self.last_lsn = lsn
        if not self.first_lsn:
            self.first_lsn = lsn
        self.bytes += length
        if length == PAGE and not offset & (PAGE - 1):
            page = offset >> PAGE_SHIFT
            self.pages[page] = position
            self.leaves.add(page >> LEAF_SHIFT)
            return
        first, end = offset >> PAGE_SHIFT, (offset + length) >> PAGE_SHIFT  # but for the edges
        self.leaves.update(range(first >> LEAF_SHIFT, ((offset + length - 1) >> PAGE_SHIFT >> LEAF_SHIFT) + 1))
        start = offset & (PAGE - 1)
        if start:
            step = min(PAGE - start, length)
            self._patch(first).put(start, start + step, position)
            position += step
            first += 1
        if first < end:
            count = (end - first) << PAGE_SHIFT
            self.pages.update(zip(range(first, end), range(position, position + count, PAGE), strict=True))
            if count >= LONG_BYTES:
                self.long.append((first, end, position))
            position += count
        rest = (offset + length) & (PAGE - 1)
        if rest and first <= end:
            self._patch(end).put(0, rest, position)

    def _patch(self, page: int) -> Patch:
        """The page's entry as a patch, made from what is there now."""
        entry = self.pages.get(page)
        if isinstance(entry, Patch):
            return entry
        if entry is None and page in self.zeros:
            entry = ZERO
        self.pages[page] = patch = Patch(entry)
        return patch

    def zero(self, first_page: int, end_page: int, lsn: int) -> None:
        """The whole pages [first_page, end_page) become zero. Ragged edges are the caller's: writes of zeros."""
        assert lsn > self.last_lsn, IN_ORDER
        self.last_lsn = lsn
        if not self.first_lsn:
            self.first_lsn = lsn
        if first_page >= end_page:
            return
        pages = self.pages
        if end_page - first_page < len(pages):
            for page in range(first_page, end_page):
                pages.pop(page, None)
        else:
            for page in [page for page in pages if first_page <= page < end_page]:
                del pages[page]
        self.zeros.add(first_page, end_page)

    @property
    def long_pages(self) -> int:
        """Pages of long writes that are not written ahead."""
        return sum(end - first for first, end, _ in self.long)

    def take_long(self) -> tuple[Numbers, Numbers]:
        """(page numbers, ascending; ring positions) of long writes, as many as fill whole objects; the rest is kept."""
        runs, left = self.long, []
        rest = self.long_pages % OBJECT_PAGES
        while rest:
            first, end, position = runs.pop()
            cut = max(first, end - rest)
            left.append((cut, end, position + (cut - first) * PAGE))
            if first < cut:
                runs.append((first, cut, position))
            rest -= end - cut
        self.long = left[::-1]
        if not runs:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        pages = np.concatenate([np.arange(first, end) for first, end, _ in runs])
        at = np.concatenate([position + PAGE * np.arange(end - first) for first, end, position in runs])
        order = np.argsort(pages, kind="stable")
        return pages[order], at[order]

    def split(self) -> tuple[dict[int, int], dict[int, Patch]]:
        """(pages that lie in the ring as they are, pages of which only parts were written)."""
        if Patch not in set(map(type, self.pages.values())):  # as nearly always
            return cast("dict[int, int]", self.pages), {}
        whole, patches = {}, {}
        for page, entry in self.pages.items():
            if isinstance(entry, Patch):
                patches[page] = entry
            else:
                whole[page] = entry
        return whole, patches

    def lookup(self, page: int) -> int | Patch | None:
        """Ring position of the page's bytes, a Patch, ZERO, or None: nothing of it is pending."""
        entry = self.pages.get(page)
        if entry is None and self.zeros and page in self.zeros:
            return ZERO
        return entry
