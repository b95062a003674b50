"""What one volume has in the write log and not yet in LMDB: an index over the ring, not a copy of it. Pure.

Positions are byte positions of a page's (or a range's) first byte in the log's ring, which is passed to whoever needs
the bytes. A `Pending` is written by the engine only until it is handed to a commit; after that nobody changes it.

Long writes are indexed page by page only when somebody asks for one, or lays something else over them: most streams are
committed before anybody reads them, and a commit takes long writes as they came.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Final

import numpy as np

from silofs.blocks import LEAF_SHIFT, PAGE, PAGE_SHIFT
from silofs.extents import Extents
from silofs.layers.ahead import Ahead, Numbers, Run, spread
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

    __slots__ = (
        "_late",
        "_pages",
        "_sealed",
        "ahead",
        "bytes",
        "first_lsn",
        "last_lsn",
        "leaves",
        "long",
        "uuid",
        "zeros",
    )

    def __init__(self, uuid: bytes) -> None:
        self.uuid = uuid
        self.first_lsn = 0  # of the oldest record indexed here; 0 while there is none
        self.last_lsn = 0
        self._pages: dict[int, int | Patch] = {}
        self._late: list[Run] = []  # long writes that are newer than all of `_pages`, and not in it yet
        self._sealed: tuple[dict[int, int | Patch], list[Run]] | None = None  # both, as a commit got them
        self.zeros = Extents()
        self.bytes = 0  # payload indexed, overwritten pages counted again: what the ring holds for it
        self.leaves: set[int] = set()  # touched by writes; zeroed ranges are not counted
        self.long: list[Run] = []  # long writes that are not written ahead
        self.ahead: list[Future[Ahead | None]] = []  # what was

    def __bool__(self) -> bool:
        return self.last_lsn != 0

    @property
    def pages(self) -> dict[int, int | Patch]:
        """By page, the ring position of its bytes, or a Patch. To be looked at; of the event loop's thread."""
        if self._late:
            self._index()
        return self._pages

    def _index(self) -> None:
        if self._sealed is not None:
            # The commit's thread looks at what it was given.
            self._pages = dict(self._pages)
        for first, end, position in self._late:
            count = (end - first) << PAGE_SHIFT
            self._pages.update(zip(range(first, end), range(position, position + count, PAGE), strict=True))
        self._late = []

    @property
    def leaves_touched(self) -> int:
        return len(self.leaves)

    def write(self, offset: int, position: int, length: int, lsn: int) -> None:
        """Index `length` bytes for the volume's byte `offset`, which lie at ring `position`."""
        assert lsn > self.last_lsn and self._sealed is None, IN_ORDER
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
            if count >= LONG_BYTES:
                run = first, end, position
                self._late.append(run)
                self.long.append(run)
            else:
                self.pages.update(zip(range(first, end), range(position, position + count, PAGE), strict=True))
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
        assert lsn > self.last_lsn and self._sealed is None, IN_ORDER
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

    def take_long(self) -> list[Run]:
        """Long writes, as many as fill whole objects; the rest is kept."""
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
        return runs

    # For a commit

    def seal(self) -> None:
        """It is handed to a commit: from here on it can be looked at by two threads, and written to by none."""
        self._sealed = self._pages, self._late

    def split(self) -> tuple[Numbers, Numbers, dict[int, Patch]]:
        """(pages that lie in the ring as they are, ascending; their positions; pages of which only parts were written).

        For the commit's thread once this is sealed.
        """
        pages, late = self._sealed or (self._pages, self._late)
        patches: dict[int, Patch] = {}
        whole = pages
        if Patch in set(map(type, pages.values())):  # as nearly never
            whole = {}
            for page, entry in pages.items():
                if isinstance(entry, Patch):
                    patches[page] = entry
                else:
                    whole[page] = entry
        numbers = np.fromiter(whole, np.int64, len(whole))
        positions = np.fromiter(whole.values(), np.int64, len(whole))
        if late:
            more, at = spread(late)
            if patches:
                for page in patches.keys() & set(more.tolist()):
                    del patches[page]
            numbers, positions = np.concatenate((numbers, more)), np.concatenate((positions, at))
        order = np.argsort(numbers, kind="stable")
        numbers, positions = numbers[order], positions[order]
        newest = np.diff(numbers, append=-1) != 0
        return numbers[newest], positions[newest], patches

    # Looking

    def lookup(self, page: int) -> int | Patch | None:
        """Ring position of the page's bytes, a Patch, ZERO, or None: nothing of it is pending."""
        entry = self.pages.get(page)
        if entry is None and self.zeros and page in self.zeros:
            return ZERO
        return entry
