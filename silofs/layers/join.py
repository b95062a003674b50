"""Putting two layers together, leaf by leaf: begun, carried on, ended. The table in docs/background.md is this module.

`lower` is a sealed layer on which only `upper` is built, and which nothing else reaches. What the chain above reads is
the same at every step, down to the references; so nobody who keeps resolved leaves need know.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt
from msgspec import structs

from silofs import failpoints
from silofs.blocks import LEAF_PAGES, LEAF_SHIFT, pages_for
from silofs.layers import catalog, leaves, schema
from silofs.layers.catalog import Layer, Merge, Value, Way
from silofs.layers.changes import Numbers
from silofs.layers.rewrite import Budget
from silofs.layers.schema import Refs
from silofs.layers.transaction import WriteTxn

Where = npt.NDArray[np.bool_]

CHILDREN_MAX = 64  # an upper layer with more goes up, whatever its size: `down` changes the record of each


def begin(txn: WriteTxn, lower: Layer, upper: Layer) -> Merge:
    """Put a merge on record. From here on nothing can name the lower layer."""
    merge = Merge(lower.id, upper.id, _way(lower, upper))
    txn.delete_record(schema.LAYER_UUID, lower.uuid)
    txn.change_layer(lower.id, uuid=b"", data_pages=catalog.UNCOUNTED)
    txn.put_record(schema.MERGE, catalog.layer_key(lower.id), merge)
    txn.layers_changed = True
    failpoints.hit("merge.begin")
    return merge


def turn(txn: WriteTxn, merge: Merge) -> Merge:
    """A head above has been sealed: lower can go now, one way or the other."""
    merge = Merge(merge.lower, merge.upper, _way(txn.layer(merge.lower), txn.layer(merge.upper)))
    txn.put_record(schema.MERGE, catalog.layer_key(merge.lower), merge)
    return merge


def _way(lower: Layer, upper: Layer) -> Way:
    if not upper.sealed:
        return Way.SHED
    # A layer that is itself a lower one keeps its place; and void leaves stay where they are.
    fewer = upper.leaves < lower.leaves and upper.children <= CHILDREN_MAX and upper.uuid and not upper.voids
    return Way.DOWN if fewer else Way.UP


def up(txn: WriteTxn, merge: Merge, budget: Budget) -> bool:
    """Some leaves; the end once there is none. Whether that was not the end."""
    lower, upper = txn.layer(merge.lower), txn.layer(merge.upper)
    if upper.unsettled:
        # What its voids cover can be counted only as long as it is there.
        numbers = list(islice(txn.unsettled_leaves(upper.id), max(1, budget.leaves)))
        budget.spend(leaves=len(numbers))
        txn.settle_voids(upper.id, numbers)
        return True
    numbers = list(islice(txn.present_leaves(lower.id), max(1, budget.leaves)))
    budget.spend(leaves=len(numbers))
    if not numbers:
        _end_up(txn, lower, upper)
        return False
    below, above, pages = _rows(txn, lower.id, numbers), _rows(txn, upper.id, numbers), _pages(numbers)
    some = below != schema.HOLE
    taken = some & (above == schema.HOLE) & (pages < pages_for(upper.clip))
    _release(txn, lower.id, pages, below, some & ~taken)
    _hand_over(txn, lower.id, upper.id, pages, below, taken)
    _store(txn, upper.id, numbers, above, np.where(taken, below, above))
    _store(txn, lower.id, numbers, below, np.zeros_like(below))
    return True


def down(txn: WriteTxn, merge: Merge, budget: Budget) -> bool:
    """Some leaves, first those that the clip hides; the end once there is none. Whether that was not the end."""
    lower, upper = txn.layer(merge.lower), txn.layer(merge.upper)
    if (lower.size, upper.clip) != (upper.size, upper.size):
        _cut(txn, lower, upper, budget)
        return True
    numbers = list(islice(txn.present_leaves(upper.id), max(1, budget.leaves)))
    budget.spend(leaves=len(numbers))
    if not numbers:
        _end_down(txn, lower, upper)
        return False
    below, above, pages = _rows(txn, lower.id, numbers), _rows(txn, upper.id, numbers), _pages(numbers)
    taken = above != schema.HOLE
    _release(txn, lower.id, pages, below, taken & (below != schema.HOLE))
    _hand_over(txn, upper.id, lower.id, pages, above, taken)
    _store(txn, lower.id, numbers, below, np.where(taken, above, below))
    _store(txn, upper.id, numbers, above, np.zeros_like(above))
    return True


def _cut(txn: WriteTxn, lower: Layer, upper: Layer, budget: Budget) -> None:
    """Release what lies beyond upper's clip; once nothing does, the clip has no meaning any more."""
    end = pages_for(upper.clip)
    first = end >> LEAF_SHIFT
    numbers = list(islice(txn.present_leaves(lower.id, first), max(2, budget.leaves)))
    budget.spend(leaves=len(numbers))
    if numbers:
        below, pages = _rows(txn, lower.id, numbers), _pages(numbers)
        beyond = (below != schema.HOLE) & (pages >= end)
        if beyond.any():
            _release(txn, lower.id, pages, below, beyond)
            _store(txn, lower.id, numbers, below, np.where(beyond, schema.HOLE, below))
            return
    size = upper.size
    txn.change_layer(lower.id, size=size, clip=min(lower.clip, upper.clip), mapped=pages_for(size))
    txn.change_layer(upper.id, clip=size)


def shed(txn: WriteTxn, merge: Merge, first: int, budget: Budget) -> int | None:
    """Release what upper hides of some of lower's leaves from leaf `first` on; where to go on, None after the last."""
    lower, upper = txn.layer(merge.lower), txn.layer(merge.upper)
    end = pages_for(upper.clip)
    # Beyond the clip everything is hidden, wherever upper has leaves.
    clipped = end >> LEAF_SHIFT
    if lower.leaves <= upper.leaves or first >= clipped:
        looked = list(islice(txn.present_leaves(lower.id, first), max(1, budget.leaves)))
    else:
        looked = list(islice(txn.present_leaves(upper.id, first, clipped), max(1, budget.leaves)))
        if len(looked) < budget.leaves:
            budget.spend(leaves=len(looked))
            _shed(txn, lower, upper, looked, end)
            return clipped
    budget.spend(leaves=len(looked))
    _shed(txn, lower, upper, looked, end)
    return looked[-1] + 1 if looked else None


def _shed(txn: WriteTxn, lower: Layer, upper: Layer, looked: Sequence[int], end: int) -> None:
    waiting = set(txn.unsettled_leaves(upper.id, looked[0], looked[-1] + 1)) if looked else set()
    numbers = [leaf for leaf in looked if leaf not in waiting and txn.own_leaf(lower.id, leaf) is not None]
    if not numbers:
        return
    below, above, pages = _rows(txn, lower.id, numbers), _rows(txn, upper.id, numbers), _pages(numbers)
    hidden = (below != schema.HOLE) & ((above != schema.HOLE) | (pages >= end))
    _release(txn, lower.id, pages, below, hidden)
    _store(txn, lower.id, numbers, below, np.where(hidden, schema.HOLE, below))


def end_shed(txn: WriteTxn, merge: Merge) -> None:
    """The lower layer is empty: it goes."""
    _end_up(txn, txn.layer(merge.lower), txn.layer(merge.upper))


def _end_up(txn: WriteTxn, lower: Layer, upper: Layer) -> None:
    txn.change_layer(upper.id, parent=lower.parent, clip=min(lower.clip, upper.clip), packed=0)
    txn.drop_layer(lower.id)
    failpoints.hit("merge.end")


def _end_down(txn: WriteTxn, lower: Layer, upper: Layer) -> None:
    """Lower becomes what upper was. Upper stays for those who begin there, until `reap` comes to it."""
    for child in [layer.id for layer in txn.layers() if layer.parent == upper.id]:
        txn.change_layer(child, parent=lower.id)
    for key, snapshot in txn.named(upper.id):
        txn.put_record(schema.SNAPSHOT, key, structs.replace(snapshot, layer=lower.id))
    txn.delete_record(schema.LAYER_UUID, upper.uuid)
    txn.put_record(schema.LAYER_UUID, upper.uuid, Value(schema.KEY.pack(lower.id)))
    txn.change_layer(
        lower.id,
        uuid=upper.uuid,
        children=upper.children + 1,
        snapshots=upper.snapshots,
        data_pages=upper.data_pages,
        kept_ns=upper.kept_ns,
        packed=0,
    )
    txn.change_layer(upper.id, uuid=b"", children=0, snapshots=0, doomed=True)
    txn.put_record(schema.DOOMED, catalog.layer_key(upper.id), Value(b""))
    txn.delete_record(schema.MERGE, catalog.layer_key(lower.id))
    txn.layers_changed = True
    txn.succeeded[upper.id] = lower.id
    failpoints.hit("merge.end")


# Leaves as arrays of a row each


def _pages(numbers: Sequence[int]) -> Numbers:
    pages: Numbers = (np.array(numbers, np.int64)[:, np.newaxis] << LEAF_SHIFT) + np.arange(LEAF_PAGES)
    return pages


def _rows(txn: WriteTxn, layer_id: int, numbers: Sequence[int]) -> Refs:
    """Own entries; Damaged when one cannot be read."""
    own = [txn.own_leaf(layer_id, leaf) for leaf in numbers]
    return np.stack([leaves.HOLES if row is None else row for row in own])


def _release(txn: WriteTxn, layer_id: int, pages: Numbers, rows: Refs, which: Where) -> None:
    old = rows[which]
    txn.account(layer_id, pages[which], old, np.zeros_like(old))


def _hand_over(txn: WriteTxn, source: int, target: int, pages: Numbers, rows: Refs, which: Where) -> None:
    """Entries of one layer become another's."""
    numbers, refs = pages[which], rows[which]
    holes = np.zeros_like(refs)
    txn.account(target, numbers, holes, refs)
    txn.account(source, numbers, refs, holes, handed_over=True)
    txn.rehome(target, numbers.tolist(), refs)


def _store(txn: WriteTxn, layer_id: int, numbers: Sequence[int], before: Refs, after: Refs) -> None:
    """The rows that changed."""
    rows = np.flatnonzero(np.any(before != after, axis=1)).tolist()
    if rows:
        existed: list[bool] = np.any(before[rows], axis=1).tolist()
        txn.put_leaves(layer_id, [numbers[row] for row in rows], after[rows], existed)
