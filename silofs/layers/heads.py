"""Writing to the head of one volume inside a transaction: pages, zeroed ranges, and the counts that follow.

Leaves are loaded, changed and encoded as arrays of many rows, so that the cost of a page is that of its bytes. What a
head's entry referred to before belongs to the head alone, and is given up in the same transaction; what sealed layers
hold is never touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from silofs.blocks import LEAF_MASK, LEAF_PAGES, LEAF_SHIFT, pages_for
from silofs.extents import Extents
from silofs.layers import leaves, schema
from silofs.layers.ahead import Ahead
from silofs.layers.catalog import Volume
from silofs.layers.changes import Numbers
from silofs.layers.native import Source
from silofs.layers.schema import Refs
from silofs.layers.voids import VoidChanges
from silofs.layers.warm import Entry
from silofs.limits import VOID_LEAVES, WRITER_LEAVES

ROWS: Final = 256  # leaves changed at once: 1 MiB a matrix


class HeadWriter:
    """Collects the changes of one volume's head; `finish` writes its volume record."""

    def __init__(self, txn: VoidChanges, volume: Volume) -> None:
        self._txn = txn
        self.volume = volume
        self._head = volume.head
        layer = txn.layer(self._head)
        self._parent = layer.parent
        self._clip = pages_for(layer.clip)
        self.data_pages = volume.data_pages
        self.resolved: dict[int, Refs] = {}  # leaves changed, as they now read
        self._zeroed_left = VOID_LEAVES
        self.stale = Extents()  # leaves changed that are not in `resolved`

    def write(self, numbers: Numbers, source: Source, zero: npt.NDArray[np.bool_]) -> None:
        """Pages with ascending numbers, and their bytes; `zero` says which are all zero."""
        self._put(numbers, self.store(numbers, source, zero))

    def store(self, numbers: Numbers, source: Source, zero: npt.NDArray[np.bool_]) -> Refs:
        """References to such pages, for `refer`."""
        if not zero.any():  # as nearly always
            return self._txn.store_pages(self._head, numbers.tolist(), source)
        refs = np.full(len(numbers), schema.ZERO, np.uint64)
        kept = np.flatnonzero(~zero)
        if len(kept):
            some = Source(source.base, source.at[kept])
            refs[kept] = self._txn.store_pages(self._head, numbers[kept].tolist(), some)
        return refs

    def adopt(self, ahead: Ahead, live: npt.NDArray[np.bool_]) -> Refs:
        """References to what was written ahead, for `refer`; those to pages that are not `live` are void."""
        return self._txn.adopt(self._head, ahead, live)

    def lose(self, numbers: Numbers) -> None:
        """Pages with ascending numbers become LOST: an error until they are overwritten."""
        self._put(numbers, np.full(len(numbers), schema.LOST, np.uint64))

    def refer(self, numbers: Numbers, refs: Refs) -> None:
        """Pages with ascending numbers become ZERO, or what the references are to, which may be given away."""
        self._put(numbers, refs)

    def _put(self, numbers: Numbers, refs: Refs) -> None:
        """New references for pages with ascending numbers. ZERO becomes HOLE where nothing lies below."""
        of_leaf = numbers >> LEAF_SHIFT
        touched, starts = np.unique(of_leaf, return_index=True)
        for at in range(0, len(touched), ROWS):
            some = touched[at : at + ROWS]
            first = int(starts[at])
            end = int(starts[at + ROWS]) if at + ROWS < len(touched) else len(numbers)
            rows = np.searchsorted(some, of_leaf[first:end])
            flat = (rows << LEAF_SHIFT) | (numbers[first:end] & LEAF_MASK)
            # A commit may touch as many leaves as the log has pages, far more than anybody caches.
            keep = len(self._txn.warmed) < WRITER_LEAVES
            if not keep:
                for leaf in some.tolist():
                    self.stale.add(leaf, leaf + 1)
            self._change(some.tolist(), flat, refs[first:end], keep=keep)

    def zero(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Make ranges [first page, end page) zero; they ascend and do not overlap. Whatever their lengths are.

        `VOID_LEAVES` that show anything are changed one by one; what goes beyond becomes void, as far as it is whole.
        """
        rest: list[tuple[int, int]] = []
        for first, end in ranges:
            first_whole, end_whole = (first + LEAF_MASK) >> LEAF_SHIFT, end >> LEAF_SHIFT
            whole = self._txn.count_showing(self._head, first_whole, end_whole) if first_whole < end_whole else 0
            if whole > self._zeroed_left:
                self._void(first_whole, end_whole)
                rest += [(first, first_whole << LEAF_SHIFT), (end_whole << LEAF_SHIFT, end)]
            else:
                self._zeroed_left -= whole
                rest.append((first, end))
        for at in range(0, len(rest), ROWS):
            parts = [part for first, end in rest[at : at + ROWS] for part in self._shown(first, end)]
            if parts:
                numbers = np.concatenate(parts)
                self._put(numbers, np.full(len(numbers), schema.ZERO, np.uint64))

    def _void(self, first_leaf: int, end_leaf: int) -> None:
        self._txn.void(self._head, first_leaf, end_leaf)
        self.stale.add(first_leaf, end_leaf)
        for leaf in [leaf for leaf in self.resolved if first_leaf <= leaf < end_leaf]:
            del self.resolved[leaf]

    def _shown(self, first_page: int, end_page: int) -> list[Numbers]:
        """The pages of a range by leaf, without leaves in which nothing of the chain is."""
        first_leaf, end_leaf = first_page >> LEAF_SHIFT, (end_page + LEAF_MASK) >> LEAF_SHIFT
        if first_page >= end_page:
            return []
        return [
            np.arange(max(first_page, leaf << LEAF_SHIFT), min(end_page, (leaf + 1) << LEAF_SHIFT))
            for leaf in self._txn.chain_leaves(self._head, first_leaf, end_leaf)
        ]

    def _change(self, numbers: list[int], flat: npt.NDArray[Any], refs: Refs, *, keep: bool) -> None:
        """Entries `flat` (row * 512 + page in the leaf, ascending) of some leaves become `refs`."""
        txn, head = self._txn, self._head
        entries = [self._load(leaf) for leaf in numbers]
        own = txn.stack_leaves(head, [entry[0] for entry in entries])
        seen = np.stack([entry[1] for entry in entries]) if self._parent else own
        zeros = refs == schema.ZERO
        if zeros.any():
            refs = refs.copy()
            refs[zeros] = self._zeros(numbers, flat[zeros])
        existed: list[bool] = np.any(own, axis=1).tolist()
        old = own.reshape(-1)[flat]
        before = schema.count_data(seen.reshape(-1)[flat])
        own.reshape(-1)[flat] = refs
        seen.reshape(-1)[flat] = refs
        self.data_pages += schema.count_data(refs) - before
        txn.account(head, (np.array(numbers)[flat >> LEAF_SHIFT] << LEAF_SHIFT) | (flat & LEAF_MASK), old, refs)
        txn.put_leaves(head, numbers, own, existed)
        for row, leaf in enumerate(numbers):
            if keep:
                # Copies: a row of the matrix would keep the whole of it in memory for as long as the row is cached.
                mine = own[row].copy()
                resolved = seen[row].copy() if self._parent else mine
                mine.flags.writeable = resolved.flags.writeable = False
                txn.warmed[head, leaf] = mine, resolved
                self.resolved[leaf] = resolved
            else:
                txn.warmed[head, leaf] = None
                self.resolved.pop(leaf, None)

    def _load(self, leaf: int) -> Entry:
        """(own, resolved) entries of a leaf before the change."""
        entry = self._txn.kept_leaf(self._head, leaf)
        if entry is None:
            own = self._txn.peek_leaf(self._head, leaf)
            if own is leaves.ZEROS and not self._parent:
                entry = leaves.HOLES, leaves.HOLES
            elif self._parent:
                below = self._below(leaf)
                if own is leaves.ZEROS:
                    own = np.where(below != 0, own, np.uint64(schema.HOLE))
                entry = own, np.where(own != 0, own, below)
            else:
                entry = own, own
        return entry

    def _below(self, leaf: int) -> Refs:
        """What shows through holes of the head."""
        if not self._parent:
            return leaves.HOLES
        below = self._txn.resolve(self._parent, leaf)
        visible = self._clip - (leaf << LEAF_SHIFT)
        if visible < LEAF_PAGES:
            below = below.copy()
            below[max(visible, 0) :] = schema.HOLE
        return below

    def _zeros(self, numbers: list[int], flat: npt.NDArray[Any]) -> Refs:
        """For zeroed pages ZERO, or HOLE where below is one."""
        refs = np.zeros(len(flat), np.uint64)
        if self._parent:
            rows = flat >> LEAF_SHIFT
            touched, starts = np.unique(rows, return_index=True)
            edges = [*starts.tolist(), len(flat)]
            for row, start, end in zip(touched.tolist(), edges, edges[1:], strict=False):
                below = self._below(numbers[row])[flat[start:end] & LEAF_MASK]
                refs[start:end] = np.where(below != 0, np.uint64(schema.ZERO), np.uint64(schema.HOLE))
        return refs

    def reference(self, page: int) -> int:
        """The page's resolved reference as of now."""
        return int(self._load(page >> LEAF_SHIFT)[1][page & LEAF_MASK])

    def finish(self, *, less: int = 0, **changes: Any) -> Volume:
        """Write the volume's record with its new count of data pages (`less` those cut off) and `changes`."""
        self.data_pages -= self._txn.take_uncovered(self._head)
        self.volume = msgspec.structs.replace(self.volume, data_pages=self.data_pages - less, **changes)
        self._txn.put_record(schema.VOLUME, self.volume.uuid, self.volume)
        return self.volume
