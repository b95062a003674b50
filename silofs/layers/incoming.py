"""What arrives from a peer: layers, maps, then pages. Each step can be repeated without harm.

A received layer is sealed from the start. Its map comes first, in pieces, as runs of states; pages that exist are
REMOTE until their bytes arrive. Arrivals go to the layer that they belong to, never to a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from silofs.blocks import LEAF_MASK, LEAF_PAGES, LEAF_SHIFT, PAGE, pages_for
from silofs.errors import Busy, Exists
from silofs.extents import Extents
from silofs.layers import catalog, schema
from silofs.layers.catalog import Layer, Pin, Value, Volume
from silofs.layers.changes import pages_of
from silofs.layers.heads import ROWS
from silofs.layers.native import Source
from silofs.layers.schema import Buffer
from silofs.layers.volumes import VolumeChanges, checked_size, kept_until


class IncomingChanges(VolumeChanges):
    """Receive layers; pins and values for the parts of silofs that drive it."""

    def receive_layer(self, uuid: bytes, parent: int, size: int, clip: int) -> Layer:
        """A layer to be filled, on `parent` (0: on nothing). The same one again is returned as it is."""
        known = self.layer_by_uuid(uuid)
        if known is not None:
            if (known.parent, known.size, known.clip) != (parent, size, clip) or known.doomed:
                raise Exists(f"there is a layer {uuid.hex()} already, and it is another")
            return known
        depth = 1
        if parent:
            below = self.layer(parent)
            assert below.sealed, "only a sealed layer can be built upon"
            self.change_layer(parent, children=below.children + 1)
            depth = below.depth + 1
        layer = Layer(
            self.new_layer_id(), parent, checked_size(size), clip, uuid, sealed=True, depth=depth, kept_ns=kept_until()
        )
        self.put_layer(layer)
        self.put_record(schema.LAYER_UUID, uuid, Value(schema.KEY.pack(layer.id)))
        return layer

    def put_map(self, layer_id: int, runs: Iterable[tuple[int, int, int]], *, mapped: int | None = None) -> Layer:
        """States of pages as (first page, pages, REMOTE or ZERO); only holes change. Runs are disjoint.

        `mapped`: the state of every page below it is known once this is committed.
        """
        layer = self.layer(layer_id)
        parts: dict[int, list[tuple[int, int, int]]] = {}
        for first, count, kind in runs:
            assert kind in (schema.REMOTE, schema.ZERO) and count > 0, "a map says remote or zero"
            if first < 0 or first + count > pages_for(layer.size):
                raise Busy(f"the map of layer {layer_id} goes beyond its size")
            reference = schema.ref(kind, layer_id if kind == schema.REMOTE else 0)
            ranges = [(first, first + count)]
            if kind == schema.ZERO and layer.parent and layer.data_pages == catalog.UNCOUNTED:
                ranges = self._void_run(layer_id, first, first + count)
            for page, end in ranges:
                while page < end:
                    leaf = page >> LEAF_SHIFT
                    stop = min(end, (leaf + 1) << LEAF_SHIFT)
                    parts.setdefault(leaf, []).append((page & LEAF_MASK, stop - (leaf << LEAF_SHIFT), reference))
                    page = stop
        numbers = sorted(parts)
        for at in range(0, len(numbers), ROWS):
            some = numbers[at : at + ROWS]
            rows = self.stack_leaves(layer_id, [self.peek_leaf(layer_id, leaf) for leaf in some])
            old = rows.copy()
            for row, leaf in enumerate(some):
                for start, stop, reference in parts[leaf]:
                    entries = rows[row, start:stop]
                    entries[entries == schema.HOLE] = reference
            changed = rows != old
            if changed.any():
                if self.layer(layer_id).data_pages != catalog.UNCOUNTED:
                    raise Busy(f"layer {layer_id} is in use, and its map is closed")
                # Only those: what stays as it was must not be released.
                page_numbers = np.stack([pages_of(leaf) for leaf in some])
                self.account(layer_id, page_numbers[changed], old[changed], rows[changed])
                self.put_leaves(layer_id, some, rows, np.any(old, axis=1).tolist())
        if mapped is not None and mapped > self.layer(layer_id).mapped:
            self.change_layer(layer_id, mapped=min(mapped, pages_for(layer.size)))
        return self.layer(layer_id)

    def _void_run(self, layer_id: int, first: int, end: int) -> list[tuple[int, int]]:
        """Make void what a run of zeros covers whole and the layer has no leaf of yet; the rest of the run."""
        first_leaf, end_leaf = (first + LEAF_MASK) >> LEAF_SHIFT, end >> LEAF_SHIFT
        if end_leaf - first_leaf <= ROWS:
            return [(first, end)]
        self.void_holes(layer_id, first_leaf, end_leaf)
        there = [
            (leaf << LEAF_SHIFT, (leaf + 1) << LEAF_SHIFT)
            for leaf in self.present_leaves(layer_id, first_leaf, end_leaf)
        ]
        return [(first, first_leaf << LEAF_SHIFT), *there, (end_leaf << LEAF_SHIFT, end)]

    def fill(self, layer_id: int, pages: Mapping[int, Buffer]) -> int:
        """Store the bytes of pages that are still remote; the others are left alone. The number stored."""
        wanted = self._still_remote(layer_id, pages)
        if wanted:
            refs = self.store_pages(layer_id, wanted, Source.of([_whole(pages[page]) for page in wanted]))
            self._replace(layer_id, wanted, refs.tolist())
        return len(wanted)

    def mark_lost(self, layer_id: int, pages: Extents) -> int:
        """Give up pages that are still remote: errors until they are overwritten. The number given up."""
        wanted: list[int] = []
        for leaf in self.present_leaves(layer_id):
            first = leaf << LEAF_SHIFT
            inside = [page for start, end in pages.overlap(first, first + LEAF_PAGES) for page in range(start, end)]
            wanted += self._still_remote(layer_id, inside)
        self._replace(layer_id, wanted, [schema.LOST] * len(wanted))
        return len(wanted)

    def _still_remote(self, layer_id: int, pages: Iterable[int]) -> list[int]:
        """Those of the pages that are REMOTE in the layer, ascending."""
        by_leaf: dict[int, list[int]] = {}
        for page in sorted(pages):
            by_leaf.setdefault(page >> LEAF_SHIFT, []).append(page)
        found: list[int] = []
        for leaf, inside in by_leaf.items():
            own = self.own_leaf(layer_id, leaf)
            if own is not None:
                remote = schema.kinds(own) == schema.REMOTE
                found += [page for page in inside if remote[page & LEAF_MASK]]
        return found

    def _replace(self, layer_id: int, pages: Sequence[int], refs: Sequence[int]) -> None:
        """New references for entries of a layer below some heads."""
        at = 0
        while at < len(pages):
            leaf = pages[at] >> LEAF_SHIFT
            end = at
            while end < len(pages) and pages[end] >> LEAF_SHIFT == leaf:
                end += 1
            rows = self.stack_leaves(layer_id, [self.peek_leaf(layer_id, leaf)])
            own = rows[0]
            inside = np.array(pages[at:end]) & LEAF_MASK
            old = own[inside]
            own[inside] = np.array(refs[at:end], np.uint64)
            self.account(layer_id, np.array(pages[at:end]), old, own[inside])
            self.put_leaves(layer_id, [leaf], rows, [True])
            self.chill_leaf(leaf)
            at = end

    def set_base(self, uuid: bytes, layer_id: int) -> Volume:
        """A volume that nothing was written to here shows that sealed layer from now on, in its size."""
        volume = self.volume(uuid)
        if self.layer(volume.head).leaves or self.layer(volume.head).voids:
            raise Busy(f"volume '{volume.name}' was written to")
        return self.rollback(uuid, layer_id)

    # Pins and values

    def pin(self, layer_id: int, holder: str) -> None:
        """Hold a layer against removal, in that name; idempotent."""
        key = catalog.pin_key(layer_id, holder)
        if self.fetch(schema.PIN, key) is None:
            self.put_record(schema.PIN, key, Pin(layer_id, holder))
            self.change_layer(layer_id, pins=self.layer(layer_id).pins + 1)

    def unpin(self, layer_id: int, holder: str) -> None:
        """Let go; the layer goes when nothing else reaches it. Nothing happens without such a pin."""
        if self.delete_record(schema.PIN, catalog.pin_key(layer_id, holder)):
            self.change_layer(layer_id, pins=self.layer(layer_id).pins - 1)
            self.drop_if_free(layer_id)

    def unpin_all(self, holder: str) -> None:
        """Let go of everything that this holder has pinned."""
        for pin in [pin for _, pin in self._scan_records(schema.PIN, Pin) if pin.holder == holder]:
            self.unpin(pin.layer, holder)

    def put_value(self, table: str, key: str, data: bytes) -> None:
        """Keep a value for another part of silofs; tables as in `value`."""
        self.put_record(schema.VALUE_TABLES[table], key.encode(), Value(data))

    def delete_value(self, table: str, key: str) -> bool:
        return self.delete_record(schema.VALUE_TABLES[table], key.encode())


def _whole(page: Buffer) -> Buffer:
    assert len(page) == PAGE, "pages are stored whole"
    return page
