"""A snapshot of the store, read-only.

A `ReadTxn` sees the store as of one transaction, until `renew`. What it returns as memoryviews lies in the map and
is valid only while the transaction lives: use it before the next `renew` or `close`. Any thread may have one, one
thread at a time.
"""

from __future__ import annotations

import logging
from typing import Final

import numpy as np
import numpy.typing as npt

from silofs.blocks import LEAF_PAGES, LEAF_SHIFT, PAGE, ZERO_PAGE, pages_for
from silofs.errors import Damaged, ObjectMissing
from silofs.extents import Extents
from silofs.layers import containers, leaves, presence, schema
from silofs.layers.bitmaps import BitmapReader
from silofs.layers.catalog import Layer, Pin, layer_key
from silofs.layers.containers import read_places
from silofs.layers.digest import Segment, leaf_digest
from silofs.layers.schema import CHUNK_LEAVES, CHUNK_SHIFT, Refs
from silofs.layers.unpacked import UnpackedBlocks
from silofs.layers.use_records import Use, read_use

log = logging.getLogger(__name__)

ZERO_BLOCK: Final = bytes(64 * 4096)


class ReadTxn(BitmapReader):
    """Catalog, maps and pages as of one transaction."""

    # Maps

    def own_leaf(self, layer_id: int, leaf: int) -> Refs | None:
        """The layer's own entries of a leaf, None when it has none. Damaged when that cannot be told."""
        if self.is_void(layer_id, leaf):
            return leaves.ZEROS
        chunk = leaf >> CHUNK_SHIFT
        if not presence.chunk_sum(self.layer(layer_id).chunks, chunk):
            return None
        try:
            if not presence.has(self._bitmap(layer_id, chunk), leaf & (CHUNK_LEAVES - 1)):
                return None
        except Damaged:
            # Without its bitmap a leaf that is found is still good: it is bound to its place. One that is not, is lost.
            pass
        return self._stored_leaf(layer_id, leaf)

    def _stored_leaf(self, layer_id: int, leaf: int) -> Refs:
        """The leaf's record, which must be there."""
        key = schema.leaf_key(layer_id, leaf)
        value = self.fetch(schema.LEAF, key)
        if value is None:
            raise Damaged(f"leaf {leaf} of layer {layer_id} is missing")
        payload = schema.open_record(schema.LEAF, key, value)
        sums = self._leaf_sums(layer_id, leaf >> schema.SUM_SHIFT)
        if sums is not None and int(sums[leaf & (schema.SUM_LEAVES - 1)]) != schema.short_sum(value):
            raise Damaged(f"leaf {leaf} of layer {layer_id} is an older one")
        return leaves.decode(payload)

    def _leaf_sums(self, layer_id: int, group: int) -> npt.NDArray[np.uint32] | None:
        """Short checksums of 256 leaves; None when they cannot be read, and leaves must do with their own checksum."""
        place = layer_id, group
        if place not in self._sums:
            key = schema.leaf_key(layer_id, group)
            self._sums[place] = None
            try:
                value = self.fetch(schema.LEAF_SUM, key)
                if value is None:
                    raise Damaged(f"leaf sums {group} of layer {layer_id} are missing")
                self._sums[place] = np.frombuffer(bytes(schema.open_record(schema.LEAF_SUM, key, value)), "<u4")
            except Damaged as error:
                log.error("%s; its leaves are checked without", error)
        return self._sums[place]

    def hidden_leaf(self, layer_id: int, leaf: int) -> Refs | None:
        """The entries that are stored under a void of the layer, if any; holes when they cannot be read."""
        try:
            return self._stored_leaf(layer_id, leaf) if self._is_present(layer_id, leaf) else None
        except Damaged as error:
            if self.spoilt is not None:
                raise
            log.error("%s; what it referred to stays on disk", error)
            return leaves.HOLES

    def covered(self, layer_id: int, leaf: int) -> Refs:
        """What a void leaf would show if it were none."""
        layer, own = self.layer(layer_id), self.hidden_leaf(layer_id, leaf)
        seen = leaves.HOLES if own is None else own
        if layer.parent:
            below = self.resolve(layer.parent, leaf).copy()
            below[max(0, pages_for(layer.clip) - (leaf << LEAF_SHIFT)) :] = schema.HOLE
            seen = np.where(seen != 0, seen, below)
        return seen

    def _leaf_or_lost(self, layer_id: int, leaf: int) -> Refs:
        """A leaf that is present or void, every page LOST when it cannot be read."""
        try:
            return leaves.ZEROS if self.is_void(layer_id, leaf) else self._stored_leaf(layer_id, leaf)
        except Damaged as error:
            if self.spoilt is not None:
                raise  # a sound leaf looks no better from here
            log.error("%s; pages %d to %d are lost there", error, leaf * LEAF_PAGES, (leaf + 1) * LEAF_PAGES - 1)
            return leaves.LOST_LEAF

    def resolve(self, layer_id: int, leaf: int, *, above: int = 0) -> Refs:
        """The leaf as a reader of that layer sees it: u64[512], the chain merged from the top, not to be changed.

        `above` stops before that layer of the chain: a slice, in which HOLE means "as below the slice". Pages that an
        unreadable leaf leaves undecided are LOST.
        """
        merged: Refs | None = None
        for layer in self._having(layer_id, leaf):
            if above and layer.depth <= self.layer(above).depth:
                break
            own = self._leaf_or_lost(layer.id, leaf)
            visible = self._floor(layer_id, layer) - leaf * LEAF_PAGES
            if visible < LEAF_PAGES:
                if visible <= 0:
                    break
                own = own.copy()
                own[visible:] = schema.HOLE
            merged = own if merged is None else np.where(merged != 0, merged, own)
            if merged.all():
                break
        if merged is None:
            return leaves.HOLES
        merged.flags.writeable = False
        return merged

    def _floor(self, layer_id: int, below: Layer) -> int:
        """The first page of `below` that the layers of the chain above it hide by their clip."""
        return self._floors(layer_id)[below.id]

    def missing(self, layer_id: int, first_leaf: int = 0, end_leaf: int | None = None) -> Extents:
        """The pages of the layer that are still at a peer. Nothing is read when the layer's count says none."""
        pages = Extents()
        if self.layer(layer_id).remote_pages:
            for leaf in self.present_leaves(layer_id, first_leaf, end_leaf):
                remote = schema.kinds(self._stored_leaf(layer_id, leaf)) == schema.REMOTE
                edges = np.flatnonzero(np.diff(remote, prepend=False, append=False)).tolist()
                for start, stop in zip(edges[::2], edges[1::2], strict=True):
                    pages.add((leaf << LEAF_SHIFT) + start, (leaf << LEAF_SHIFT) + stop)
        return pages

    # Pages

    def page(self, ref: int) -> memoryview | bytes:
        """The 4096 bytes of one reference, verified. A REMOTE one has no bytes here: asking is a bug."""
        kind = ref & schema.KIND_MASK
        if kind == schema.DATA:
            object_id = ref >> schema.OBJECT_SHIFT
            return schema.object_page(object_id, ref >> schema.SLOT_SHIFT & schema.SLOT_MASK, self.object(object_id))
        if kind <= schema.ZERO:
            return ZERO_PAGE
        if kind == schema.LONE:
            object_id = ref >> schema.OBJECT_SHIFT
            key = schema.KEY.pack(object_id)
            value, name = self.fetch(schema.PAGES, key), self.fetch(schema.NAME, key)
            if value is None or name is None:
                raise ObjectMissing(f"lone page {object_id} is missing")
            return schema.lone_page(key, object_id, value, name)
        if kind == schema.PACKED:
            return self.packed(ref)
        if kind == schema.LOST:
            raise Damaged("the page was damaged and is lost until it is overwritten")
        raise AssertionError(f"reference {ref:#x} has no page here")

    def packed(self, ref: int, count: int = 1) -> memoryview:
        """Consecutive pages of one block, verified. The block is unpacked once and kept for the pages around them."""
        container_id, slot = ref >> schema.OBJECT_SHIFT, schema.slot_of(ref)
        unpacked = self._environment.unpacked.get(container_id, slot)
        if unpacked is None:
            value = self.container(container_id)
            number = slot >> containers.BLOCK_SHIFT
            found = containers.entry(container_id, number, value)
            if found.codec == containers.RAW:
                return containers.raw_pages(container_id, slot, count, found, value)
            unpacked = found.pages, containers.plain_pages(container_id, number, found, value)
            self._environment.unpacked.put(container_id, slot, unpacked)
        return containers.cut(container_id, slot, count, unpacked)

    @property
    def unpacked(self) -> UnpackedBlocks:
        """The blocks that `packed` keeps, those of other transactions as well."""
        return self._environment.unpacked

    def container(self, container_id: int) -> memoryview:
        """A container's whole value, not verified. ObjectMissing."""
        value = self.fetch(schema.CONTAINER, schema.KEY.pack(container_id))
        if value is None:
            raise ObjectMissing(f"container {container_id} is missing")
        return value

    def use(self, container_id: int) -> Use:
        """Who refers to a container. Damaged."""
        key = schema.KEY.pack(container_id)
        return read_use(key, self.fetch(schema.USE, key))

    def look_up(self, digest: bytes, pages: int) -> list[tuple[int, int, int]] | None:
        """(container, block in it, mask) of the pieces of a block that is stored here already, and may be referred to.

        The index is advice: only what a sound header confirms counts. None when there is no such block.
        """
        value = self.fetch(schema.BLOCK, digest)
        if value is None:
            return None
        found, seen = [], 0
        try:
            for container_id, number in read_places(digest, value):
                part = containers.entry(container_id, number, self.container(container_id))
                if part.hash != digest:
                    raise Damaged(f"block {number} of container {container_id} is another than the index says")
                if not self.use(container_id).offered(number):
                    return None
                found.append((container_id, number, part.pages))
                seen |= part.pages
        except (Damaged, ObjectMissing) as error:
            log.error("%s", error)
            return None
        return found if seen == pages else None

    def object(self, object_id: int) -> memoryview:
        """An object's whole value, not verified: schema.object_page does that for a page. ObjectMissing, Damaged."""
        key = schema.KEY.pack(object_id)
        cell = self.fetch(schema.CELL, key)
        if cell is not None:
            return self._environment.cells.object(schema.open_cell(key, cell))
        value = self.fetch(schema.OBJECT, key)
        if value is None:
            raise ObjectMissing(f"object {object_id} is missing")
        return value

    def views(self, refs: Refs) -> list[memoryview | bytes]:
        """The bytes of consecutive pages, verified, in as few buffers as they are stored in."""
        buffers: list[memoryview | bytes] = []
        values = refs.tolist()
        at, count = 0, len(values)
        while at < count:
            value = values[at]
            kind = value & schema.KIND_MASK
            end = at + 1
            if kind == schema.DATA:
                while end < count and values[end] == values[end - 1] + schema.SLOT_STEP:
                    end += 1
                buffers.append(self._slots(value, end - at))
            elif kind == schema.PACKED:
                while end < count and values[end] == values[end - 1] + schema.SLOT_STEP and containers.same_block(
                    value, values[end]
                ):
                    end += 1
                buffers.append(self.packed(value, end - at))
            elif kind <= schema.ZERO:
                while end < count and end - at < 64 and values[end] <= schema.ZERO:
                    end += 1
                buffers.append(ZERO_PAGE if end == at + 1 else memoryview(ZERO_BLOCK)[: (end - at) << 12])
            else:
                buffers.append(self.page(value))
            at = end
        return buffers

    def _slots(self, ref: int, count: int) -> memoryview:
        """Consecutive slots of one object as one view, each verified."""
        object_id, slot = ref >> schema.OBJECT_SHIFT, schema.slot_of(ref)
        value = self.object(object_id)
        for each in range(slot, slot + count):
            schema.object_page(object_id, each, value)
        at = schema.HEADER_BYTES + (slot << 12)
        return value[at : at + (count << 12)]

    # Segments: what migrations send

    def segment(self, layer_id: int, above: int = 0) -> Segment:
        """The slice of a chain from a layer down to, and without, `above` (0: down to the base)."""
        layers = []
        for layer in self.chain(layer_id):
            if layer.id == above:
                break
            layers.append(layer)
        else:
            assert not above, "a slice ends at a layer of its own chain"
        return Segment(layers[0].size, min(layer.clip for layer in layers), tuple(layer.id for layer in layers))

    def leaf_digest(self, layer_id: int, leaf: int, *, above: int = 0) -> bytes | None:
        """Digest of a leaf of a segment, None when nothing is in it; Damaged when a page of it is not here, sound."""
        refs = self.resolve(layer_id, leaf, above=above)
        if not above:
            refs = np.where(refs == schema.ZERO, np.uint64(schema.HOLE), refs)
        if not refs.any():
            return None
        kinds = schema.kinds(refs)
        here = schema.stored(refs)
        if (~here & (kinds > schema.ZERO)).any():
            raise Damaged(f"leaf {leaf} of layer {layer_id} has pages that are not here")
        return leaf_digest(leaf, np.minimum(kinds, schema.DATA), self.views(refs[here]))

    def stored_bytes(self) -> int:
        """What pages take in the store: objects, containers and lone pages, without their records. Constant cost."""
        large = sum(map(self.entries, (schema.OBJECT, schema.CELL, schema.CONTAINER)))
        return large * schema.OBJECT_BYTES + self.entries(schema.PAGES) * PAGE

    def pins(self, layer_id: int) -> list[Pin]:
        return [pin for _, pin in self._scan_records(schema.PIN, Pin, layer_key(layer_id))]
