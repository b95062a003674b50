"""A crash of either side, or both, in every pair of phases, by SIGKILL and by power cut.

P1 offer/ready, P2 pre-copy, P3 frozen, P4 ceded and not granted, P5 pulling, P6 complete and not acknowledged.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from silofs.migrate import events as ev
from silofs.migrate import messages as ms
from silofs.migrate.source import SourceMachine
from silofs.migrate.source import State as SourceState
from silofs.migrate.states import Mode, Options, Role
from silofs.migrate.target import State as TargetState
from silofs.migrate.target import TargetMachine
from tests.sim.traces import begin, finish, role, source, target
from tests.sim.world import World

REAL = (SourceMachine, TargetMachine)
PHASES: dict[str, Callable[[World], bool]] = {
    "P1": lambda w: source(w) is SourceState.OFFERING and target(w) is not TargetState.INCOMING,
    "P2": lambda w: source(w) is SourceState.COPYING,
    "P3": lambda w: source(w) is SourceState.FREEZING,
    "P4": lambda w: source(w) is SourceState.CEDED and role(w, w.b) is Role.INCOMING,
    "P5": lambda w: target(w) is TargetState.PULLING,
    "P6": lambda w: target(w) is TargetState.COMPLETE,
}


def until(world: World, reached: Callable[[World], bool]) -> None:
    world.until(lambda: reached(world))


def write_somewhere(world: World) -> None:
    for node in world.nodes:
        world.write(node)


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
@pytest.mark.parametrize("at_b", PHASES)
@pytest.mark.parametrize("at_a", PHASES)
def test_a_crashes_in_one_phase_and_b_in_another(at_a: str, at_b: str, power: bool) -> None:
    for seed in range(4):
        world = begin(REAL, Mode.POSTCOPY if seed % 2 else Mode.AUTO, seed)
        crashes = sorted([(at_a, world.a), (at_b, world.b)], key=lambda crash: crash[0])
        for phase, node in crashes:
            if at_a != at_b or node is world.a:
                until(world, lambda w, phase=phase: PHASES[phase](w) or w.settled_pair())  # type: ignore[misc]
            write_somewhere(world)
            world.crash(node, power=power)
            if at_a != at_b:
                world.restart(node)
                world.connect()
        for node in world.nodes:
            world.restart(node)
        finish(world, world.b, 2)


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
@pytest.mark.parametrize("at", PHASES)
def test_both_crash_at_once_and_one_stays_away(at: str, power: bool) -> None:
    """Whoever is alone admits writes only if it owns for certain; and then the other comes back."""
    for seed in range(6):
        world = begin(REAL, Mode.POSTCOPY if seed % 2 else Mode.AUTO, seed)
        until(world, PHASES[at])
        world.crash(world.a, power=power)
        world.crash(world.b, power=power)
        alone = world.nodes[seed // 2 % 2]
        world.restart(alone)
        for _ in range(30):
            if not world.progress():
                world.tick()
            world.write(alone)
        world.check()
        finish(world, world.b, 2)


@pytest.mark.parametrize("at", PHASES)
def test_a_partition_in_every_phase(at: str) -> None:
    """Both sides notice, or only one does for a long time."""
    for silent in (None, "A", "B"):
        world = begin(REAL, seed=2)
        until(world, PHASES[at])
        node = {"A": world.a, "B": world.b, None: None}[silent]
        world.disconnect(silent=node)
        for _ in range(40):
            if not world.progress():
                world.tick()
            write_somewhere(world)
        world.check()
        finish(world, world.b, 2)


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
@pytest.mark.parametrize(
    "at", [SourceState.OFFERING, SourceState.COPYING, SourceState.FREEZING, SourceState.PUSHING, SourceState.CEDED]
)
def test_a_return_that_is_interrupted(at: SourceState, power: bool) -> None:
    """RETURN goes on after a restart of either end; or, undone, the volumes stay where they are and complete."""
    for seed in range(8):
        world = begin(REAL, Mode.POSTCOPY, seed)
        until(world, lambda w: target(w) is TargetState.PULLING and w.machine(w.a, SourceMachine).record.acked)
        world.write(world.b)
        world.start(world.b, Options(), origin=world.machine(world.b, TargetMachine).migration)
        world.machine(world.b, TargetMachine).held = True
        if at is not SourceState.OFFERING:
            until(world, lambda w: source(w, w.b) is SourceState.SEALING)
        world.write(world.b)
        if at is SourceState.PUSHING:  # something must be written between the last round and the freeze
            until(world, lambda w: source(w, w.b) is SourceState.PREPARING)
            world.write(world.b)
        until(world, lambda w: source(w, w.b) in (at, SourceState.CEDED))
        assert source(world, world.b) is at
        world.crash(world.nodes[seed % 2], power=power)
        if seed % 4 > 1:
            world.crash(world.nodes[1 - seed % 2], power=power)
        finish(world, world.a, 3)


def test_nothing_that_is_durable_is_sent_again() -> None:
    """Anti-toy: what arrived before a kill of either side is not asked for after it, in no phase."""
    for seed in range(12):
        world = begin(REAL, Mode.POSTCOPY if seed % 2 else Mode.AUTO, seed)
        for _ in range(6):
            until(world, lambda w: bool(w.lanes["B"]) or w.settled_pair())
            while world.deliver_bulk(world.b):
                pass
            world.crash(world.nodes[seed % 2])
            world.restart(world.nodes[seed % 2])
            world.connect()
        finish(world, world.b, 2)
        twice = {key: count for key, count in world.sent_pages.items() if count > 1}
        assert not twice, f"seed {seed}: sent again {twice}"


def test_holes_and_zeros_are_never_asked_for() -> None:
    """The fake source asserts that a PULL names data pages only; this makes sure that there are others."""
    world = begin(REAL, seed=4)
    world.a.cache = world.a.cache.write(world.volumes[0], 3, 0)
    world.acked[world.volumes[0]] = {k: v for k, v in world.acked[world.volumes[0]].items() if k != 3}
    finish(world, world.b, 2)
    assert 3 not in {page for _, _, page in world.sent_pages}


def test_demand_overtakes_the_sweep() -> None:
    """A page that a reader waits for is asked for although the sweep has used up the credit."""
    world = begin(REAL, Mode.POSTCOPY, 3)
    world.until(lambda: target(world) is TargetState.PULLING)
    machine = world.machine(world.b, TargetMachine)
    machine.transfer.order.window = 0
    world.until(lambda: not world.b.pending and not world.wire["A"] and not world.lanes["B"])
    remote = [
        (uuid, page) for uuid, layer in world.b.cache.layers.items() for page, value in layer.pages.items() if value < 0
    ]
    assert remote
    uuid, page = remote[-1]
    world.drive(world.b, machine, ev.Demand(uuid, ms.Run(page, 1)))
    asked = [message for message in world.wire["A"] if isinstance(message, ms.Pull)]
    assert [(m.segment, m.runs, m.priority) for m in asked] == [(uuid, (ms.Run(page, 1),), ms.Priority.DEMAND)]
    machine.transfer.order.window = 4096
    finish(world, world.b, 2)
