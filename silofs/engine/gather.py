"""Reads of what is in memory. Nothing in here awaits.

A read builds its answer from what is at hand at this moment, in one step, and notes what was missing. The slow path
(reads.py) gets what was missing and gathers anew, from the state of *then*; what it got is kept by reference
(references are never reused and what they name is immutable), so that nothing old can slip in under something new: a
commit that landed meanwhile has changed the references.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from silofs.blocks import LEAF_BYTES, LEAF_MASK, LEAF_SHIFT, PAGE, PAGE_SHIFT, ZERO_PAGE
from silofs.cache.lru import LRU
from silofs.engine.volume import VolumeState
from silofs.engine.warm import Warm
from silofs.errors import Damaged
from silofs.layers.pending import ZERO as PENDING_ZERO
from silofs.layers.pending import Buffer, Patch
from silofs.layers.reader import ReadTxn
from silofs.layers.schema import (
    DATA,
    KIND_MASK,
    LOST,
    OBJECT_SHIFT,
    PACKED,
    REMOTE,
    SLOT_STEP,
    STORED,
    ZERO,
    Refs,
)
from silofs.limits import RESOLVED_LEAVES

ZEROS = memoryview(bytes(LEAF_BYTES))
_REPEAT = np.uint64(0)
_STEP = np.uint64(SLOT_STEP)


class Wanted:
    """What one read has got hold of so far, and what it still misses."""

    __slots__ = ("absent", "cold", "end", "first", "fresh", "gone", "got", "leaves", "remote")

    def __init__(self, offset: int, length: int) -> None:
        self.first = offset >> PAGE_SHIFT
        self.end = (offset + length + PAGE - 1) >> PAGE_SHIFT
        self.got: dict[int, bytes] = {}  # by reference
        self.remote: dict[tuple[int, int], bytes] = {}  # by (layer, page)
        self.leaves: set[int] = set()  # not resolved
        self.cold: list[tuple[int, int]] = []  # (page, reference) to be read by a thread
        self.absent: list[tuple[int, int]] = []  # (layer, page) at a peer
        self.fresh: set[int] = set()  # leaves to be resolved, or resolved, in a transaction begun for this read
        self.gone: set[int] = set()  # pages whose reference named nothing: a second time is damage

    def clear(self) -> None:
        self.leaves.clear()
        self.cold.clear()
        self.absent.clear()


class Gatherer:
    """Answers from resolved leaves, warm objects and the ring. `txn` is the loop's snapshot of the store."""

    def __init__(self, txn: ReadTxn, ring: memoryview) -> None:
        self.txn = txn
        self._ring = ring
        self.warm = Warm(txn)
        self.leaves: LRU[int, Refs] = LRU(RESOLVED_LEAVES)
        self._young = self.leaves.young

    # The hot path

    def read_now(self, volume: VolumeState, offset: int, length: int) -> Buffer | None:
        """The bytes if all of them are at hand, else None: await `read`. Valid until the caller's next await."""
        if length == PAGE and not offset & (PAGE - 1) and volume.local and offset + PAGE <= volume.size:
            page = offset >> PAGE_SHIFT
            if page not in volume.pending.pages and not volume.overlaid:
                leaf = self._young.get(volume.key | page >> LEAF_SHIFT)
                if leaf is not None:
                    ref = leaf.item(page & LEAF_MASK)
                    if ref & KIND_MASK == DATA:
                        return self.warm.page(ref)
                    if ref <= ZERO:
                        return ZERO_PAGE
            return self._page(volume, page, None)
        if not volume.local:
            return None
        return self.gather(volume, offset, length, None)

    # Gathering: no await in here

    def gather(self, volume: VolumeState, offset: int, length: int, wanted: Wanted | None) -> Buffer | None:
        """The bytes of a range clamped to the volume's end; None when some are missing, and `wanted` is told which."""
        length = min(length, volume.size - offset)
        if length <= 0:
            return b""
        first, end = offset >> PAGE_SHIFT, (offset + length + PAGE - 1) >> PAGE_SHIFT
        parts: list[Buffer] = []
        whole = True
        page = first
        while page < end:
            stop = min(end, (page | LEAF_MASK) + 1)
            if not self._segment(volume, page, stop, parts, wanted):
                if wanted is None:
                    return None
                whole = False
            page = stop
        if not whole:
            return None
        joined = parts[0] if len(parts) == 1 else b"".join(parts)
        if len(joined) == length:
            return joined
        skip = offset - (first << PAGE_SHIFT)
        return memoryview(joined)[skip : skip + length]

    def _segment(self, volume: VolumeState, page: int, stop: int, parts: list[Buffer], wanted: Wanted | None) -> bool:
        """Append the pages [page, stop) of one leaf; False when some are missing."""
        pending = volume.pending.pages
        if not volume.overlaid:
            if not pending:
                return self._stored(volume, page, stop, parts, wanted)
            entries = list(map(pending.get, range(page, stop)))
        else:
            lookup = volume.lookup
            entries = [lookup(each) for each in range(page, stop)]
        whole = True
        at, count = 0, stop - page
        while at < count:
            entry = entries[at]
            end = at + 1
            if entry is None:
                while end < count and entries[end] is None:
                    end += 1
                whole &= self._stored(volume, page + at, page + end, parts, wanted)
            elif isinstance(entry, Patch):
                merged = self._page(volume, page + at, wanted)
                if merged is None:
                    whole = False
                else:
                    parts.append(merged)
            elif entry == PENDING_ZERO:
                while end < count and entries[end] == PENDING_ZERO:
                    end += 1
                parts.append(ZEROS[: (end - at) << PAGE_SHIFT])
            else:
                # A long write lies in one piece in the ring.
                while end < count and entries[end] == entry + ((end - at) << PAGE_SHIFT):
                    end += 1
                parts.append(self._ring[entry : entry + ((end - at) << PAGE_SHIFT)])
            at = end
            if not whole and wanted is None:
                return False
        return whole

    def _stored(self, volume: VolumeState, page: int, stop: int, parts: list[Buffer], wanted: Wanted | None) -> bool:
        """Append pages of one leaf as the store has them; False when some are missing."""
        if stop - page == 1:
            single = self._stored_page(volume, page, wanted)
            if single is None:
                return False
            parts.append(single)
            return True
        leaf = self._leaf(volume, page >> LEAF_SHIFT, wanted)
        if leaf is None:
            return False
        refs = leaf[page & LEAF_MASK : (page & LEAF_MASK) + stop - page]
        if not refs.any():
            parts.append(ZEROS[: (stop - page) << PAGE_SHIFT])
            return True
        whole = True
        # Runs: slots of one object count up, every other kind repeats.
        steps = np.diff(refs)
        starts = [0, *(np.flatnonzero((steps != _STEP) & (steps != _REPEAT)) + 1).tolist(), stop - page]
        for at, end in pairwise(starts):
            ref = refs.item(at)
            if ref <= ZERO:
                parts.append(ZEROS[: (end - at) << PAGE_SHIFT])
                continue
            run: Buffer | None = None
            if ref & KIND_MASK == DATA:
                run = self.warm.run(ref, end - at)
            elif ref & KIND_MASK == PACKED:
                run = self.warm.packed_run(ref, end - at)
            if run is not None:
                parts.append(run)
                continue
            for each in range(at, end):
                single = self._stored_page(volume, page + each, wanted)
                if single is None:
                    if wanted is None:
                        return False
                    whole = False
                else:
                    parts.append(single)
        return whole

    def _leaf(self, volume: VolumeState, number: int, wanted: Wanted | None) -> Refs | None:
        leaf = self.leaves.get(volume.key | number)
        if leaf is None and wanted is not None:
            wanted.leaves.add(number)
        return leaf

    def _page(self, volume: VolumeState, page: int, wanted: Wanted | None) -> Buffer | None:
        """One page with all that is pending over it."""
        return self._over(volume, page, None) or self._over(volume, page, self._stored_page(volume, page, wanted))

    def _over(self, volume: VolumeState, page: int, stored: Buffer | None) -> Buffer | None:
        """`stored` beneath what is being committed beneath what is pending; None when it takes a `stored` to tell."""
        base = stored
        if volume.flushing is not None:
            base = self._apply(volume.flushing.lookup(page), base)
        return self._apply(volume.pending.lookup(page), base)

    def _apply(self, entry: int | Patch | None, base: Buffer | None) -> Buffer | None:
        if entry is None:
            return base
        if isinstance(entry, Patch):
            if base is not None or entry.complete:
                return entry.render(self._ring, base)
            return None
        return ZERO_PAGE if entry == PENDING_ZERO else self._ring[entry : entry + PAGE]

    def _stored_page(self, volume: VolumeState, page: int, wanted: Wanted | None) -> Buffer | None:
        """One page as the store has it."""
        leaf = self._leaf(volume, page >> LEAF_SHIFT, wanted)
        if leaf is None:
            return None
        ref = leaf.item(page & LEAF_MASK)
        kind = ref & KIND_MASK
        if ref <= ZERO:
            return ZERO_PAGE
        if kind in STORED:
            data: Buffer | None = self.warm.page(ref)
            if data is None and wanted is not None:
                data = wanted.got.get(ref)
                if data is None:
                    wanted.cold.append((page, ref))
            return data
        if kind == LOST:
            raise Damaged(f"page {page} of {volume.name} was damaged and is lost until it is overwritten")
        if wanted is None:
            return None
        layer_id = ref >> OBJECT_SHIFT
        data = wanted.remote.get((layer_id, page))
        if data is None:
            wanted.absent.append((layer_id, page))
        return data

    def page_state(self, volume: VolumeState, page: int, wanted: Wanted) -> bytes | None:
        """For a write of part of a page: the page's bytes if it is still at a peer, and b"" if it is here.

        None when that is not known or the page has not come yet; `wanted` is told.
        """
        if self._over(volume, page, None) is not None:
            return b""
        leaf = self._leaf(volume, page >> LEAF_SHIFT, wanted)
        if leaf is None:
            return None
        ref = leaf.item(page & LEAF_MASK)
        if ref & KIND_MASK != REMOTE:
            return b""
        stored = self._stored_page(volume, page, wanted)
        return None if stored is None else bytes(stored)

    def buffered_pages(self, volume: VolumeState) -> int:
        """By how many data pages the store will differ once what is pending is in it, as far as the caches tell."""
        pages = set(volume.pending.pages)
        zeros = [volume.pending.zeros]
        if volume.flushing is not None:
            pages |= {page for page in volume.flushing.pages if volume.pending.lookup(page) != PENDING_ZERO}
            zeros.append(volume.flushing.zeros)
        change = 0
        for page in pages:
            leaf = self.leaves.get(volume.key | page >> LEAF_SHIFT)
            change += leaf is None or leaf.item(page & LEAF_MASK) <= ZERO
        for first, end in (span for ranges in zeros for span in ranges):
            for number in range(
                first >> LEAF_SHIFT, min((end + LEAF_MASK) >> LEAF_SHIFT, (first >> LEAF_SHIFT) + 4096)
            ):
                leaf = self.leaves.get(volume.key | number)
                if leaf is not None:
                    base = number << LEAF_SHIFT
                    held = np.flatnonzero(leaf[max(first - base, 0) : max(end - base, 0)] > ZERO) + max(base, first)
                    change -= sum(page not in pages for page in held.tolist())
        return change
