"""Seeds to worlds: what kind of faults a seed stands for (the same for the real machines and for the mutants)."""

from __future__ import annotations

from silofs.migrate.source import SourceMachine
from silofs.migrate.target import TargetMachine
from tests.sim.world import World

STEPS = 400
HOSTILITY = (0.16, 0.05, 0.02, 0.3)
RETURNS = (0.2, 0.6)
FAILURES = (0.0, 0.3)


def make(
    seed: int, *, source: type[SourceMachine] = SourceMachine, target: type[TargetMachine] = TargetMachine
) -> World:
    """A connected world. Every third seed moves a group of two, every other one has a golden image at both ends."""
    world = World(seed, volumes=1 + (seed % 3 == 0), golden=seed % 2 == 0, source=source, target=target)
    world.hostility = HOSTILITY[seed % 4]
    world.returns = RETURNS[seed // 4 % 2]
    world.failures = FAILURES[seed // 8 % 2]
    world.connect()
    return world


def run(world: World, steps: int = STEPS) -> World:
    """Faults, then none: I1-I5, I7, I9 after each step, I6 at the end."""
    world.chaos(steps)
    world.calm()
    return world
