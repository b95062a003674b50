"""Pages of a write transaction: packed into objects, and given up slot by slot.

An object never changes. What of it is in use is a bit for each slot in its group's record; these are kept back and
brought up to date by `settle`, many objects at a time, which also removes those that nothing uses any more.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Final

import lmdb
import numpy as np
import numpy.typing as npt

from silofs.errors import Damaged
from silofs.layers import schema
from silofs.layers.ahead import Ahead
from silofs.layers.cell_changes import CellChanges
from silofs.layers.environment import Environment
from silofs.layers.native import Source, build_objects
from silofs.layers.schema import Buffer, Refs, Table

log = logging.getLogger(__name__)

RELEASED_MAX: Final = 1 << 20  # references whose release may wait in memory
OBJECTS_AT_ONCE: Final = 8  # put together before they are stored: 1 MiB
_LIVE_ROW: Final = np.dtype("<u4")
_FULL: Final = (1 << schema.OBJECT_PAGES) - 1

Masks = npt.NDArray[np.uint32]


class ObjectChanges(CellChanges):
    """Stores pages and releases them."""

    def __init__(self, environment: Environment, txn: lmdb.Transaction[memoryview]) -> None:
        super().__init__(environment, txn)
        self._new_objects: dict[int, int] = {}  # id -> live slots
        self._released: list[Refs] = []
        self._released_count = 0
        self.settled: dict[int, tuple[int, int]] = {}  # group of object ids -> (objects, live slots), as changed

    def store_pages(self, layer_id: int, pages: Sequence[int], source: Source) -> Refs:
        """Pack pages (numbers ascending) for a layer; their references, in order.

        The caller puts the references into the layer's leaves in this same transaction.
        """
        count = len(pages)
        rest = count % schema.OBJECT_PAGES
        packed = count if rest >= schema.OBJECT_PAGES_MIN else count - rest
        refs = np.empty(count, np.uint64)
        refs[:packed] = self._put_objects(layer_id, pages[:packed], Source(source.base, source.at[:packed]))
        object_id = self.take_ids(count - packed) if packed < count else 0
        for index in range(packed, count):
            key = schema.KEY.pack(object_id)
            page = source.page(index)
            self._put(schema.PAGES, key, page[: schema.LONE_BYTES], append=True)
            self._put(schema.NAME, key, schema.lone_name(key, object_id, layer_id, pages[index], page), append=True)
            refs[index] = schema.ref(schema.LONE, object_id)
            object_id += 1
        return refs

    def store_mixed(self, places: Sequence[tuple[int, int]], source: Source) -> Refs:
        """Pack pages of any layers, by (layer, page), into whole objects; the last one may have free slots."""
        return self._put_objects([layer for layer, _ in places], [page for _, page in places], source)

    def _put_objects(self, layers: int | Sequence[int], pages: Sequence[int], source: Source) -> Refs:
        """Store pages of one layer, or with a layer for each, 31 to an object; their references."""
        count = -(-len(pages) // schema.OBJECT_PAGES)
        first_id = self.take_ids(count)
        end_id = first_id + count
        in_cells = self._put_in_cells(first_id, source)
        inline = Source(source.base, source.at[in_cells * schema.OBJECT_PAGES :])
        self._put_in_lmdb(first_id + in_cells, inline)
        self._append(schema.NAME, schema.object_names(first_id, layers, pages))
        self._new_objects.update(dict.fromkeys(range(first_id, end_id), _FULL))
        if rest := len(pages) % schema.OBJECT_PAGES:
            self._new_objects[end_id - 1] = (1 << rest) - 1
        return schema.object_refs(first_id, len(pages))

    def adopt(self, layer_id: int, ahead: Ahead, live: npt.NDArray[np.bool_]) -> Refs:
        """Let what was written ahead be objects of a layer; references to its pages. Those not `live` are void."""
        slots = np.zeros(len(ahead.cells) * schema.OBJECT_PAGES, np.uint32)
        slots[: len(live)] = live
        masks = (
            (slots.reshape(-1, schema.OBJECT_PAGES) << np.arange(schema.OBJECT_PAGES, dtype=np.uint32)).sum(1).tolist()
        )
        self._adopt_cells(ahead, [mask != 0 for mask in masks])
        names = schema.object_names(ahead.first_id, layer_id, ahead.pages.tolist())
        self._store(schema.NAME, [name for name, mask in zip(names, masks, strict=True) if mask], ahead.first_id)
        self._new_objects.update({ahead.first_id + at: mask for at, mask in enumerate(masks) if mask})
        self.count(next_object=max(self._counters.next_object, ahead.first_id + len(masks)))
        return schema.object_refs(ahead.first_id, len(ahead.pages))

    def _put_in_lmdb(self, object_id: int, source: Source) -> None:
        """Store objects as records, some at a time."""
        step = OBJECTS_AT_ONCE * schema.OBJECT_PAGES
        values = bytearray(min(OBJECTS_AT_ONCE, -(-len(source.at) // schema.OBJECT_PAGES)) * schema.OBJECT_BYTES)
        with memoryview(values) as built:
            for batch in range(0, len(source.at), step):
                some = Source(source.base, source.at[batch : batch + step])
                build_objects(values, object_id, some)
                for number in range(-(-len(some.at) // schema.OBJECT_PAGES)):
                    value = built[number * schema.OBJECT_BYTES : (number + 1) * schema.OBJECT_BYTES]
                    self._put(schema.OBJECT, schema.KEY.pack(object_id), value, append=True)
                    object_id += 1

    def rehome(self, layer_id: int, pages: Sequence[int], refs: Refs) -> None:
        """Objects and lone pages are from now on those of a layer's entries; other kinds are ignored."""
        kinds = schema.kinds(refs)
        by_object: dict[int, list[tuple[int, int]]] = {}
        for at in np.flatnonzero((kinds == schema.DATA) | (kinds == schema.LONE)).tolist():
            reference = int(refs[at])
            by_object.setdefault(schema.object_of(reference), []).append((schema.slot_of(reference), pages[at]))
        for object_id, slots in by_object.items():
            key = schema.KEY.pack(object_id)
            name = self.fetch(schema.NAME, key)
            if name is None:
                raise Damaged(f"object {object_id} has no name record")
            self._put(schema.NAME, key, schema.renamed(key, name, layer_id, slots))

    def release(self, refs: Refs) -> None:
        """Give up what leaf entries of this layer referred to; kinds without pages are ignored."""
        kinds = schema.kinds(refs)
        for reference in refs[kinds == schema.LONE].tolist():
            key = schema.KEY.pack(schema.object_of(reference))
            if not (self._remove(schema.PAGES, key) & self._remove(schema.NAME, key)):
                log.error("lone page %d was released and is not whole", schema.object_of(reference))
        packed = refs[kinds == schema.DATA]
        if len(packed):
            self._released.append(packed)
            self._released_count += len(packed)
            if self._released_count > RELEASED_MAX:
                ObjectChanges.settle(self)  # not what others keep back: they may be half way through a change

    def _remove(self, table: Table, key: bytes) -> bool:
        """Remove what nothing refers to any more; what the medium cannot give stays where it is."""
        try:
            return self._remove_object(key) if table is schema.OBJECT else self._delete(table, key)
        except Damaged as error:
            log.error("%s; it keeps its space", error)
            return True

    def settle(self) -> None:
        """Bring the live bitmaps up to date; remove objects of which nothing is live."""
        if not self._new_objects and not self._released:
            return
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
        self, group: int, fresh: Iterable[tuple[int, int]], ids: Refs, cleared: Masks
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
                self._remove(schema.OBJECT, object_key)
                self._remove(schema.NAME, object_key)
        self.settled[group] = tally(row)
        if row.any():
            self._put(schema.LIVE, key, schema.seal_record(schema.LIVE, key, row.tobytes()))
        elif value is not None:
            self._delete(schema.LIVE, key)


def tally(row: Masks) -> tuple[int, int]:
    """(objects that have live slots, live slots) of a group."""
    return int(np.count_nonzero(row)), int.from_bytes(row.tobytes(), "little").bit_count()


def read_live(key: bytes, value: Buffer | None) -> Masks:
    """A copy of a group's 256 bitmaps, zeros when there is no record."""
    if value is None:
        return np.zeros(schema.LIVE_OBJECTS, _LIVE_ROW)
    payload = schema.open_record(schema.LIVE, key, value)
    if len(payload) != schema.LIVE_OBJECTS * _LIVE_ROW.itemsize:
        raise Damaged(f"live bitmaps {key.hex()} have a wrong length")
    return np.frombuffer(payload, _LIVE_ROW).copy()


def _masks(released: list[Refs]) -> tuple[Refs, Masks]:
    """(object ids, ascending; the slots given up of each)."""
    if not released:
        return np.zeros(0, np.uint64), np.zeros(0, np.uint32)
    refs = np.sort(np.concatenate(released))
    ids = refs >> np.uint64(schema.OBJECT_SHIFT)
    slots = (refs >> np.uint64(schema.SLOT_SHIFT)) & np.uint64(schema.SLOT_MASK)
    masks = np.left_shift(np.uint32(1), slots.astype(np.uint32))
    starts = np.flatnonzero(np.diff(ids, prepend=ids[0] + 1))
    return ids[starts], np.bitwise_or.reduceat(masks, starts)
