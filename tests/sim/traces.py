"""Scripts: one for each way in which a shortcut breaks an invariant. On the real machines each must end well.

The first nine are the traces that the protocol's model check prints for its mutants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from silofs.migrate import events as ev
from silofs.migrate import messages as ms
from silofs.migrate.source import SourceMachine
from silofs.migrate.source import State as SourceState
from silofs.migrate.states import Mode, Options, Phase, Role, Switchover
from silofs.migrate.target import State as TargetState
from silofs.migrate.target import TargetMachine
from tests.sim.store import REMOTE
from tests.sim.world import Node, World

Classes = tuple[Any, ...]
Trace = Callable[[type[SourceMachine], type[TargetMachine]], None]
TRACES: dict[str, Trace] = {}


def trace(function: Trace) -> Trace:
    TRACES[function.__name__] = function
    return function


def begin(classes: Classes, mode: Mode = Mode.AUTO, seed: int = 1) -> World:
    """A connected world with a migration from A to B under way."""
    world = World(seed, source=classes[0], target=classes[1])
    world.connect()
    assert world.start(world.a, Options(mode=mode, switchover=Switchover.NOW)) == ""
    return world


def source(world: World, node: Node | None = None) -> SourceState | None:
    machine = world.machine(node or world.a, SourceMachine)
    return machine.state if machine is not None else None


def target(world: World, node: Node | None = None) -> TargetState | None:
    machine = world.machine(node or world.b, TargetMachine)
    return machine.state if machine is not None else None


def role(world: World, node: Node) -> Role:
    return node.cache.ownership(world.volumes[0]).role


def only(world: World, node: Node, steps: int = 60) -> None:
    """Only this node gets to do anything."""
    for _ in range(steps):
        if not world.deliver(node) and not world.deliver_bulk(node) and node.pending:
            world.run(node, 0, calm=True)
        world.check()


def finish(world: World, owner: Node, epoch: int) -> World:
    for node in world.nodes:
        world.write(node)
    world.calm()
    record = owner.cache.ownership(world.volumes[0])
    assert (record.role, record.epoch) == (Role.OWNER, epoch), world.trace[-40:]
    return world


def returned(world: World) -> None:
    """A's operator cancels after B owns; the volumes come back to A at epoch 3 and everything is settled."""
    world.until(lambda: target(world) is TargetState.PULLING)
    world.write(world.b)
    world.until(lambda: world.machine(world.a, SourceMachine).record.acked)
    world.drive(world.a, world.machine(world.a, SourceMachine), ev.OperatorCancel())
    world.until(lambda: role(world, world.a) is Role.OWNER)


@trace
def grant_before_cede(*classes: Any) -> None:
    world = begin(classes)
    world.until(lambda: source(world) is SourceState.CEDING)
    only(world, world.b)
    assert role(world, world.b) is Role.INCOMING
    finish(world, world.b, 2)


@trace
def ceded_not_durable(*classes: Any) -> None:
    world = begin(classes)
    world.until(lambda: source(world) is SourceState.CEDED)
    only(world, world.b)
    world.crash(world.a)
    world.restart(world.a)
    finish(world, world.b, 2)


@trace
def volatile_owner(*classes: Any) -> None:
    world = begin(classes)
    world.until(lambda: target(world) is TargetState.PULLING)
    world.check()
    world.write(world.b)
    world.crash(world.b)
    world.restart(world.b)
    finish(world, world.b, 2)


@trace
def auto_resume(*classes: Any) -> None:
    world = begin(classes)
    world.until(lambda: source(world) is SourceState.CEDED)
    for _ in range(5):
        world.wire["B"].clear()
        world.tick()
        only(world, world.a)
    world.disconnect()
    for _ in range(5):
        world.tick()
        only(world, world.a)
    assert role(world, world.a) is Role.CEDED
    finish(world, world.b, 2)


@trace
def self_promote(*classes: Any) -> None:
    world = begin(classes)
    world.until(lambda: source(world) is SourceState.PREPARING)
    world.disconnect()
    only(world, world.b)
    for _ in range(5):
        world.tick()
        only(world, world.b)
    assert role(world, world.b) is Role.INCOMING
    finish(world, world.b, 2)


@trace
def no_freeze(*classes: Any) -> None:
    world = begin(classes)
    world.until(lambda: source(world) is SourceState.CEDING)
    world.write(world.a)
    finish(world, world.b, 2)


@trace
def early_complete(*classes: Any) -> None:
    world = begin(classes, Mode.POSTCOPY)
    world.until(lambda: role(world, world.b) is Role.OWNER)
    assert world.b.cache.remote(world.volumes[0])
    for _ in range(20):
        only(world, world.b, 1)
        if world.a.pending:
            world.run(world.a, 0, calm=True)
        if any(isinstance(message, ms.Complete | ms.Ack) for message in world.wire["A"]):
            world.deliver(world.a)
        world.check()
    finish(world, world.b, 2)


@trace
def no_tombstone(*classes: Any) -> None:
    world = begin(classes, Mode.POSTCOPY)
    world.until(lambda: any(isinstance(message, ms.Grant) for _, message in world.old))
    grant = next(message for _, message in world.old if isinstance(message, ms.Grant))
    returned(world)
    finish(world, world.a, 3)
    assert role(world, world.b) is Role.RETIRED
    assert world.b.session is not None
    for replayed in (grant, replace(grant, session=world.b.session)):
        world.receive(world.b, replayed)
        only(world, world.b)
    assert role(world, world.b) is Role.RETIRED
    finish(world, world.a, 3)


@trace
def no_tombstone_incoming(*classes: Any) -> None:
    """B owned once, is INCOMING again, forgets: its epoch stays."""
    world = begin(classes, Mode.POSTCOPY)
    returned(world)
    finish(world, world.a, 3)
    assert world.start(world.a, Options(switchover=Switchover.MANUAL)) == ""
    world.until(lambda: source(world) is SourceState.WAITING)
    world.disconnect()
    world.drive(world.b, world.machine(world.b, TargetMachine), ev.OperatorCancel())
    only(world, world.b)
    assert world.b.cache.ownership(world.volumes[0]).epoch == 3
    finish(world, world.b, 4)


@trace
def grant_needs_incoming(*classes: Any) -> None:
    world = begin(classes)
    world.until(lambda: source(world) is SourceState.CEDED)
    world.disconnect()
    world.drive(world.b, world.machine(world.b, TargetMachine), ev.OperatorCancel())
    only(world, world.b)
    assert role(world, world.b) is Role.NONE and not world.b.machines
    finish(world, world.b, 2)


def fail_commit(world: World, node: Node, *, landed: bool) -> None:
    """The commit at the head of the queue fails; `landed`: it is visible, but not synced."""
    machine, action = node.pending.pop(0)
    assert isinstance(action, ev.Commit)
    if landed:
        node.cache = node.cache.apply(action)
    world.drive(node, machine, ev.CommitFailed(action.token))
    world.check()


@trace
def thaw_on_unknown(*classes: Any) -> None:
    world = begin(classes)
    world.until(lambda: source(world) is SourceState.CEDING)
    fail_commit(world, world.a, landed=True)
    world.write(world.a)
    world.check()
    finish(world, world.b, 2)


@trace
def grant_on_unknown(*classes: Any) -> None:
    world = begin(classes)
    world.until(lambda: source(world) is SourceState.CEDING)
    fail_commit(world, world.a, landed=True)
    only(world, world.b)
    finish(world, world.b, 2)


@trace
def no_rewrite(*classes: Any) -> None:
    """CEDED is visible but not synced; the daemon is killed, its successor believes it, then the power goes."""
    world = begin(classes)
    world.until(lambda: source(world) is SourceState.CEDING)
    fail_commit(world, world.a, landed=True)
    world.crash(world.a)
    world.restart(world.a)
    world.connect()
    for _ in range(60):  # a slow disk: nothing is committed at A meanwhile
        world.a.pending = [entry for entry in world.a.pending if not isinstance(entry[1], ev.Commit)]
        only(world, world.a, 1)
        only(world, world.b, 1)
    world.crash(world.a, power=True)
    world.restart(world.a)
    finish(world, world.b, 2)


@trace
def grant_once(*classes: Any) -> None:
    world = begin(classes)
    world.until(lambda: source(world) is SourceState.CEDED)
    world.disconnect()
    finish(world, world.b, 2)


@trace
def complete_once(*classes: Any) -> None:
    world = begin(classes)
    world.until(lambda: target(world) is TargetState.COMPLETE)
    world.disconnect()
    finish(world, world.b, 2)


@trace
def maps_later(*classes: Any) -> None:
    world = begin(classes, Mode.POSTCOPY)
    world.until(lambda: source(world) is SourceState.PREPARING)
    for _ in range(4):
        world.write(world.a)
    world.until(lambda: source(world) is SourceState.CEDED)
    machine = world.machine(world.a, SourceMachine)
    world.wire["B"].clear()
    machine._maps = ()  # the final layer's map does not fit into the GRANT
    world.tick()
    finish(world, world.b, 2)


@trace
def no_retry(*classes: Any) -> None:
    world = begin(classes, Mode.POSTCOPY)
    finish(world, world.b, 2)


def is_complete(commit: ev.Commit) -> bool:
    return commit.record is not None and commit.record.phase is Phase.COMPLETE


@trace
def complete_during_return(*classes: Any) -> None:
    world = begin(classes, Mode.POSTCOPY)
    world.until(lambda: target(world) is TargetState.PULLING and world.machine(world.a, SourceMachine).record.acked)
    world.drive(world.b, world.machine(world.b, TargetMachine), ev.OperatorCancel())
    world.until(lambda: source(world, world.b) in (SourceState.COPYING, SourceState.SEALING))
    held = []  # COMPLETE's commit, if the first migration gets so far, lands after that of the cession
    for _ in range(400):
        late = [entry for entry in world.b.pending if isinstance(entry[1], ev.Commit) and is_complete(entry[1])]
        held += late
        world.b.pending = [entry for entry in world.b.pending if entry not in late]
        if source(world, world.b) is SourceState.CEDED or not world.progress():
            break
    world.b.pending += held
    world.calm()
    assert role(world, world.a) is Role.OWNER


# Beyond the shortcuts: traces that found a bug, or that a rule of the protocol is about


@trace
def return_while_pages_are_missing(*classes: Any) -> None:
    world = begin(classes, Mode.POSTCOPY)
    returned(world)
    assert world.b.cache.remote(world.volumes[0]) or REMOTE not in world.acked[world.volumes[0]].values()
    finish(world, world.a, 3)
    assert role(world, world.b) is Role.RETIRED


@trace
def cancelled_while_its_forgetting_is_not_confirmed(*classes: Any) -> None:
    """Seed 829 of the first schedules: the retry of an old machine wrote its ownership over a newer migration's."""
    world = begin(classes)
    world.until(lambda: target(world) is TargetState.INCOMING)
    world.drive(world.a, world.machine(world.a, SourceMachine), ev.OperatorCancel())
    world.until(lambda: target(world) is TargetState.FORGETTING)
    fail_commit(world, world.b, landed=True)
    assert world.start(world.a, Options(switchover=Switchover.NOW)) == ""
    world.until(lambda: role(world, world.b) is Role.OWNER)
    finish(world, world.b, 2)


@trace
def both_cut_off_at_the_commit_point(*classes: Any) -> None:
    world = begin(classes)
    world.until(lambda: source(world) is SourceState.CEDED)
    world.crash(world.a, power=True)
    world.crash(world.b, power=True)
    finish(world, world.b, 2)


@trace
def there_and_back_and_there(*classes: Any) -> None:
    world = begin(classes)
    finish(world, world.b, 2)
    for node, epoch in ((world.a, 3), (world.b, 4), (world.a, 5)):
        assert world.start(world.other(node), Options(switchover=Switchover.NOW)) == ""
        finish(world, node, epoch)


@trace
def the_base_is_gone(*classes: Any) -> None:
    """B had the golden image when it was offered, cancelled on its own, deleted it: the GRANT describes all anew."""
    world = World(5, golden=True, source=classes[0], target=classes[1])
    world.connect()
    assert world.start(world.a, Options(switchover=Switchover.NOW)) == ""
    world.until(lambda: source(world) is SourceState.CEDED)
    machine = world.machine(world.a, SourceMachine)
    assert machine.record.bases[0].base.startswith(b"golden")
    world.disconnect()
    world.drive(world.b, world.machine(world.b, TargetMachine), ev.OperatorCancel())
    only(world, world.b)
    world.b.cache = world.b.cache.copy()
    world.b.cache.layers = {}
    world.b.disk = world.b.cache
    finish(world, world.b, 2)
    assert not any(uuid.startswith(b"golden") for uuid in world.b.cache.layers)


@trace
def switchover_waits_for_its_command(*classes: Any) -> None:
    world = World(3, source=classes[0], target=classes[1])
    world.connect()
    world.a.writers = 1
    assert world.start(world.a, Options(switchover=Switchover.MANUAL)) == ""
    world.until(lambda: source(world) is SourceState.WAITING)
    machine = world.machine(world.a, SourceMachine)
    assert machine.phase is Phase.PRECOPY
    for fence in (False, True):
        world.drive(world.a, machine, ev.Writers(1))
        world.drive(world.a, machine, ev.OperatorSwitchover(fence))
        assert world.replies[-1][1].refusal is (None if fence else ms.Refusal.BUSY)
    finish(world, world.b, 2)
