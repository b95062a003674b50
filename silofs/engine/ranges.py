"""Where a volume has data and where it has holes, and making it longer or emptier by ranges.

A page is *data* unless it is known to read as zeros without being stored: holes, zero pages and discarded ranges are
no data; pages at a peer and damaged ones are. What is pending lies over what is being committed lies over the store,
as for a read (docs/write-path.md).

A search begins with the resolved leaf in the cache. Beyond that a thread looks, at most SEEK_LEAVES leaves that exist
at a time: what is absent costs nothing, however much of it there is. The overlay is taken before the thread begins,
and the thread's snapshot is no older than it. So each page is seen as it was at some moment during the search.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from heapq import merge
from typing import Final

import numpy as np
import numpy.typing as npt

from silofs.blocks import LEAF_MASK, LEAF_PAGES, LEAF_SHIFT, PAGE_SHIFT, pages_for
from silofs.engine.commits import Commits
from silofs.engine.reads import Reads
from silofs.engine.volume import Gate, VolumeState
from silofs.engine.writes import Writes
from silofs.errors import Damaged, NoSuchVolume
from silofs.layers.commit import grow
from silofs.layers.pending import Pending
from silofs.layers.reader import ReadTxn
from silofs.layers.schema import ZERO, Refs
from silofs.limits import SEEK_LEAVES

Mask = npt.NDArray[np.bool_]
_ZERO: Final = np.uint64(ZERO)


class Overlay:
    """Which pages from `first` on are data, and which are zeros, by what is not in the store yet."""

    def __init__(self, pending: Pending, flushing: Pending | None, first: int, end: int) -> None:
        pages = _within(pending.pages, first, end)
        self._zeros = [pending.zeros.copy()]
        if flushing is not None:
            pages |= {page for page in _within(flushing.pages, first, end) if page not in pending.zeros}
            self._zeros.append(flushing.zeros.copy())
        self._pages = np.sort(np.fromiter(pages, np.int64, len(pages)))

    def leaves(self) -> list[int]:
        """Those with data, ascending."""
        return [int(number) for number in np.unique(self._pages >> LEAF_SHIFT)]

    def over(self, number: int, refs: Refs) -> Mask:
        """bool[512]: which pages of a leaf are data, where the store has `refs`."""
        data: Mask = refs > _ZERO
        base, end = number << LEAF_SHIFT, (number + 1) << LEAF_SHIFT
        for zeros in self._zeros:
            for start, stop in zeros.overlap(base, end):
                data[start - base : stop - base] = False
        here = self._pages[np.searchsorted(self._pages, base) : np.searchsorted(self._pages, end)]
        data[here - base] = True
        return data


def _within(pages: Mapping[int, object], first: int, end: int) -> set[int]:
    if end - first < len(pages):
        return {page for page in range(first, end) if page in pages}
    return {page for page in pages if first <= page < end}


def first_of(mask: Mask, data: bool, start: int) -> int | None:
    """Where the mask is `data` for the first time, not before `start`."""
    found = np.flatnonzero(mask[start:] == data)
    return start + int(found[0]) if len(found) else None


def look(head: int, overlay: Overlay, first: int, end: int, data: bool, txn: ReadTxn) -> tuple[int | None, int]:
    """The first page of [first, end) that is `data`, and how far it was looked: to `end`, or SEEK_LEAVES leaves."""
    at, looked = first, 0
    for number in _each(overlay, txn, head, first >> LEAF_SHIFT, ((end - 1) >> LEAF_SHIFT) + 1):
        base = number << LEAF_SHIFT
        if base > at and not data:
            return at, at  # nothing is there
        found = first_of(overlay.over(number, txn.resolve(head, number)), data, max(at - base, 0))
        if found is not None:
            return (base + found, base + found) if base + found < end else (None, end)
        at, looked = base + LEAF_PAGES, looked + 1
        if looked == SEEK_LEAVES:
            return None, at
    return (at, at) if at < end and not data else (None, end)


def _each(overlay: Overlay, txn: ReadTxn, head: int, first: int, end: int) -> Iterator[int]:
    """The leaves of [first, end) that something is in, ascending."""
    last = -1
    for number in merge(overlay.leaves(), txn.chain_leaves(head, first, end)):
        if number != last:
            last = number
            yield number


class Ranges:
    """Searches and changes of ranges, of any volume."""

    def __init__(self, reads: Reads, writes: Writes, commits: Commits) -> None:
        self._reads = reads
        self._writes = writes
        self._commits = commits

    async def seek(self, volume: VolumeState, offset: int, *, data: bool) -> int | None:
        """The first byte from `offset` on that is (not) data, as lseek(2) has it: the end is a hole.

        None (ENXIO) at or beyond the end, and after the last data. A volume that is elsewhere is data throughout.
        """
        while True:
            if volume.gate is Gate.GONE:
                raise NoSuchVolume(f"{volume.name} was deleted")
            size, moves, head = volume.size, volume.gate_changes, volume.head
            if not 0 <= offset < size:
                return None
            if not volume.local or self._full(volume):
                return offset if data else size
            try:
                found = await self._find(volume, offset >> PAGE_SHIFT, data)
            except Damaged:
                if (volume.gate_changes, volume.head) == (moves, head):
                    raise
                continue  # its layers were exchanged meanwhile
            if volume.gate_changes != moves:
                continue
            if found is not None and found << PAGE_SHIFT < size:
                return max(offset, found << PAGE_SHIFT)
            return None if data else size

    def _full(self, volume: VolumeState) -> bool:
        """No page can be a hole: what is often asked of a volume that is, and takes longest to find out."""
        if volume.pending.zeros or (volume.flushing is not None and volume.flushing.zeros):
            return False
        record = volume.record or self._reads.txn.layer(volume.head)
        return record.data_pages == pages_for(volume.size)

    async def _find(self, volume: VolumeState, page: int, data: bool) -> int | None:
        """The first page from `page` on that is (not) data."""
        number, end = page >> LEAF_SHIFT, pages_for(volume.size)
        leaf = self._reads.leaves.get(volume.key | number)
        if leaf is not None:
            base = number << LEAF_SHIFT
            overlay = Overlay(volume.pending, volume.flushing, base, base + LEAF_PAGES)
            found = first_of(overlay.over(number, leaf), data, page & LEAF_MASK)
            if found is not None:
                return base + found
            page = base + LEAF_PAGES
        while page < end:
            overlay = Overlay(volume.pending, volume.flushing, page, end)
            found, page = await self._reads.ask(partial(look, volume.head, overlay, page, end, data))
            if found is not None:
                return found
        return None

    async def allocate(self, volume: VolumeState, offset: int, length: int, *, zero: bool, extend: bool) -> None:
        """fallocate(2) without PUNCH_HOLE: `zero` empties the range, `extend` makes the volume reach its end.

        No space is held for what is allocated: a volume is thin, and its writes are admitted one by one.
        """
        end = offset + length
        if extend and end > volume.size:
            refusal = volume.refusal()
            if refusal is not None:
                raise refusal
            await self._commits.transact(lambda txn: grow(txn, {volume.uuid: end}))
        if zero:
            await self._writes.discard(volume, offset, length)
        else:
            await self._writes.admitted(volume)
