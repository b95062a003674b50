"""The policy that settles voids: gives up what is stored under a zeroed range, and counts what it covered."""

from __future__ import annotations

from itertools import islice
from typing import Final

from silofs.layers import schema
from silofs.layers.rewrite import Budget, Policy
from silofs.layers.transaction import WriteTxn

BATCH: Final = 32  # leaves between looks at the budget


class Reclaim(Policy):
    """Some leaves at a time, by turns with commits: in everybody's eyes their space is free already."""

    name = "reclaim"

    def __init__(self) -> None:
        self._waiting = 0
        self.settled = 0

    def step(self, txn: WriteTxn, budget: Budget) -> bool:
        if not txn.state.unsettled:
            self._waiting = 0
            return False
        for layer_id in sorted({schema.PAIR.unpack(key)[0] for key in txn.scan_keys(schema.VOID)}):
            layer = txn.layer(layer_id)
            if not layer.unsettled or layer.doomed:
                continue
            while not budget.spent and (some := list(islice(txn.unsettled_leaves(layer_id), BATCH))):
                txn.settle_voids(layer_id, some)
                self.settled += len(some)
                budget.spend(leaves=len(some))
            if budget.spent:
                break
        self._waiting = txn.state.unsettled
        return bool(self._waiting)

    def hurry(self) -> float:
        return 1 if self._waiting else 0

    def statistics(self) -> dict[str, int]:
        return {"settled_leaves": self.settled, "waiting_leaves": self._waiting}
