"""The one step that changes what is stored without changing what is read, and the frame for policies that use it.

Cleaning, packing and merging all come down to this: put pages somewhere else and exchange the leaf entries that refer
to them, each only if it is still what it was (`rewrite`). A policy decides which; it does a bounded piece of its work
in one transaction, so a crash leaves the store before the piece or after it, and the next step begins where it finds
it.
docs/background.md has the policies, their budgets and what they cost.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import numpy as np

from silofs import failpoints
from silofs.blocks import LEAF_MASK, LEAF_SHIFT
from silofs.layers.changes import Changes, Numbers
from silofs.layers.heads import ROWS
from silofs.layers.schema import Refs
from silofs.layers.transaction import WriteTxn
from silofs.layers.warm import Entry
from silofs.limits import STEP_LEAVES, STEP_PAGES, STEP_S

Heads = Mapping[tuple[int, int], Entry | None]
"""(head, leaf) of leaves of heads that changed -> (own, resolved) entries as they now are, None when not known."""

Move = tuple[int, int, int, int]
"""(layer, page, reference that is expected there, reference that takes its place)."""


def rewrite(txn: WriteTxn, moves: Iterable[Move]) -> int:
    """Exchange leaf entries by compare-and-swap; the number exchanged.

    What an exchanged entry referred to is released. So is the new reference of one that was not what was expected: a
    policy may have prepared it from an older state. New references must name their (layer, page) already.
    """
    ordered = sorted(moves)
    done = 0
    for layer_id, some in groupby(ordered, key=itemgetter(0)):
        columns = np.array([move[1:] for move in some], np.uint64)
        done += exchange(txn, layer_id, columns[:, 0].astype(np.int64), columns[:, 1], columns[:, 2])
    return done


def exchange(txn: Changes, layer_id: int, pages: Numbers, old: Refs, new: Refs) -> int:
    """`rewrite` for pages of one layer, in ascending order."""
    of_leaf = pages >> LEAF_SHIFT
    touched, starts = np.unique(of_leaf, return_index=True)
    edges = [*starts.tolist(), len(pages)]
    done = 0
    for first in range(0, len(touched), ROWS):
        end = min(first + ROWS, len(touched))
        span = slice(edges[first], edges[end])
        rows = np.searchsorted(touched[first:end], of_leaf[span])
        flat = (rows << LEAF_SHIFT) | (pages[span] & LEAF_MASK)
        done += _exchange(txn, layer_id, touched[first:end].tolist(), flat, pages[span], old[span], new[span])
    return done


def _exchange(
    txn: Changes, layer_id: int, numbers: list[int], flat: Numbers, pages: Numbers, old: Refs, new: Refs
) -> int:
    """Entries `flat` (row * 512 + page in the leaf) of some leaves."""
    layer = txn.layer(layer_id)
    kept = [None if layer.sealed else txn.kept_leaf(layer_id, leaf) for leaf in numbers]
    own = np.stack(
        [entry[0] if entry else txn.peek_leaf(layer_id, leaf) for leaf, entry in zip(numbers, kept, strict=True)]
    )
    same = own.reshape(-1)[flat] == old
    if not same.all():
        txn.release(new[~same])
        flat, pages, old, new = flat[same], pages[same], old[same], new[same]
        if not len(flat):
            return 0
    existed: list[bool] = np.any(own, axis=1).tolist()
    own.reshape(-1)[flat] = new
    # Only rows that change: one that cannot be read stands here as a lost one, and stays what it is in the store.
    changed = np.unique(flat >> LEAF_SHIFT).tolist()
    txn.account(layer_id, pages, old, new)
    txn.put_leaves(layer_id, [numbers[row] for row in changed], own[changed], [existed[row] for row in changed])
    for row in changed:
        leaf, entry = numbers[row], kept[row]
        if layer.sealed:
            txn.chill_leaf(leaf)
        elif not layer.parent or entry is not None:
            mine = own[row].copy()
            seen = mine
            if layer.parent and entry is not None:
                seen = np.where(entry[0] == 0, entry[1], mine)
                seen.flags.writeable = False
            mine.flags.writeable = False
            txn.warmed[layer_id, leaf] = mine, seen
        else:
            txn.warmed[layer_id, leaf] = None
    return len(flat)


@dataclass
class Budget:
    """What one step may do. A policy looks at `spent` between pieces, and does at least one."""

    pages: int = STEP_PAGES  # stored again
    leaves: int = STEP_LEAVES  # looked at or changed
    seconds: float = STEP_S  # of the writer's time
    _until: float = field(init=False)

    def __post_init__(self) -> None:
        self._until = time.monotonic() + self.seconds

    @classmethod
    def times(cls, factor: float) -> Budget:
        """So many ordinary ones."""
        return cls(int(STEP_PAGES * factor), int(STEP_LEAVES * factor), STEP_S * factor)

    def spend(self, *, pages: int = 0, leaves: int = 0) -> None:
        self.pages -= pages
        self.leaves -= leaves

    @property
    def spent(self) -> bool:
        return self.pages <= 0 or self.leaves <= 0 or time.monotonic() >= self._until


class Policy:
    """One reason to rewrite. What it remembers between steps is advice: a step may be undone and run again."""

    name = ""

    def step(self, txn: WriteTxn, budget: Budget) -> bool:
        """A piece of the work within the budget; whether there is more to do now."""
        raise NotImplementedError

    def hurry(self) -> float:
        """0, or, while the work piles up, how many ordinary budgets a step gets.

        In a hurry its steps take turns with commits instead of waiting for a quiet moment.
        """
        return 0

    def statistics(self) -> dict[str, int]:
        """Figures for `status`."""
        return {}


class Reap(Policy):
    """Removes the leaves of layers that nothing reaches any more, and what only they refer to."""

    name = "reap"

    def step(self, txn: WriteTxn, budget: Budget) -> bool:
        return txn.reap(max(1, budget.leaves))


@dataclass(frozen=True)
class Stepped:
    """What a step left to do, and what those who keep leaves must look at again."""

    more: bool
    changed: bool  # whether anything was written at all
    chilled: frozenset[int]  # leaves that changed in sealed layers
    heads: Heads
    layers: bool  # whether layers came, went or were put together
    succeeded: Mapping[int, int]  # layer -> the one that took its place


def take(policy: Policy, txn: WriteTxn, budget: Budget) -> Stepped:
    """One step, as a function for `Store.submit`."""
    more = policy.step(txn, budget)
    if txn.changed:
        failpoints.hit("rewrite.before_commit")
    return Stepped(more, txn.changed, frozenset(txn.chilled), txn.warmed, txn.layers_changed, txn.succeeded)
