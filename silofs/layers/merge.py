"""Which layers are put together, and when (docs/background.md, "merge"). How: join.py.

Merges under way are on record and go on after a restart. Others are looked for layer by layer, a bounded number a step,
and only after something came or went that could make one possible.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import islice
from typing import Final

from silofs.blocks import pages_for
from silofs.errors import Damaged
from silofs.layers import catalog, join, schema
from silofs.layers.catalog import Layer, Merge, Way
from silofs.layers.reader import ReadTxn
from silofs.layers.rewrite import Budget, Policy
from silofs.layers.transaction import WriteTxn
from silofs.limits import MERGE_DEPTH

log = logging.getLogger(__name__)

LOOK_LAYERS: Final = 256
LOOK_S: Final = 30.0  # between looks when nothing came or went: some layers are kept for a time
HELD_S: Final = 2.0  # the same, while something would be merged that somebody has open
SHARE: Final = 8  # an upper layer with so small a part of the lower one's pages gives too little back
SHED_PAGES: Final = 256  # a head is looked at again once so many pages, or ...
SHED_SHARE: Final = 16  # ... so small a part of the lower layer's, are newly hidden
SHED_S: Final = 600.0  # or after this time: what a discard hides is not counted


FOR_EVER: Final = 1 << 63

Held = Callable[[ReadTxn], Collection[int]]


@dataclass
class Pass:
    """One walk over what a head hides."""

    own_pages: int
    leaves: int
    began: float
    at: int | None = 0  # next leaf; None: over


class MergeLayers(Policy):
    """Puts layers together that nothing names. `held`: layers that someone outside the store knows by id or uuid."""

    name = "merge"

    def __init__(self, held: Held = lambda txn: ()) -> None:
        self._held = held
        self._passes: dict[int, Pass] = {}
        self._damaged: set[int] = set()
        self._look_at = 1  # the next layer's id; 0: all were looked at
        self._looked = float("-inf")
        self._seen: tuple[int, ...] = ()
        self.begun = 0
        self.ended = 0
        self.under_way = 0

    def step(self, txn: WriteTxn, budget: Budget) -> bool:
        merges = txn.merges()
        self.under_way = len(merges)
        uppers = {merge.upper for merge in merges}
        held = self._held(txn) if merges else ()
        for merge in merges:
            left_alone = merge.lower in self._damaged or merge.lower in held or merge.upper in held
            if not left_alone and self._carry_on(txn, merge, merge.lower in uppers, budget):
                return True
        return self._look(txn, budget)

    # Merges on record

    def _carry_on(self, txn: WriteTxn, merge: Merge, waits: bool, budget: Budget) -> bool:
        """A piece of it; False when there is nothing to do now. `waits`: its lower layer is another one's upper."""
        upper = txn.layer(merge.upper)
        if upper.doomed:
            return False
        try:
            if merge.way == Way.SHED and not upper.sealed:
                return self._shed(txn, merge, waits, budget)
            if waits:
                return False
            if merge.way == Way.SHED:
                merge = join.turn(txn, merge)
            if merge.way == Way.UP:
                self.ended += not join.up(txn, merge, budget)
            else:
                if not upper.leaves and upper.pins:
                    return False  # someone holds it by its id
                self.ended += not join.down(txn, merge, budget)
        except Damaged as error:
            if txn.spoilt is None:
                log.error("%s; layers %d and %d stay apart", error, merge.lower, merge.upper)
                self._damaged.add(merge.lower)
            raise
        return True

    def _shed(self, txn: WriteTxn, merge: Merge, waits: bool, budget: Budget) -> bool:
        lower, upper = txn.layer(merge.lower), txn.layer(merge.upper)
        if not lower.leaves:
            if not waits:
                join.end_shed(txn, merge)
                self._passes.pop(lower.id, None)
                self.ended += 1
            return not waits
        walk = self._passes.get(lower.id)
        if walk is None or (walk.at is None and self._worth_another(walk, lower, upper)):
            walk = self._passes[lower.id] = Pass(upper.own_pages, upper.leaves, time.monotonic())
        if walk.at is None:
            return False
        walk.at = join.shed(txn, merge, walk.at, budget)
        return True

    def _worth_another(self, walk: Pass, lower: Layer, upper: Layer) -> bool:
        hidden = abs(upper.own_pages - walk.own_pages)
        enough = min(max(SHED_PAGES, lower.own_pages // SHED_SHARE), lower.own_pages)
        return (hidden >= enough > 0) or time.monotonic() - walk.began > SHED_S

    # New ones

    def _look(self, txn: WriteTxn, budget: Budget) -> bool:
        """Look at some layers; True while there are more, or a merge has begun."""
        rows = txn.state.rows
        tables = (schema.LAYER, schema.SNAPSHOT, schema.PIN, schema.MERGE)
        seen = (txn.disk_full, txn.state.next_layer, *(rows.get(table.name, 0) for table in tables))
        if seen != self._seen or time.monotonic() - self._looked > LOOK_S:
            self._seen, self._looked, self._look_at = seen, time.monotonic(), 1
        if not self._look_at:
            return False
        # On a full disk room for what is written now is worth more than a short way back.
        held, now = self._held(txn), time.time_ns() if not txn.disk_full else FOR_EVER
        last = 0
        for upper in islice(txn.layers_from(self._look_at), LOOK_LAYERS):
            last = upper.id
            lower = txn.layer(upper.parent) if upper.parent else None
            if lower is None or not self._fit(txn, lower, upper, now):
                continue
            if lower.id in held or upper.id in held:
                self._looked = time.monotonic() - LOOK_S + HELD_S  # nothing tells when that ends
                continue
            if lower.voids:
                budget.spend(leaves=txn.spell_out(lower.id, max(1, budget.leaves)))
                return True
            join.begin(txn, lower, upper)
            self.begun += 1
            return True
        self._look_at = last + 1 if last else 0
        return bool(last)

    def _fit(self, txn: WriteTxn, lower: Layer, upper: Layer, now: int) -> bool:
        """Whether two layers can be put together, and should be."""
        reached = lower.children > 1 or lower.snapshots or lower.pins or upper.pins
        if reached or not lower.uuid or lower.doomed or upper.doomed or lower.id in self._damaged:
            return False
        if lower.remote_pages or upper.remote_pages or lower.mapped < pages_for(lower.size):
            return False
        if lower.parent and txn.layer(lower.parent).merging:
            return False
        if not upper.sealed:
            return bool(upper.leaves) and now >= lower.kept_ns and _gives_back(lower, upper)
        if upper.data_pages == catalog.UNCOUNTED or upper.mapped < pages_for(upper.size):
            return False
        return (now >= lower.kept_ns and _gives_back(lower, upper)) or len(txn.chain(upper.id)) > MERGE_DEPTH

    def statistics(self) -> dict[str, int]:
        return {"under_way": self.under_way, "begun": self.begun, "ended": self.ended, "damaged": len(self._damaged)}


def _gives_back(lower: Layer, upper: Layer) -> bool:
    return not lower.kept_ns or upper.own_pages * SHARE >= lower.own_pages
