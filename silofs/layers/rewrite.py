"""The one step that changes what is stored without changing what is read, and the frame for policies that use it.

Cleaning, packing and merging all come down to this: put pages somewhere else and exchange the leaf entries that refer
to them, each only if it is still what it was (`rewrite`). A policy decides which; it does a bounded piece of its work
in one transaction, so a crash leaves the store before the piece or after it, and the next step begins where it finds
it.
docs/background.md has the policies, their budgets and what they cost.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from silofs import failpoints
from silofs.blocks import LEAF_MASK, LEAF_SHIFT
from silofs.limits import STEP_LEAVES, STEP_PAGES, STEP_S

if TYPE_CHECKING:
    from silofs.layers.store import Store
    from silofs.layers.transaction import WriteTxn

Move = tuple[int, int, int, int]
"""(layer, page, reference that is expected there, reference that takes its place)."""


def rewrite(txn: WriteTxn, moves: Iterable[Move]) -> int:
    """Exchange leaf entries by compare-and-swap; the number exchanged.

    What an exchanged entry referred to is released. So is the new reference of one that was not what was expected: a
    policy may have prepared it from an older state. New references must name their (layer, page) already.
    """
    places: dict[tuple[int, int], list[Move]] = {}
    for move in moves:
        places.setdefault((move[0], move[1] >> LEAF_SHIFT), []).append(move)
    done = 0
    for (layer, leaf), some in sorted(places.items()):
        at = np.array([page & LEAF_MASK for _, page, _, _ in some])
        old = np.array([move[2] for move in some], np.uint64)
        new = np.array([move[3] for move in some], np.uint64)
        done += txn.exchange(layer, leaf, at, old, new)
    return done


@dataclass
class Budget:
    """What one step may do. A policy looks at `spent` between pieces, and does at least one."""

    pages: int = STEP_PAGES  # stored again
    leaves: int = STEP_LEAVES  # looked at or changed
    seconds: float = STEP_S  # of the writer's time
    _until: float = field(init=False)

    def __post_init__(self) -> None:
        self._until = time.monotonic() + self.seconds

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

    def behind(self) -> bool:
        """Whether the work piles up: then its steps take turns with commits instead of waiting for a quiet moment."""
        return False

    def statistics(self) -> dict[str, int]:
        """Figures for `status`."""
        return {}


class Reap(Policy):
    """Removes the leaves of layers that nothing reaches any more, and what only they refer to."""

    name = "reap"

    def step(self, txn: WriteTxn, budget: Budget) -> bool:
        return txn.reap(max(1, budget.leaves))


def policies() -> list[Policy]:
    """Every policy, in the order of their turns."""
    return [Reap()]


@dataclass(frozen=True)
class Stepped:
    """What a step left to do, and what those who keep leaves must look at again."""

    more: bool
    chilled: frozenset[int]
    changed: bool  # whether anything was written at all
    layers: bool  # whether layers came, went or were put together


def take(policy: Policy, txn: WriteTxn, budget: Budget) -> Stepped:
    """One step, as a function for `Store.submit`."""
    more = policy.step(txn, budget)
    if txn.changed:
        failpoints.hit("rewrite.before_commit")
    return Stepped(more, frozenset(txn.chilled), txn.changed, txn.layers_changed)


DRAIN_STEPS: Final = 100_000  # a policy that never ends is a bug


def drain(store: Store, some: Sequence[Policy] | None = None, *, seconds: float = float("inf")) -> int:
    """Step until no policy finds anything to do, or for so long; the number of steps. For stores that nobody serves."""
    until = time.monotonic() + seconds
    steps = 0
    for policy in policies() if some is None else some:
        for _ in range(DRAIN_STEPS):
            steps += 1
            if not store.step(policy).result().more or time.monotonic() >= until:
                break
        else:
            raise AssertionError(f"policy {policy.name} finds no end")
    return steps
