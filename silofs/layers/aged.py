"""Packs named snapshots of some age, and what they are built on: what has been kept for long will be kept.

A layer is gone through once, leaf by leaf; its record says how far. Of every 64 KiB the pages that are stored on their
own become a block in a container, if they are in one already or get smaller by a fifth; others stay as they are.
"""

from __future__ import annotations

import logging
import time

import numpy as np

from silofs.blocks import LEAF_PAGES, LEAF_SHIFT, leaves_for
from silofs.errors import Damaged, ObjectMissing
from silofs.layers import schema
from silofs.layers.catalog import Layer
from silofs.layers.containers import BLOCK_PAGES, Block
from silofs.layers.pack import prepare
from silofs.layers.rewrite import Budget, Move, Policy, rewrite
from silofs.layers.schema import Refs
from silofs.layers.transaction import WriteTxn
from silofs.limits import PACK_AGE_S, PACK_LOOK_S, PACK_PAGES_MIN

log = logging.getLogger(__name__)


Place = tuple[int, Refs]
"""First page of a block, and the 16 entries that are there now."""


class Pack(Policy):
    """One layer after the other, oldest snapshots first."""

    name = "pack"

    def __init__(self, *, age_s: float = PACK_AGE_S, look_s: float = PACK_LOOK_S) -> None:
        self._age_s = age_s
        self._look_s = look_s
        self._layer = 0  # that is being packed
        self._looked = float("-inf")
        self.packed = 0
        self.found = 0

    def step(self, txn: WriteTxn, budget: Budget) -> bool:
        layer = self._current(txn)
        if layer is None:
            return False
        blocks: list[Block] = []
        where: list[Place] = []
        done = leaves_for(layer.size)
        for leaf in txn.present_leaves(layer.id, layer.packed):
            if budget.spent:
                done = leaf
                break
            self._gather(txn, layer.id, leaf, budget, blocks, where)
        refs, result = txn.contain_blocks(blocks)
        moves: list[Move] = [
            (layer.id, first + at, int(old[at]), int(new[at]))
            for (first, old), new in zip(where, refs, strict=True)
            for at in np.flatnonzero(new).tolist()
        ]
        rewrite(txn, moves)
        self.packed += result.packed
        self.found += result.found
        txn.change_layer(layer.id, packed=max(done, 1))
        return True

    def _current(self, txn: WriteTxn) -> Layer | None:
        """The layer to go on with, or the next one; looked for now and then."""
        if self._layer:
            try:
                layer = txn.layer(self._layer)
            except Damaged:
                pass  # it was removed
            else:
                if _due(layer):
                    return layer
            self._layer = 0
        elif time.monotonic() - self._looked < self._look_s:
            return None
        self._looked = time.monotonic()
        before = time.time_ns() - self._age_s * 1e9
        aged = [each for volume in txn.volumes() for each in txn.snapshots(volume.uuid) if each.created_ns <= before]
        for snapshot in sorted(aged, key=lambda each: each.created_ns):
            for layer in reversed(txn.chain(snapshot.layer)):
                if _due(layer):
                    self._layer = layer.id
                    return layer
        return None

    def _gather(
        self, txn: WriteTxn, layer_id: int, leaf: int, budget: Budget, blocks: list[Block], where: list[Place]
    ) -> None:
        """Add the blocks of a leaf that are worth packing, with the entries that they have now."""
        budget.spend(leaves=1)
        try:
            own = txn.own_leaf(layer_id, leaf)
        except Damaged as error:
            if txn.spoilt is not None:
                raise
            log.error("%s; it is not packed", error)
            return
        if own is None:
            return
        single = schema.stored(own) & (schema.kinds(own) != schema.PACKED)
        for at in range(0, LEAF_PAGES, BLOCK_PAGES):
            inside = single[at : at + BLOCK_PAGES]
            if np.count_nonzero(inside) < PACK_PAGES_MIN:
                continue
            old = own[at : at + BLOCK_PAGES]
            pages = int(np.packbits(inside, bitorder="little").view("<u2")[0])
            try:
                plain = b"".join(txn.views(old[inside]))
            except (Damaged, ObjectMissing) as error:
                if txn.spoilt is not None:
                    raise
                log.error("%s; it is not packed", error)
                continue
            budget.spend(pages=pages.bit_count())
            block = prepare(txn, pages, plain)
            if block.packed is not None or txn.look_up(block.hash, pages) is not None:
                blocks.append(block)
                where.append(((leaf << LEAF_SHIFT) + at, old))

    def statistics(self) -> dict[str, int]:
        return {"layer": self._layer, "packed_pages": self.packed, "found_pages": self.found}


def _due(layer: Layer) -> bool:
    """Whether there is something left to look at. What is still arriving comes later."""
    return layer.sealed and not layer.doomed and layer.complete and layer.packed < max(leaves_for(layer.size), 1)
