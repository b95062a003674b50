"""Blocks into layers: looked up by their hash, referred to where they are there already, else packed into containers.

What is packed is what will be kept: imports, streams, and named snapshots of some age. A block with few data pages is
not worth a place in a container and its share of the records; neither is a container that would stay mostly empty.
Their pages are stored as any other's are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from silofs.blocks import LEAF_MASK, LEAF_SHIFT, PAGE, PAGE_SHIFT, pages_for
from silofs.errors import Busy, Damaged, ObjectMissing
from silofs.layers import containers, leaves, schema
from silofs.layers.containers import BLOCK_PAGES, Block
from silofs.layers.incoming import IncomingChanges
from silofs.layers.native import Source
from silofs.layers.reader import ReadTxn
from silofs.layers.schema import Buffer, Refs
from silofs.layers.uses import piece_refs
from silofs.limits import PACK_PAGES_MIN


@dataclass(frozen=True, slots=True)
class Laid:
    """A block and where it belongs: `first` is the number of the first of its 16 pages in the layer."""

    first: int
    block: Block


@dataclass
class Packed:
    """What became of blocks: pages found in the store, put into containers, and stored as pages."""

    found: int = 0
    packed: int = 0
    raw: int = 0


_NONE: Final[Refs] = np.zeros(BLOCK_PAGES, np.uint64)


class PackChanges(IncomingChanges):
    """Stores blocks."""

    def put_blocks(self, layer_id: int, blocks: Sequence[Laid]) -> Packed:
        """Give a received layer the pages of blocks, where it has none yet or waits for them; others stay as they are.

        Blocks are aligned to 16 pages and in ascending order. Idempotent.
        """
        end = pages_for(self.layer(layer_id).size)
        rows = {leaf: self._own_row(layer_id, leaf) for leaf in sorted({laid.first >> LEAF_SHIFT for laid in blocks})}
        wanted: list[Laid] = []
        for laid in blocks:
            if laid.first + laid.block.pages.bit_length() > end:
                raise Busy(f"pages of layer {layer_id} go beyond its size")
            at = laid.first & LEAF_MASK
            entries = rows[laid.first >> LEAF_SHIFT][at : at + BLOCK_PAGES]
            free = (entries == schema.HOLE) | (schema.kinds(entries) == schema.REMOTE)
            block = _only(laid.block, int(np.packbits(free, bitorder="little").view("<u2")[0]))
            if block is not None:
                wanted.append(Laid(laid.first, block))
        refs, result = self.store_blocks(layer_id, wanted)
        fresh = {leaf: row.copy() for leaf, row in rows.items()}
        for laid, new in zip(wanted, refs, strict=True):
            at = laid.first & LEAF_MASK
            row = fresh[laid.first >> LEAF_SHIFT][at : at + BLOCK_PAGES]
            np.copyto(row, new, where=new != 0)
        for leaf, row in fresh.items():
            self._put_row(layer_id, leaf, rows[leaf], row)
        return result

    def _own_row(self, layer_id: int, leaf: int) -> Refs:
        own = self.own_leaf(layer_id, leaf)
        return leaves.HOLES if own is None else own

    def _put_row(self, layer_id: int, leaf: int, old: Refs, new: Refs) -> None:
        changed = np.flatnonzero(old != new)
        if len(changed):
            self.account(layer_id, (leaf << LEAF_SHIFT) + changed, old[changed], new[changed])
            self.put_leaves(layer_id, [leaf], new.reshape(1, -1), [bool(old.any())])
            self.chill_leaf(leaf)

    def store_blocks(self, layer_id: int, blocks: Sequence[Laid]) -> tuple[list[Refs], Packed]:
        """References of each block's 16 pages, 0 where it has none; what is not in the store yet is stored.

        The caller puts them into the layer's leaves in this same transaction.
        """
        refs, result = self.contain_blocks([laid.block for laid in blocks])
        result.raw = self._store_single(layer_id, blocks, refs)
        return refs, result

    def contain_blocks(self, blocks: Sequence[Block]) -> tuple[list[Refs], Packed]:
        """References of each block's 16 pages, 0 where it has none or is not worth a place in a container."""
        refs: list[Refs] = [_NONE] * len(blocks)
        result = Packed()
        fresh: dict[bytes, list[int]] = {}  # numbers of the blocks with that hash
        for number, block in enumerate(blocks):
            if block.pages.bit_count() < PACK_PAGES_MIN:
                continue
            found = None if block.anew else self.find_block(block)
            if found is not None:
                refs[number] = found
                result.found += block.pages.bit_count()
            else:
                fresh.setdefault(block.hash, []).append(number)
        same = list(fresh.values())
        stored, places = self._store_containers([blocks[numbers[0]] for numbers in same])
        for numbers, part, where in zip(same, stored, places, strict=True):
            first = blocks[numbers[0]]
            placed = int(np.count_nonzero(part))
            result.packed += placed
            # Of a block that was cut, one piece may have a place and the other none: such a one cannot be found.
            refs[numbers[0]] = part
            if placed == first.pages.bit_count():
                self.index_block(first.hash, where)
                for number in numbers:
                    refs[number] = part
                result.found += placed * (len(numbers) - 1)
        return refs, result

    def _store_containers(self, blocks: Sequence[Block]) -> tuple[list[Refs], list[list[tuple[int, int]]]]:
        """References of the blocks' pages as far as they got into containers; (container, block in it) of pieces."""
        refs: list[Refs] = [np.zeros(BLOCK_PAGES, np.uint64) for _ in blocks]
        places: list[list[tuple[int, int]]] = [[] for _ in blocks]
        for pieces in containers.place(blocks):
            if not containers.worth(pieces):
                continue
            container_id = self.store_container(pieces)
            for number, piece in enumerate(pieces):
                refs[piece.block] |= piece_refs(container_id, number, piece.pages)
                places[piece.block].append((container_id, number))
        return refs, places

    def _store_single(self, layer_id: int, blocks: Sequence[Laid], refs: list[Refs]) -> int:
        """Store pages that have no reference yet as pages of the layer; how many."""
        pages: list[int] = []
        data: list[Buffer] = []
        places: list[tuple[int, int]] = []
        for number, laid in enumerate(blocks):
            if np.count_nonzero(refs[number]) == laid.block.pages.bit_count():
                continue
            refs[number] = refs[number].copy()
            plain = memoryview(laid.block.plain)
            for index, at in enumerate(containers.slots_of(0, laid.block.pages)):
                if not refs[number][at]:
                    pages.append(laid.first + at)
                    data.append(plain[index << PAGE_SHIFT : (index + 1) << PAGE_SHIFT])
                    places.append((number, at))
        for (number, at), ref in zip(places, self.store_pages(layer_id, pages, Source.of(data)).tolist(), strict=True):
            refs[number][at] = ref
        return len(pages)


def prepare(reader: ReadTxn, pages: int, plain: bytes) -> Block:
    """A block to be stored, compressed unless it is there already and sound."""
    if pages.bit_count() < PACK_PAGES_MIN:
        return Block(containers.NO_HASH, pages, plain)
    digest = containers.hash_block(pages, plain)
    found = reader.look_up(digest, pages)
    if found is None:
        return containers.prepare(pages, plain, digest)
    if _sound(reader, found):
        return Block(digest, pages, plain)
    return containers.prepare(pages, plain, digest, anew=True)


def _sound(reader: ReadTxn, pieces: list[tuple[int, int, int]]) -> bool:
    """Whether the pieces of a block can be read."""
    try:
        for container_id, number, _ in pieces:
            value = reader.container(container_id)
            containers.plain_pages(container_id, number, containers.entry(container_id, number, value), value)
    except (Damaged, ObjectMissing):
        return False
    return True


def _only(block: Block, mask: int) -> Block | None:
    """The block without the pages that are not in the mask; None when nothing is left."""
    if block.pages & mask == block.pages:
        return block
    left = block.pages & mask
    if not left:
        return None
    plain = memoryview(block.plain)
    kept = [
        plain[index * PAGE : (index + 1) * PAGE]
        for index, at in enumerate(containers.slots_of(0, block.pages))
        if mask >> at & 1
    ]
    return containers.prepare(left, b"".join(kept))
