"""Random schedules of two real machines, from seeds. A seed that fails becomes a test of its own in test_traces.py."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.sim.schedules import STEPS, make, run
from tests.sim.world import World

SEEDS = 150  # a chunk; the soak runs more of the same


def explain(world: World, seed: int, error: BaseException) -> str:
    return f"seed {seed}: {error}\n" + "\n".join(world.trace[-80:])


@pytest.mark.parametrize("chunk", range(8))
def test_invariants_hold_and_an_owner_is_reached(chunk: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(chunk * SEEDS, (chunk + 1) * SEEDS):
        world = make(seed)
        try:
            run(world, STEPS)
        except AssertionError as error:
            raise AssertionError(explain(world, seed, error)) from error
        seen.update(world.counts)
        seen.update(f"{finished.phase}" for _, finished in world.finished)
    # the schedules get somewhere: otherwise they prove nothing
    assert seen["complete"] > SEEDS // 2 and seen["cancelled"] > SEEDS // 10 and seen["write"] > 10 * SEEDS
    assert {"Grant", "Ack", "Complete", "CompleteAck", "Cancelled", "Unserved", "Pull", "Map"} <= set(seen)
