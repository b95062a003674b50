"""Which policies there are, and how to let them finish where nobody waits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from silofs.layers.aged import Pack
from silofs.layers.clean import Clean
from silofs.layers.merge import Held, MergeLayers
from silofs.layers.reclaim import Reclaim
from silofs.layers.repack import Repack
from silofs.layers.rewrite import Policy, Reap
from silofs.layers.store import Store
from silofs.layers.usage import Usage

DRAIN_STEPS: Final = 100_000  # a policy that never ends is a bug


def policies(usage: Usage, held: Held = lambda txn: ()) -> list[Policy]:
    """Every policy, in the order of their turns. `usage`: of the store that they are for; `held`: see MergeLayers."""
    return [Reap(), Reclaim(), Clean(usage), MergeLayers(held), Pack(), Repack()]


def drain(store: Store, some: Sequence[Policy] | None = None, *, seconds: float = float("inf")) -> int:
    """Step until no policy finds anything to do, or for so long; the number of steps. For stores that nobody serves."""
    until = time.monotonic() + seconds
    steps = 0
    for policy in policies(store.usage) if some is None else some:
        for _ in range(DRAIN_STEPS):
            steps += 1
            if not store.step(policy).result().more or time.monotonic() >= until:
                break
        else:
            raise AssertionError(f"policy {policy.name} finds no end")
    return steps
