"""The ways in which a write transaction changes the store: records, leaves, presence, live counts. No policy.

Everything that must change together changes here together: a leaf entry with the live bit and back-name of what it
refers to, a leaf with its presence bit, a record with its table's count, all with the layer's counters. Layer records,
bitmaps and live bitmaps are kept back and written once, by `finish`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import lmdb
import msgspec
import numpy as np
import numpy.typing as npt

from silofs.blocks import LEAF_PAGES
from silofs.errors import Damaged
from silofs.layers import catalog, leaves, presence, schema
from silofs.layers.catalog import Layer, Record, State
from silofs.layers.environment import Environment
from silofs.layers.reader import ReadTxn
from silofs.layers.schema import CHUNK_LEAVES, CHUNK_SHIFT, Buffer, Refs, Table
from silofs.layers.warm import Entry, WarmLeaves

log = logging.getLogger(__name__)

RELEASED_MAX: Final = 1 << 20  # references whose release may wait in memory
_LIVE_ROW: Final = np.dtype("<u4")


class Changes(ReadTxn):
    """A write transaction. Views from it die with its next change: copy what is kept."""

    def __init__(self, environment: Environment, txn: lmdb.Transaction[memoryview], warm: WarmLeaves) -> None:
        super().__init__(environment, txn)
        self.keys_changed = 0  # puts and deletes so far
        self.warm = warm
        self.warmed: dict[tuple[int, int], Entry | None] = {}  # for `warm`, once this is committed; None: forget
        self.chilled: set[int] = set()  # leaves to drop from `warm`, because a layer below a head changed
        self._counters = super().state
        self._changed_layers: set[int] = set()
        self._changed_bitmaps: dict[tuple[int, int], bytearray] = {}
        self._new_objects: dict[int, int] = {}  # id -> live slots
        self._released: list[Refs] = []
        self._released_count = 0

    def renew(self) -> None:
        raise AssertionError("a write transaction is one function call")

    # Keys

    def _put(self, table: Table, key: bytes, value: Buffer, *, append: bool = False) -> None:
        self.keys_changed += 1
        self._txn.put(key, value, append=append, db=self._environment.tables[table])

    def _delete(self, table: Table, key: bytes) -> bool:
        self.keys_changed += 1
        return self._txn.delete(key, db=self._environment.tables[table])

    # Catalog records

    @property
    def state(self) -> State:
        return self._counters

    def count(self, **changes: Any) -> None:
        """Change the store's counters."""
        self._counters = msgspec.structs.replace(self._counters, **changes)

    def _rows(self, table: Table, change: int) -> None:
        rows = dict(self._counters.rows)
        rows[table.name] = rows.get(table.name, 0) + change
        self.count(rows=rows)
        self._counted.discard(table.name)

    def put_record(self, table: Table, key: bytes, record: Record) -> None:
        """Store a catalog record, new or in place of its older self."""
        value = catalog.encode(table, key, record)
        older = self.fetch(table, key)
        change = schema.stored_sum(value)
        if older is None:
            self._rows(table, 1)
        else:
            change ^= schema.stored_sum(older)
        self.count(catalog=self._counters.catalog ^ change)
        self._put(table, key, value)

    def delete_record(self, table: Table, key: bytes) -> bool:
        """Remove a catalog record; False when there was none."""
        older = self.fetch(table, key)
        if older is None:
            return False
        self.count(catalog=self._counters.catalog ^ schema.stored_sum(older))
        self._rows(table, -1)
        return self._delete(table, key)

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

    def chill_head(self, head: int, first_leaf: int) -> None:
        """Make the writer forget what it keeps of a head from that leaf on."""
        for kept in (*self.warm.leaves_of(head), *(leaf for at, leaf in self.warmed if at == head)):
            if kept >= first_leaf:
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

    def account(self, layer_id: int, old: Refs, new: Refs) -> None:
        """Count a layer's entries that changed from `old` to `new`, and release what `old` referred to."""
        before = np.bincount(schema.kinds(old).ravel().astype(np.intp), minlength=8)
        after = np.bincount(schema.kinds(new).ravel().astype(np.intp), minlength=8)
        change = (after - before).tolist()
        own = change[schema.DATA] + change[schema.LONE]
        if own or change[schema.REMOTE] or change[schema.LOST]:
            layer = self.layer(layer_id)
            self.change_layer(
                layer_id,
                own_pages=layer.own_pages + own,
                remote_pages=layer.remote_pages + change[schema.REMOTE],
                lost_pages=layer.lost_pages + change[schema.LOST],
            )
        if before[schema.DATA] or before[schema.LONE]:
            self._release(old)

    def drop_leaves(self, layer_id: int, most: int) -> bool:
        """Remove up to `most` leaves of a layer, and what only they refer to; whether none is left.

        Goes by the records, not by the bitmaps: a damaged layer can be removed like any other.
        """
        found: list[tuple[bytes, Refs]] = []
        for key, value in self.scan(schema.LEAF, catalog.layer_key(layer_id)):
            if len(found) == most:
                break
            try:
                refs = leaves.decode(schema.open_record(schema.LEAF, key, value))
            except Damaged as error:
                log.error("%s; what it referred to stays on disk", error)
                refs = leaves.HOLES
            found.append((key, refs))
        for key, refs in found:
            self._delete(schema.LEAF, key)
            self.account(layer_id, refs, leaves.HOLES)
        numbers = [schema.PAIR.unpack(key)[1] for key, _ in found]
        self._put_sums(layer_id, dict.fromkeys(numbers, 0))
        self._mark(layer_id, numbers, False)
        return len(found) < most

    def drop_layer(self, layer_id: int) -> None:
        """Remove the records of a layer without leaves."""
        layer = self.layer(layer_id)
        for table in (schema.PRESENCE, schema.LEAF_SUM):
            for key in [key for key, _ in self.scan(table, catalog.layer_key(layer_id))]:
                self._delete(table, key)
        self.delete_record(schema.LAYER, catalog.layer_key(layer_id))
        if layer.uuid:
            self.delete_record(schema.LAYER_UUID, layer.uuid)
        for place in [place for place in self._changed_bitmaps if place[0] == layer_id]:
            del self._changed_bitmaps[place]
        del self._layers[layer_id]
        self._changed_layers.discard(layer_id)
        self._forget_chains()

    # Pages

    def store_pages(self, layer_id: int, pages: Sequence[int], data: Sequence[Buffer]) -> Refs:
        """Pack pages (4096 bytes each, numbers ascending) for a layer; their references, in order.

        The caller puts the references into the layer's leaves in this same transaction.
        """
        count, at = len(pages), 0
        refs = np.empty(count, np.uint64)
        object_id = self._counters.next_object
        while count - at >= schema.OBJECT_PAGES_MIN:
            size = min(schema.OBJECT_PAGES, count - at)
            self._put_object(object_id, layer_id, pages[at : at + size], data[at : at + size])
            first = schema.ref(schema.DATA, object_id)
            refs[at : at + size] = np.arange(first, first + size * schema.SLOT_STEP, schema.SLOT_STEP)
            object_id += 1
            at += size
        for index in range(at, count):
            key = schema.KEY.pack(object_id)
            page = data[index]
            self._put(schema.PAGES, key, page[: schema.LONE_BYTES], append=True)
            self._put(schema.NAME, key, schema.lone_name(key, object_id, layer_id, pages[index], page), append=True)
            refs[index] = schema.ref(schema.LONE, object_id)
            object_id += 1
        assert object_id <= schema.OBJECT_ID_MAX
        self.count(next_object=object_id)
        return refs

    def _put_object(self, object_id: int, layer_id: int, pages: Sequence[int], data: Sequence[Buffer]) -> None:
        key = schema.KEY.pack(object_id)
        sums = [schema.page_sum(page, object_id, slot) for slot, page in enumerate(data)]
        parts = [schema.object_header(object_id, sums), *data]
        if len(data) < schema.OBJECT_PAGES:
            parts.append(bytes((schema.OBJECT_PAGES - len(data)) << 12))
        self._put(schema.OBJECT, key, b"".join(parts), append=True)
        self._put(schema.NAME, key, schema.object_name(key, layer_id, pages), append=True)
        self._new_objects[object_id] = (1 << len(data)) - 1

    def _release(self, refs: Refs) -> None:
        """Give up what leaf entries of this layer referred to; kinds without pages are ignored."""
        kinds = schema.kinds(refs)
        for reference in refs[kinds == schema.LONE].tolist():
            key = schema.KEY.pack(schema.object_of(reference))
            if not (self._delete(schema.PAGES, key) & self._delete(schema.NAME, key)):
                log.error("lone page %d was released and is not whole", schema.object_of(reference))
        packed = refs[kinds == schema.DATA]
        if len(packed):
            self._released.append(packed)
            self._released_count += len(packed)
            if self._released_count > RELEASED_MAX:
                self._settle()

    def _settle(self) -> None:
        """Bring the live bitmaps up to date; remove objects of which nothing is live."""
        ids, cleared = _masks(self._released)
        groups = set((ids >> schema.LIVE_SHIFT).tolist())
        fresh: dict[int, list[tuple[int, int]]] = {}
        for object_id, mask in self._new_objects.items():
            fresh.setdefault(object_id >> schema.LIVE_SHIFT, []).append((object_id & (schema.LIVE_OBJECTS - 1), mask))
        edges = np.searchsorted(ids >> schema.LIVE_SHIFT, sorted(groups | fresh.keys())).tolist() + [len(ids)]
        for number, group in enumerate(sorted(groups | fresh.keys())):
            start, end = edges[number], edges[number + 1]
            self._settle_group(group, fresh.get(group, ()), ids[start:end], cleared[start:end])
        self._new_objects = {}
        self._released = []
        self._released_count = 0

    def _settle_group(
        self, group: int, fresh: Iterable[tuple[int, int]], ids: Refs, cleared: np.ndarray[Any, np.dtype[np.uint32]]
    ) -> None:
        key = schema.KEY.pack(group)
        value = self.fetch(schema.LIVE, key)
        try:
            row = read_live(key, value)
        except Damaged as error:
            log.error("%s; what is released there stays on disk", error)
            if not fresh:
                return
            row = np.zeros(schema.LIVE_OBJECTS, _LIVE_ROW)
        for at, mask in fresh:
            row[at] = mask
        if len(ids):
            at_rows = (ids & (schema.LIVE_OBJECTS - 1)).astype(np.intp)
            before = row[at_rows]
            # An object goes only when its last live slots are given up now. Bits that were not set are damage, and a
            # leak is better than removing what another leaf still needs.
            sound = (before & cleared) == cleared
            if not sound.all():
                log.error("objects %s: slots were released that are not live", ids[~sound].tolist()[:8])
            row[at_rows] = np.where(sound, before & ~cleared, before)
            for object_id in ids[sound & (row[at_rows] == 0)].tolist():
                object_key = schema.KEY.pack(object_id)
                self._delete(schema.OBJECT, object_key)
                self._delete(schema.NAME, object_key)
        if row.any():
            self._put(schema.LIVE, key, schema.seal_record(schema.LIVE, key, row.tobytes()))
        elif value is not None:
            self._delete(schema.LIVE, key)

    # The end

    def finish(self) -> None:
        """Write what was kept back. The last step before the commit."""
        if self._new_objects or self._released:
            self._settle()
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
        if self.keys_changed:
            self.count(txn=self.txn_id)
            payload = catalog.encode(schema.META, schema.META_STATE, self._counters)
            self._put(schema.META, schema.META_STATE, payload)


def read_live(key: bytes, value: Buffer | None) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """A copy of a group's 256 bitmaps, zeros when there is no record."""
    if value is None:
        return np.zeros(schema.LIVE_OBJECTS, _LIVE_ROW)
    payload = schema.open_record(schema.LIVE, key, value)
    if len(payload) != schema.LIVE_OBJECTS * _LIVE_ROW.itemsize:
        raise Damaged(f"live bitmaps {key.hex()} have a wrong length")
    return np.frombuffer(payload, _LIVE_ROW).copy()


def _masks(released: list[Refs]) -> tuple[Refs, np.ndarray[Any, np.dtype[np.uint32]]]:
    """(object ids, ascending; the slots given up of each)."""
    if not released:
        return np.zeros(0, np.uint64), np.zeros(0, np.uint32)
    refs = np.sort(np.concatenate(released))
    ids = refs >> np.uint64(schema.OBJECT_SHIFT)
    slots = (refs >> np.uint64(schema.SLOT_SHIFT)) & np.uint64(schema.SLOT_MASK)
    masks = np.left_shift(np.uint32(1), slots.astype(np.uint32))
    starts = np.flatnonzero(np.diff(ids, prepend=ids[0] + 1))
    return ids[starts], np.bitwise_or.reduceat(masks, starts)
