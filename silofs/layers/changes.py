"""The ways in which a write transaction changes the map of a layer: leaves, sums, presence, counts. No policy.

Everything that must change together changes here together: a leaf entry with the live bit and back-name of what it
refers to, a leaf with its presence bit, a record with its table's count, all with the layer's counters. Layer records,
bitmaps and live bitmaps are kept back and written once, by `finish`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import lmdb
import msgspec
import numpy as np
import numpy.typing as npt

from silofs.blocks import LEAF_PAGES, LEAF_SHIFT
from silofs.errors import Damaged
from silofs.layers import catalog, leaves, presence, schema
from silofs.layers.catalog import Layer
from silofs.layers.environment import Environment
from silofs.layers.schema import CHUNK_LEAVES, CHUNK_SHIFT, Refs
from silofs.layers.usage import Usage
from silofs.layers.uses import ContainerChanges
from silofs.layers.warm import Entry, WarmLeaves

log = logging.getLogger(__name__)

Numbers = npt.NDArray[np.int64]
_IN_LEAF: Numbers = np.arange(LEAF_PAGES)


class Changes(ContainerChanges):
    """Layers and their leaves; what the writer keeps of them between transactions."""

    def __init__(
        self, environment: Environment, txn: lmdb.Transaction[memoryview], warm: WarmLeaves, usage: Usage
    ) -> None:
        super().__init__(environment, txn)
        self.warm = warm
        self.usage = usage
        self.warmed: dict[tuple[int, int], Entry | None] = {}  # for `warm`, once this is committed; None: forget
        self.chilled: set[int] = set()  # leaves to drop from `warm`, because a layer below a head changed
        self.layers_changed = False  # layers came, went or were put together
        self.succeeded: dict[int, int] = {}  # layer -> the one that took its place
        self._changed_layers: set[int] = set()
        self._changed_bitmaps: dict[tuple[int, int], bytearray] = {}

    # Layers

    def put_layer(self, layer: Layer) -> None:
        """Change a layer's record, or add one; written by `finish`."""
        self._layers[layer.id] = layer
        self._changed_layers.add(layer.id)
        self._forget_chains()

    def change_layer(self, layer_id: int, **changes: Any) -> Layer:
        layer = msgspec.structs.replace(self.layer(layer_id), **changes)
        self.put_layer(layer)
        return layer

    def _forget_chains(self) -> None:
        self._chains.clear()
        self._floor_maps.clear()
        self._stacks.clear()

    def new_layer_id(self) -> int:
        layer_id = self._counters.next_layer
        self.count(next_layer=layer_id + 1)
        return layer_id

    def chill_head(self, head: int, first_leaf: int, end_leaf: int | None = None) -> None:
        """Make the writer forget what it keeps of some leaves of a head."""
        for kept in (*self.warm.leaves_of(head), *(leaf for at, leaf in self.warmed if at == head)):
            if kept >= first_leaf and (end_leaf is None or kept < end_leaf):
                self.warmed[head, kept] = None

    def chill_leaf(self, leaf: int) -> None:
        """Make the writer forget a leaf of every head: a layer below has changed."""
        self.chilled.add(leaf)
        for key in self.warmed:
            if key[1] == leaf:
                self.warmed[key] = None

    def kept_leaf(self, head: int, leaf: int) -> Entry | None:
        """What the writer keeps of a leaf, as of now."""
        if (head, leaf) in self.warmed:
            return self.warmed[head, leaf]
        return None if leaf in self.chilled else self.warm.get(head, leaf)

    # Leaves

    def peek_leaf(self, layer_id: int, leaf: int) -> Refs:
        """The layer's own entries; `leaves.LOST_LEAF` itself when they cannot be read."""
        try:
            own = self.own_leaf(layer_id, leaf)
        except Damaged as error:
            log.error("%s; what is not overwritten of it is lost", error)
            return leaves.LOST_LEAF
        return leaves.HOLES if own is None else own

    def stack_leaves(self, layer_id: int, rows: Sequence[Refs]) -> Refs:
        """Own entries that are about to be changed, as an (n, 512) array. Lost leaves become counted ones."""
        lost = sum(1 for row in rows if row is leaves.LOST_LEAF)
        if lost:
            count = self.layer(layer_id).lost_pages + lost * LEAF_PAGES
            self.change_layer(layer_id, lost_pages=count)
        return np.stack(rows)

    def put_leaves(self, layer_id: int, numbers: Sequence[int], matrix: Refs, existed: Sequence[bool]) -> None:
        """Store the rows of an (n, 512) array as leaves of the layer; rows of holes are removed.

        A leaf has a record exactly when it has an entry: `existed` is what `any` said of the rows before the change.
        """
        payloads = leaves.encode_many(matrix)
        some: list[bool] = np.any(matrix, axis=1).tolist()
        added, removed = [], []
        sums: dict[int, int] = {}
        for leaf, payload, filled, there in zip(numbers, payloads, some, existed, strict=True):
            key = schema.leaf_key(layer_id, leaf)
            if filled:
                value = schema.seal_record(schema.LEAF, key, payload)
                self._put(schema.LEAF, key, value)
                sums[leaf] = schema.short_sum(value)
                if not there:
                    added.append(leaf)
            elif there:
                self._delete(schema.LEAF, key)
                removed.append(leaf)
                sums[leaf] = 0
        self._put_sums(layer_id, sums)
        if added:
            self._mark(layer_id, added, True)
        if removed:
            self._mark(layer_id, removed, False)

    def _put_sums(self, layer_id: int, changed: Mapping[int, int]) -> None:
        """Record the short checksums of changed leaves, 0 of removed ones."""
        groups: dict[int, list[int]] = {}
        for leaf in changed:
            groups.setdefault(leaf >> schema.SUM_SHIFT, []).append(leaf)
        for group, numbers in groups.items():
            key = schema.leaf_key(layer_id, group)
            # A layer's first leaf of a group makes the record; in place of one that cannot be read, leaves that were
            # not changed since are taken as they are.
            known = self._leaf_sums(layer_id, group) if self.fetch(schema.LEAF_SUM, key) is not None else None
            sums = self._sums_of_records(layer_id, group) if known is None else known.copy()
            for leaf in numbers:
                sums[leaf & (schema.SUM_LEAVES - 1)] = changed[leaf]
            self._sums[layer_id, group] = sums
            if sums.any():
                self._put(schema.LEAF_SUM, key, schema.seal_record(schema.LEAF_SUM, key, sums.tobytes()))
            else:
                self._delete(schema.LEAF_SUM, key)

    def _sums_of_records(self, layer_id: int, group: int) -> npt.NDArray[np.uint32]:
        """The short checksums of the records that are there."""
        sums = np.zeros(schema.SUM_LEAVES, "<u4")
        first = group << schema.SUM_SHIFT
        for key, value in self.scan(schema.LEAF, schema.leaf_key(layer_id, first)[:15]):
            sums[key[15]] = schema.short_sum(value)
        return sums

    def _mark(self, layer_id: int, numbers: Iterable[int], present: bool) -> None:
        """Set or clear presence bits, and count."""
        layer = self.layer(layer_id)
        chunks, count = layer.chunks, layer.leaves
        for leaf in numbers:
            chunk, at = leaf >> CHUNK_SHIFT, leaf & (CHUNK_LEAVES - 1)
            bitmap = self._changed_bitmaps.get((layer_id, chunk))
            if bitmap is None:
                if presence.chunk_sum(chunks, chunk):
                    try:
                        bitmap = bytearray(self._bitmap(layer_id, chunk))
                    except Damaged as error:
                        # A guess at the other bits would turn damage into holes. The record stays as it is: its
                        # leaves are found without it, and missing ones are errors.
                        log.error("%s", error)
                        continue
                else:
                    bitmap = bytearray(schema.CHUNK_BYTES)
                    chunks = presence.with_chunk(chunks, chunk, 1)  # `finish` puts the sum of the record
                self._changed_bitmaps[layer_id, chunk] = bitmap
                self._bitmaps[layer_id, chunk] = bitmap
            if present:
                bitmap[at >> 3] |= 1 << (at & 7)
            else:
                bitmap[at >> 3] &= ~(1 << (at & 7)) & 0xFF
            count += 1 if present else -1
        self.change_layer(layer_id, chunks=chunks, leaves=count)

    def account(self, layer_id: int, pages: Numbers, old: Refs, new: Refs, *, handed_over: bool = False) -> None:
        """Count a layer's entries that changed from `old` to `new`, and release what `old` referred to.

        `pages`: their numbers in the layer. All three are flat and of one length. `handed_over`: to another layer's
        entries, so that objects and lone pages stay.
        """
        before = np.bincount(schema.kinds(old).astype(np.intp), minlength=8)
        after = np.bincount(schema.kinds(new).astype(np.intp), minlength=8)
        change = (after - before).tolist()
        own = sum(change[kind] for kind in schema.STORED)
        if own or change[schema.REMOTE] or change[schema.LOST]:
            layer = self.layer(layer_id)
            self.change_layer(
                layer_id,
                own_pages=layer.own_pages + own,
                remote_pages=layer.remote_pages + change[schema.REMOTE],
                lost_pages=layer.lost_pages + change[schema.LOST],
            )
        # First what is needed now: a container must not seem to be of no use in between.
        if after[schema.PACKED]:
            self.refer(layer_id, pages, new, 1)
        if before[schema.PACKED]:
            self.refer(layer_id, pages, old, -1)
        if (before[schema.DATA] or before[schema.LONE]) and not handed_over:
            self.release(old)

    def drop_leaves(self, layer_id: int, most: int) -> bool:
        """Remove up to `most` leaves of a layer, and what only they refer to; whether none is left."""
        found: list[tuple[bytes, Refs]] = []
        for key, value in self._leaf_records(layer_id, most):
            try:
                refs = leaves.decode(schema.open_record(schema.LEAF, key, value))
            except Damaged as error:
                log.error("%s; what it referred to stays on disk", error)
                refs = leaves.HOLES
            found.append((key, refs))
        for key, refs in found:
            self._delete(schema.LEAF, key)
            self.account(layer_id, pages_of(schema.PAIR.unpack(key)[1]), refs, leaves.HOLES)
        numbers = [schema.PAIR.unpack(key)[1] for key, _ in found]
        self._put_sums(layer_id, dict.fromkeys(numbers, 0))
        self._mark(layer_id, numbers, False)
        return len(found) < most

    def _leaf_records(self, layer_id: int, most: int) -> Iterator[tuple[bytes, memoryview]]:
        """The first `most` leaves of a layer as they are stored.

        By its bitmaps: on a look-up LMDB says that a page of its tree is damaged, in a scan it ends the process. By the
        records where a bitmap is damaged, so that such a layer can be removed like any other.
        """
        try:
            numbers = list(islice(self.present_leaves(layer_id), most))
        except Damaged as error:
            if self.spoilt is not None:
                raise
            log.error("%s; the layer's leaves are looked for without", error)
            yield from list(islice(self.scan(schema.LEAF, catalog.layer_key(layer_id)), most))
            return
        for number in numbers:
            key = schema.leaf_key(layer_id, number)
            yield key, self.fetch(schema.LEAF, key) or memoryview(b"")

    def drop_layer(self, layer_id: int) -> None:
        """Remove the records of a layer without leaves."""
        layer = self.layer(layer_id)
        self.layers_changed = True
        for table in (schema.PRESENCE, schema.LEAF_SUM):
            for key in [key for key, _ in self.scan(table, catalog.layer_key(layer_id))]:
                self._delete(table, key)
        self.delete_record(schema.LAYER, catalog.layer_key(layer_id))
        self.delete_record(schema.MERGE, catalog.layer_key(layer_id))
        if layer.uuid:
            self.delete_record(schema.LAYER_UUID, layer.uuid)
        for place in [place for place in self._changed_bitmaps if place[0] == layer_id]:
            del self._changed_bitmaps[place]
        del self._layers[layer_id]
        self._changed_layers.discard(layer_id)
        self._forget_chains()

    # The end

    def finish(self) -> None:
        """Write what was kept back. The last step before the commit."""
        self.settle()
        self.settle_cells()
        for (layer_id, chunk), bitmap in self._changed_bitmaps.items():
            key = schema.leaf_key(layer_id, chunk)
            total = 0
            if any(bitmap):
                value = schema.seal_record(schema.PRESENCE, key, bytes(bitmap))
                self._put(schema.PRESENCE, key, value)
                total = schema.short_sum(value)
            else:
                self._delete(schema.PRESENCE, key)
            self.change_layer(layer_id, chunks=presence.with_chunk(self.layer(layer_id).chunks, chunk, total))
        for layer_id in sorted(self._changed_layers):
            layer = self._layers[layer_id]
            self.put_record(schema.LAYER, catalog.layer_key(layer_id), layer)
        if self.changed:
            self.count(txn=self.txn_id)
            payload = catalog.encode(schema.META, schema.META_STATE, self._counters)
            self._put(schema.META, schema.META_STATE, payload)


def pages_of(leaf: int) -> Numbers:
    """The numbers of a leaf's pages."""
    return _IN_LEAF + (leaf << LEAF_SHIFT)
