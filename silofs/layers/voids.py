"""Zeroing ranges of any length at the price of a bit a leaf, and settling later what that left behind.

A leaf that is made void reads as zeros from that transaction on. Its entries stay stored, and what it covered stays
counted in `data_pages`, until it is *settled*: by `Reclaim`, in bounded steps, or by the first write into it. Settling
changes nothing that a reader can see. docs/format.md has the bitmaps and what a crash leaves.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import msgspec
import numpy as np

from silofs.layers import catalog, leaves, presence, schema
from silofs.layers.bitmaps import Bits, mask, popcount
from silofs.layers.changes import Changes, pages_of
from silofs.layers.schema import CHUNK_BYTES, CHUNK_LEAVES, CHUNK_SHIFT, Refs

log = logging.getLogger(__name__)


class VoidChanges(Changes):
    """Makes leaves void, settles them, and makes them ordinary ones again."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._changed_voids: dict[tuple[int, int], bytearray] = {}
        self._uncovered: dict[int, int] = {}  # layer -> data pages that a void of it turned out to have covered

    # Making leaves void

    def void(self, head: int, first: int, end: int) -> None:
        """The leaves [first, end) of a head are zero from now on. Only those that show anything need a bit."""
        total = 0
        for chunk, start, stop in self._chunks(self.chain(head), first, end):
            shown = self._showing(head, chunk) & mask(start, stop)
            count = popcount(shown)
            if count:
                marks = self._marks(head, chunk)
                _set(marks, 0, shown)
                _set(marks, CHUNK_BYTES, shown)
                total += count
        if total:
            self._count_unsettled(head, total)
            self.chill_head(head, first, end)

    def void_holes(self, layer_id: int, first: int, end: int) -> None:
        """Those leaves of [first, end) of which a layer that is being received has no record are zero from now on."""
        for chunk in range(first >> CHUNK_SHIFT, ((end - 1) >> CHUNK_SHIFT) + 1):
            start = chunk << CHUNK_SHIFT
            wanted = mask(max(0, first - start), min(CHUNK_LEAVES, end - start))
            if presence.chunk_sum(self.layer(layer_id).chunks, chunk):
                wanted &= ~np.frombuffer(self._bitmap(layer_id, chunk), np.uint8)
            if wanted.any():
                _set(self._marks(layer_id, chunk), 0, wanted)

    def _marks(self, layer_id: int, chunk: int) -> bytearray:
        """The void record of a chunk, to be changed; `finish` writes it. Damaged when it cannot be read."""
        marks = self._changed_voids.get((layer_id, chunk))
        if marks is None:
            marks = bytearray(self._void_map(layer_id, chunk))
            self._changed_voids[layer_id, chunk] = self._void_maps[layer_id, chunk] = marks
            voids = self.layer(layer_id).voids
            if not presence.chunk_sum(voids, chunk):
                self.change_layer(layer_id, voids=presence.with_chunk(voids, chunk, 1))
        self._forget_chains()
        return marks

    def _count_unsettled(self, layer_id: int, change: int) -> None:
        self.change_layer(layer_id, unsettled=self.layer(layer_id).unsettled + change)
        self.count(unsettled=self.state.unsettled + change)

    # Settling

    def settle_voids(self, layer_id: int, numbers: Sequence[int]) -> None:
        """Give up what unsettled leaves have stored, and note how many data pages they covered.

        With nothing below, such a leaf is an ordinary one without entries afterwards.
        """
        layer = self.layer(layer_id)
        covered, removed = 0, []
        for leaf in numbers:
            own = self.hidden_leaf(layer_id, leaf)
            covered += schema.count_data(self.covered(layer_id, leaf))
            if own is not None:
                self._delete(schema.LEAF, schema.leaf_key(layer_id, leaf))
                self.account(layer_id, pages_of(leaf), own, leaves.HOLES)
                removed.append(leaf)
        self._put_sums(layer_id, dict.fromkeys(removed, 0))
        self._mark(layer_id, removed, False)
        self._clear(layer_id, numbers, whole=not layer.parent)
        self._count_unsettled(layer_id, -len(numbers))
        self._uncovered[layer_id] = self._uncovered.get(layer_id, 0) + covered
        self.layers_changed = self.layers_changed or bool(covered)  # what shows counts looks at them again

    def _clear(self, layer_id: int, numbers: Iterable[int], *, whole: bool) -> None:
        """Clear the bits that say unsettled; with `whole` also those that say void."""
        for leaf in numbers:
            marks = self._marks(layer_id, leaf >> CHUNK_SHIFT)
            at = leaf & (CHUNK_LEAVES - 1)
            for base in (0, CHUNK_BYTES) if whole else (CHUNK_BYTES,):
                marks[base + (at >> 3)] &= ~(1 << (at & 7)) & 0xFF

    def take_uncovered(self, layer_id: int) -> int:
        """Data pages that settling found covered since this was asked last; the caller corrects what counts them."""
        return self._uncovered.pop(layer_id, 0)

    def _correct(self, layer_id: int, count: int) -> None:
        """Take data pages that voids of the layer cover off what has it in its chain, and so counted them."""
        for volume in self.volumes():
            if self._has(volume.head, layer_id):
                changed = msgspec.structs.replace(volume, data_pages=volume.data_pages - count)
                self.put_record(schema.VOLUME, volume.uuid, changed)
            for snapshot in self.snapshots(volume.uuid):
                if self._has(snapshot.layer, layer_id):
                    key = catalog.snapshot_key(volume.uuid, snapshot.name)
                    less = msgspec.structs.replace(snapshot, data_pages=snapshot.data_pages - count)
                    self.put_record(schema.SNAPSHOT, key, less)
        for found in self.layers():
            layer = self.layer(found.id)  # as changed here
            if layer.data_pages != catalog.UNCOUNTED and self._has(layer.id, layer_id):
                self.change_layer(layer.id, data_pages=layer.data_pages - count)

    def _has(self, top: int, layer_id: int) -> bool:
        return any(layer.id == layer_id for layer in self.chain(top))

    # Making them ordinary again

    def put_leaves(self, layer_id: int, numbers: Sequence[int], matrix: Refs, existed: Sequence[bool]) -> None:
        """As for any leaf; a void one becomes an ordinary one by it."""
        if self.layer(layer_id).voids:
            void = {leaf for leaf in numbers if self.is_void(layer_id, leaf)}
            if void:
                self._end_voids(layer_id, sorted(void))
                existed = [there and leaf not in void for leaf, there in zip(numbers, existed, strict=True)]
        super().put_leaves(layer_id, numbers, matrix, existed)

    def _end_voids(self, layer_id: int, numbers: Sequence[int]) -> None:
        unsettled = [leaf for leaf in numbers if any(True for _ in self.unsettled_leaves(layer_id, leaf, leaf + 1))]
        if unsettled:
            self.settle_voids(layer_id, unsettled)
        self._clear(layer_id, numbers, whole=True)

    def end_voids_from(self, layer_id: int, first: int) -> None:
        """No leaf from `first` on is void any more. Work for each that is not settled."""
        unsettled = list(self.unsettled_leaves(layer_id, first))
        if unsettled:
            self.settle_voids(layer_id, unsettled)
        for chunk, start, _ in list(presence.chunks_between(self.layer(layer_id).voids, first, None)):
            marks = self._marks(layer_id, chunk)
            keep = mask(0, start)
            marks[:CHUNK_BYTES] = (np.frombuffer(marks[:CHUNK_BYTES], np.uint8) & keep).tobytes()

    def spell_out(self, layer_id: int, most: int) -> int:
        """Store up to `most` void leaves as leaves of zeros, as a merge needs them; how many."""
        numbers = list(islice(self.void_leaves(layer_id), most))
        if numbers:
            self.put_leaves(layer_id, numbers, np.stack([leaves.ZEROS] * len(numbers)), [False] * len(numbers))
        return len(numbers)

    def forget_voids(self, layer_id: int) -> None:
        """The layer is being removed: what its voids cover is counted by nothing any more."""
        unsettled = self.layer(layer_id).unsettled
        if unsettled:
            self._count_unsettled(layer_id, -unsettled)
        self._uncovered.pop(layer_id, None)

    def drop_layer(self, layer_id: int) -> None:
        for key in [key for key, _ in self.scan(schema.VOID, catalog.layer_key(layer_id))]:
            self._delete(schema.VOID, key)
        for place in [place for place in self._changed_voids if place[0] == layer_id]:
            del self._changed_voids[place]
        super().drop_layer(layer_id)

    def finish(self) -> None:
        for layer_id, count in self._uncovered.items():
            if count:
                self._correct(layer_id, count)
        for (layer_id, chunk), marks in self._changed_voids.items():
            key = schema.leaf_key(layer_id, chunk)
            total = 0
            if any(marks[:CHUNK_BYTES]):
                value = schema.seal_record(schema.VOID, key, bytes(marks))
                self._put(schema.VOID, key, value)
                total = schema.short_sum(value)
            else:
                self._delete(schema.VOID, key)
            self.change_layer(layer_id, voids=presence.with_chunk(self.layer(layer_id).voids, chunk, total))
        super().finish()


def _set(marks: bytearray, base: int, bits: Bits) -> None:
    marks[base : base + CHUNK_BYTES] = (np.frombuffer(marks, np.uint8, CHUNK_BYTES, base) | bits).tobytes()
