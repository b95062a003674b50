"""Which leaves a layer has, and which of them are void, out of one transaction.

Presence says that a leaf has a record. A *void* leaf is zero throughout, whatever its record says and whatever lies
below: how a range of any length is zeroed by changing a bit a leaf. Both kinds of bitmap are in records of 8192 leaves
that are proved by a sum in the layer's own record, so that a lost one is damage and never a hole, nor old data.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Final, NamedTuple

import lmdb
import numpy as np
import numpy.typing as npt

from silofs.errors import Damaged
from silofs.layers import presence, schema
from silofs.layers.catalog import Layer
from silofs.layers.catalog_reader import CatalogReader
from silofs.layers.schema import CHUNK_BYTES, CHUNK_LEAVES, CHUNK_SHIFT

log = logging.getLogger(__name__)

Bits = npt.NDArray[np.uint8]
_NONE: Final = bytes(schema.VOID_BYTES)
_ALL: Final = b"\xff" * CHUNK_BYTES


class Stack(NamedTuple):
    """The layers of a chain that have a chunk, top first; their presence and void bitmaps as arrays of a row each."""

    layers: list[Layer]
    present: Bits
    void: Bits


def mask(first: int, end: int | None) -> Bits:
    """A bitmap of one chunk with the bits [first, end)."""
    bits = np.zeros(CHUNK_LEAVES, np.uint8)
    bits[first:end] = 1
    return np.packbits(bits, bitorder="little")


def popcount(bitmap: Bits) -> int:
    return int.from_bytes(bitmap.tobytes(), "little").bit_count()


def _rows(bitmaps: bytearray) -> Bits:
    return np.frombuffer(bytes(bitmaps), np.uint8).reshape(-1, CHUNK_BYTES)


class BitmapReader(CatalogReader):
    """Look-ups of leaves without looking at leaves."""

    def _begin(self, txn: lmdb.Transaction[memoryview]) -> None:
        super()._begin(txn)
        self._void_maps: dict[tuple[int, int], bytes | bytearray] = {}
        self._stacks: dict[tuple[int, int], Stack] = {}

    def _bitmap(self, layer_id: int, chunk: int) -> bytes | bytearray:
        """A presence bitmap that the layer's record says exists."""
        bitmap = self._bitmaps.get((layer_id, chunk))
        if bitmap is None:
            key = schema.leaf_key(layer_id, chunk)
            value = self.fetch(schema.PRESENCE, key)
            if value is None:
                raise Damaged(f"presence bitmap {chunk} of layer {layer_id} is missing")
            bitmap = bytes(schema.open_record(schema.PRESENCE, key, value))
            if schema.short_sum(value) != presence.chunk_sum(self.layer(layer_id).chunks, chunk):
                raise Damaged(f"presence bitmap {chunk} of layer {layer_id} is an older one")
            self._bitmaps[layer_id, chunk] = bitmap
        return bitmap

    def _void_map(self, layer_id: int, chunk: int) -> bytes | bytearray:
        """The void bits of a chunk, then those of its leaves that are not settled; zeros where the layer has none."""
        kept = self._void_maps.get((layer_id, chunk))
        if kept is None:
            total = presence.chunk_sum(self.layer(layer_id).voids, chunk)
            if not total:
                return _NONE
            key = schema.leaf_key(layer_id, chunk)
            value = self.fetch(schema.VOID, key)
            if value is None:
                raise Damaged(f"void bitmap {chunk} of layer {layer_id} is missing")
            kept = bytes(schema.open_record(schema.VOID, key, value))
            if schema.short_sum(value) != total or len(kept) != schema.VOID_BYTES:
                raise Damaged(f"void bitmap {chunk} of layer {layer_id} is an older one")
            self._void_maps[layer_id, chunk] = kept
        return kept

    def is_void(self, layer_id: int, leaf: int) -> bool:
        """Whether the leaf is zero throughout, in that layer. Damaged when that cannot be told."""
        if not self.layer(layer_id).voids:
            return False
        return presence.has(self._void_map(layer_id, leaf >> CHUNK_SHIFT), leaf & (CHUNK_LEAVES - 1))

    def _is_present(self, layer_id: int, leaf: int) -> bool:
        chunk = leaf >> CHUNK_SHIFT
        if not presence.chunk_sum(self.layer(layer_id).chunks, chunk):
            return False
        return presence.has(self._bitmap(layer_id, chunk), leaf & (CHUNK_LEAVES - 1))

    def _stack(self, layer_id: int, chunk: int) -> Stack:
        """The chain's layers that have the chunk."""
        stack = self._stacks.get((layer_id, chunk))
        if stack is None:
            chain = self.chain(layer_id)
            layers = [
                each
                for each in chain
                if presence.chunk_sum(each.chunks, chunk) or presence.chunk_sum(each.voids, chunk)
            ]
            present, void = bytearray(), bytearray()
            for layer in layers:
                try:
                    there = presence.chunk_sum(layer.chunks, chunk)
                    present += self._bitmap(layer.id, chunk) if there else bytes(CHUNK_BYTES)
                    void += self._void_map(layer.id, chunk)[:CHUNK_BYTES]
                except Damaged as error:
                    if self.spoilt is not None:
                        raise
                    log.error("%s; every leaf of it is taken for present", error)
                    present[len(void) :] = _ALL
                    void += bytes(CHUNK_BYTES)
            stack = Stack(layers, _rows(present), _rows(void))
            self._stacks[layer_id, chunk] = stack
        return stack

    def _having(self, layer_id: int, leaf: int) -> list[Layer]:
        """The chain's layers that say something of the leaf, top first."""
        layers, present, void = self._stack(layer_id, leaf >> CHUNK_SHIFT)
        if not layers:
            return []
        at = leaf & (CHUNK_LEAVES - 1)
        byte, bit = at >> 3, 1 << (at & 7)
        if len(layers) == 1:
            return layers if (present[0, byte] | void[0, byte]) & bit else []
        return [layers[row] for row in np.flatnonzero((present[:, byte] | void[:, byte]) & bit).tolist()]

    def _showing(self, layer_id: int, chunk: int) -> Bits:
        """Which leaves of a chunk may show anything but zeros: present in a layer, not void in it or above it."""
        _, present, void = self._stack(layer_id, chunk)
        shown, covered = np.zeros(CHUNK_BYTES, np.uint8), np.zeros(CHUNK_BYTES, np.uint8)
        for here, hidden in zip(present, void, strict=True):
            covered |= hidden
            shown |= here & ~covered
        return shown

    def present_leaves(self, layer_id: int, first: int = 0, end: int | None = None) -> Iterator[int]:
        """The leaves that the layer itself has records of, ascending. Damaged when a bitmap is."""
        for chunk, start, stop in presence.chunks_between(self.layer(layer_id).chunks, first, end):
            for at in presence.bits(self._bitmap(layer_id, chunk), start, stop):
                yield (chunk << CHUNK_SHIFT) + at

    def void_leaves(self, layer_id: int, first: int = 0, end: int | None = None) -> Iterator[int]:
        """The leaves that are void in that layer, ascending. Damaged when a bitmap is."""
        for chunk, start, stop in presence.chunks_between(self.layer(layer_id).voids, first, end):
            for at in presence.bits(self._void_map(layer_id, chunk)[:CHUNK_BYTES], start, stop):
                yield (chunk << CHUNK_SHIFT) + at

    def unsettled_leaves(self, layer_id: int, first: int = 0, end: int | None = None) -> Iterator[int]:
        """The void leaves of a layer that are not settled, ascending."""
        for chunk, start, stop in presence.chunks_between(self.layer(layer_id).voids, first, end):
            for at in presence.bits(self._void_map(layer_id, chunk)[CHUNK_BYTES:], start, stop):
                yield (chunk << CHUNK_SHIFT) + at

    def count_showing(self, layer_id: int, first: int, end: int) -> int:
        """How many of the leaves [first, end) may show anything but zeros."""
        count = 0
        for chunk, start, stop in self._chunks(self.chain(layer_id), first, end):
            count += popcount(self._showing(layer_id, chunk) & mask(start, stop))
        return count

    def chain_leaves(self, layer_id: int, first: int = 0, end: int | None = None, *, above: int = 0) -> Iterator[int]:
        """The leaves in which the chain (or the slice of it down to `above`) has anything, ascending.

        Of a whole chain that is what may not be zero. In a slice a void leaf says what lies below: nothing.
        """
        stop_depth = self.layer(above).depth if above else 0
        chain = [layer for layer in self.chain(layer_id) if layer.depth > stop_depth]
        for chunk, start, stop in self._chunks(chain, first, end):
            if above:
                layers, present, void = self._stack(layer_id, chunk)
                rows = [row for row, layer in enumerate(layers) if layer.depth > stop_depth]
                merged = np.bitwise_or.reduce(present[rows] | void[rows], axis=0)
            else:
                merged = self._showing(layer_id, chunk)
            for at in presence.bits(merged.tobytes(), start, stop):
                yield (chunk << CHUNK_SHIFT) + at

    def _chunks(self, layers: list[Layer], first: int, end: int | None) -> Iterator[tuple[int, int, int | None]]:
        """As presence.chunks_between: the chunks that any of the layers has."""
        lists = [np.frombuffer(part, "<u4") for layer in layers for part in (layer.chunks, layer.voids)]
        every = np.zeros(max(map(len, lists)), np.uint32)
        for sums in lists:
            every[: len(sums)] |= sums
        yield from presence.chunks_between(every.tobytes(), first, end)
