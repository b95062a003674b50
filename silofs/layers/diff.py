"""What differs between two sealed layers, found by comparing resolved references. Nothing is read but maps.

Two pages with one reference are the same page, since what a reference leads to never changes. Two references may lead
to equal bytes (a page that was written again as it was); such a page counts as changed. Hole and zero read alike.

Only leaves that the chains do not share are looked at, and those that a shrunk size cut off: so the cost goes with what
was written between the two, whatever the volume's size, and is right for chains that part (a rollback, a clone) too.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import merge
from itertools import groupby, pairwise

import numpy as np

from silofs.blocks import LEAF_BYTES, LEAF_SHIFT, pages_for
from silofs.layers import leaves, schema
from silofs.layers.catalog import Layer
from silofs.layers.reader import ReadTxn
from silofs.layers.schema import Refs

Run = tuple[int, int, int]  # first page, pages, schema.DATA or schema.ZERO as the newer layer has them


def suspects(txn: ReadTxn, old: int, new: int) -> list[int]:
    """The leaves, ascending, outside which the two layers are equal. An `old` of 0 is nothing but holes."""
    if not old:
        return list(txn.chain_leaves(new))
    common = _common(txn, old, new)
    parts: list[Iterator[int]] = []
    clip = None
    for top in (old, new):
        above = _above(txn.chain(top), common)
        if above:
            parts.append(txn.chain_leaves(top, above=common))
            lowest = min(layer.clip for layer in above)
            clip = lowest if clip is None else min(clip, lowest)
    if common and clip is not None and clip < txn.layer(common).size:
        parts.append(txn.chain_leaves(common, clip // LEAF_BYTES))
    return [leaf for leaf, _ in groupby(merge(*parts))]


def _common(txn: ReadTxn, old: int, new: int) -> int:
    """The newest layer that both chains have; 0 if there is none."""
    others = {layer.id for layer in txn.chain(old)}
    return next((layer.id for layer in txn.chain(new) if layer.id in others), 0)


def _above(chain: list[Layer], common: int) -> list[Layer]:
    ids = [layer.id for layer in chain]
    return chain[: ids.index(common)] if common else chain


def runs(txn: ReadTxn, old: int, new: int, leaf: int) -> Iterator[Run]:
    """The changed pages of one leaf, ascending, as far as the newer layer's size goes.

    A page that is lost in the newer layer always counts as changed data: whoever wants it gets the error.
    """
    before = _plain(txn.resolve(old, leaf)) if old else leaves.HOLES
    after = _plain(txn.resolve(new, leaf))
    changed = (before != after) | (after == schema.LOST)
    first = leaf << LEAF_SHIFT
    changed[max(0, pages_for(txn.layer(new).size) - first) :] = False
    kinds = np.where(after == schema.HOLE, schema.ZERO, schema.DATA) * changed
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    for start, stop in pairwise(edges):
        if kinds[start]:
            yield first + start, stop - start, int(kinds[start])


def _plain(refs: Refs) -> Refs:
    """References in which pages that read as zeros are all alike."""
    return np.where(refs == schema.ZERO, np.uint64(schema.HOLE), refs)
