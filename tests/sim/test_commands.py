"""What an operator asks for and what a peer refuses: outcomes, and that a refusal changes nothing."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from silofs import limits
from silofs.errors import Busy, Exit, ProtocolError, UserError
from silofs.migrate import events as ev
from silofs.migrate import messages as ms
from silofs.migrate import strays
from silofs.migrate.source import SourceMachine
from silofs.migrate.source import State as SourceState
from silofs.migrate.states import Mode, Options, Ownership, Phase, Role, Switchover
from silofs.migrate.target import State as TargetState
from silofs.migrate.target import TargetMachine
from tests.sim.store import LOST, Layer
from tests.sim.traces import begin, finish, only, role, source, target
from tests.sim.world import World

REAL = (SourceMachine, TargetMachine)


def ended(world: World, name: str = "A") -> ev.Finished:
    return next(finished for node, finished in world.finished if node == name)


def new(switchover: Switchover, *, writers: int = 0, fence: bool = False, mode: Mode = Mode.AUTO) -> World:
    world = World(2)
    world.connect()
    world.a.writers = writers
    assert world.start(world.a, Options(mode, switchover, fence)) == ""
    return world


def start(writers: int, options: Options, remote: int = 0, **record: object) -> None:
    owner = Ownership(b"v" * 16, Role.OWNER, 1)
    for name, value in record.items():
        owner = replace(owner, **{name: value})
    SourceMachine.start(
        migration=b"m" * 16, peer=b"p" * 16, ownership=(owner,), offered=(), options=options,
        writers=writers, remote_pages=remote, now=0.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("writers", "options", "remote", "error", "code"),
    [
        (1, Options(switchover=Switchover.AUTO), 0, UserError, Exit.USAGE),
        (1, Options(switchover=Switchover.NOW), 0, Busy, Exit.BUSY),
        (0, Options(switchover=Switchover.NOW), 1, Busy, Exit.BUSY),
    ],
)
def test_refused_before_anything_is_sent(
    writers: int, options: Options, remote: int, error: type[UserError], code: int
) -> None:
    with pytest.raises(error) as caught:
        start(writers, options, remote)
    assert caught.value.exit_code == code


def test_started_with_writers_where_that_is_allowed() -> None:
    start(1, Options(switchover=Switchover.MANUAL))
    start(1, Options(switchover=Switchover.NOW, fence_writer=True))
    for record in ({"role": Role.CEDED}, {"role": Role.INCOMING}, {"migration": b"x" * 16}):
        with pytest.raises(UserError):
            start(0, Options(), **record)


@pytest.mark.parametrize("at", [SourceState.OFFERING, SourceState.COPYING, SourceState.PREPARING])
def test_auto_ends_busy_when_a_writer_appears(at: SourceState) -> None:
    world = new(Switchover.AUTO)
    world.until(lambda: source(world) is at)
    world.a.writers = 1
    world.drive(world.a, world.machine(world.a, SourceMachine), ev.Writers(1))
    finish(world, world.a, 1)
    assert (ended(world).phase, ended(world).reason) == (Phase.FAILED, ms.Refusal.BUSY)
    assert role(world, world.b) is Role.NONE


@pytest.mark.parametrize("switchover", [Switchover.NOW, Switchover.AUTO])
def test_a_writer_that_appears_in_the_freeze_ends_now(switchover: Switchover) -> None:
    world = new(switchover)
    world.until(lambda: source(world) is SourceState.FREEZING)
    world.a.writers = 1
    world.until(lambda: not world.a.machines)
    assert world.a.gates[world.volumes[0]] == "open"
    world.a.writers = 0
    finish(world, world.a, 1)
    assert ended(world).reason is ms.Refusal.BUSY


def test_a_writer_that_appears_in_the_freeze_makes_manual_wait() -> None:
    world = new(Switchover.MANUAL)
    machine = world.machine(world.a, SourceMachine)
    world.until(lambda: source(world) is SourceState.WAITING)
    world.drive(world.a, machine, ev.OperatorSwitchover())
    world.until(lambda: source(world) is SourceState.FREEZING)
    world.a.writers = 1
    world.until(lambda: source(world) is SourceState.WAITING)
    assert world.replies[-1][1].refusal is ms.Refusal.BUSY and not machine.commanded
    world.drive(world.a, machine, ev.OperatorSwitchover(fence_writer=True))
    finish(world, world.b, 2)


def test_a_freeze_that_takes_too_long_is_thawed_and_tried_again() -> None:
    world = new(Switchover.NOW)
    machine = world.machine(world.a, SourceMachine)
    for tries in range(limits.FREEZE_TRIES_MAX):
        world.until(lambda: source(world) is SourceState.FREEZING)
        assert machine.deadline() == pytest.approx(world.now + limits.FREEZE_S, abs=0.1)
        slow = [entry for entry in world.a.pending if isinstance(entry[1], ev.Freeze)]
        world.a.pending.remove(slow[0])
        action = slow[0][1]
        assert isinstance(action, ev.Freeze)
        late = world._freeze(world.a, action)
        world.now += limits.FREEZE_S
        if tries % 2:
            world.perform(world.a, machine, machine.tick(world.now))
        world.drive(world.a, machine, late)  # worth nothing now, ticked or not
        assert machine.state not in (SourceState.CEDING, SourceState.FREEZING)
        assert world.a.gates[world.volumes[0]] == "open"
        world.write(world.a)
        world.check()
    finish(world, world.a, 1)
    assert ended(world).reason is ms.Refusal.TRY_AGAIN


@pytest.mark.parametrize("reason", [ms.Refusal.NAME, ms.Refusal.SPACE, ms.Refusal.AUTHORISATION])
def test_an_offer_that_is_refused_leaves_nothing(reason: ms.Refusal) -> None:
    world = new(Switchover.NOW)
    world.until(lambda: target(world) is TargetState.CHECKING)
    machine, action = world.b.pending.pop()
    assert isinstance(action, ev.CheckOffer)
    world.drive(world.b, machine, ev.OfferChecked(action.token, reason, "why"))
    world.until(lambda: not world.a.machines)
    finish(world, world.a, 1)
    assert (ended(world).phase, ended(world).reason) == (Phase.FAILED, reason)
    assert not world.b.cache.own and not world.b.cache.migrations


@pytest.mark.parametrize(
    ("owner", "reason"),
    [
        ({"role": Role.OWNER, "epoch": 1}, ms.Refusal.ROLE),
        ({"role": Role.FENCED, "epoch": 1}, ms.Refusal.ROLE),
        ({"role": Role.CEDED, "epoch": 1}, ms.Refusal.ROLE),
        ({"role": Role.RETIRED, "epoch": 2}, ms.Refusal.EPOCH),
        ({"role": Role.INCOMING, "epoch": 0, "peer": b"C" * 16, "offered_epoch": 2}, ms.Refusal.BUSY),
    ],
)
def test_an_offer_that_the_records_do_not_allow(owner: dict[str, object], reason: ms.Refusal) -> None:
    record = replace(Ownership(b"v" * 16, Role.NONE, 0), **owner)
    volumes = (ms.VolumeEpoch(b"v" * 16, 2),)
    machine = TargetMachine.create(b"m" * 16, b"A" * 16, volumes, (record,))
    machine.handle(ev.Connected(b"s" * 16, ms.Hello((1, 1), b"A" * 16, b"s" * 16, (), (), ())), 0.0)
    offer = ms.Offer(b"m" * 16, b"s" * 16, volumes, (ms.Offered(b"v" * 16, "vm", 4096, 1, ()),), False, b"")
    sent = [action.message for action in machine.handle(ev.Received(offer), 0.0) if isinstance(action, ev.Send)]
    assert [(type(message), getattr(message, "reason", None)) for message in sent] == [(ms.Refuse, reason)]
    assert machine.done


def test_no_space_for_the_rest_ends_now_and_makes_manual_wait() -> None:
    for switchover in (Switchover.NOW, Switchover.MANUAL):
        world = new(switchover)
        world.until(lambda w=world: source(w) in (SourceState.WAITING, SourceState.PREPARING))  # type: ignore[misc]
        machine = world.machine(world.a, SourceMachine)
        if switchover is Switchover.MANUAL:
            world.drive(world.a, machine, ev.OperatorSwitchover())
        world.until(lambda w=world: any(isinstance(a, ev.CheckPrepare) for _, a in w.b.pending))  # type: ignore[misc]
        at = next(i for i, (_, action) in enumerate(world.b.pending) if isinstance(action, ev.CheckPrepare))
        asked, action = world.b.pending.pop(at)
        world.drive(world.b, asked, ev.PrepareChecked(action.token, ms.Refusal.SPACE))  # type: ignore[attr-defined]
        only(world, world.a)
        if switchover is Switchover.MANUAL:
            assert machine.state is SourceState.WAITING and world.replies[-1][1].refusal is ms.Refusal.SPACE
            finish(world, world.b, 2)
        else:
            finish(world, world.a, 1)
            assert ended(world).reason is ms.Refusal.SPACE


@pytest.mark.parametrize("at", [SourceState.OFFERING, SourceState.COPYING, SourceState.PREPARING, SourceState.FREEZING])
@pytest.mark.parametrize("where", ["A", "B"])
def test_cancel_before_the_commit_point_leaves_the_source_as_it_was(at: SourceState, where: str) -> None:
    world = new(Switchover.NOW)
    kind = SourceMachine if where == "A" else TargetMachine
    node = world.a if where == "A" else world.b
    world.until(lambda: source(world) is at and world.machine(node, kind) is not None)
    world.drive(node, world.machine(node, kind), ev.OperatorCancel())
    world.until(world.settled_pair)
    finish(world, world.a, 1)
    assert ended(world).reason is ms.Refusal.CANCELLED
    assert (
        role(world, world.b) is Role.NONE
        and not world.b.cache.migrations
        and not world.b.cache.layers.keys() - {b"golden----------"}
    )


def test_cancel_while_the_outcome_of_ceding_is_unknown_is_refused() -> None:
    world = begin(REAL)
    world.until(lambda: source(world) is SourceState.CEDING)
    world.drive(world.a, world.machine(world.a, SourceMachine), ev.OperatorCancel())
    assert world.replies[-1][1].refusal is ms.Refusal.TRY_AGAIN
    finish(world, world.b, 2)


def test_renaming_or_deleting_before_the_freeze_cancels_and_is_locked_out_after() -> None:
    world = new(Switchover.NOW)
    world.until(lambda: source(world) is SourceState.COPYING)
    machine = world.machine(world.a, SourceMachine)
    assert not machine.locked
    world.drive(world.a, machine, ev.VolumeChanged(world.volumes[0]))
    finish(world, world.a, 1)
    assert ended(world).reason is ms.Refusal.CHANGED
    world = new(Switchover.NOW)
    world.until(lambda: source(world) is SourceState.FREEZING)
    machine = world.machine(world.a, SourceMachine)
    assert machine.locked
    world.drive(world.a, machine, ev.VolumeChanged(world.volumes[0]))
    finish(world, world.b, 2)


def test_pause_stops_the_sweep_and_not_demand() -> None:
    world = begin(REAL, Mode.POSTCOPY, 3)
    world.until(lambda: target(world) is TargetState.PULLING)
    machine = world.machine(world.b, TargetMachine)
    world.drive(world.b, machine, ev.OperatorPause())
    for _ in range(200):
        if not world.progress():
            world.tick()
    assert role(world, world.b) is Role.OWNER and world.b.cache.remote(world.volumes[0])
    uuid, page = next((u, p) for u, layer in world.b.cache.layers.items() for p, v in layer.pages.items() if v < 0)
    world.drive(world.b, machine, ev.Demand(uuid, ms.Run(page, 1)))
    world.until(lambda: world.b.cache.layers[uuid].pages[page] > 0)
    assert world.b.cache.remote(world.volumes[0])
    finish(world, world.b, 2)


def test_lost_pages_keep_the_source_until_they_are_accepted() -> None:
    world = begin(REAL, Mode.POSTCOPY, 3)
    world.until(lambda: source(world) is SourceState.CEDED)
    uuid, layer = next((u, la) for u, la in world.a.cache.layers.items() if la.pages and not u.startswith(b"golden"))
    page = next(iter(layer.pages))
    world.a.cache = world.a.cache.copy()
    world.a.cache.layers[uuid] = Layer(layer.parent, layer.pages | {page: LOST})
    world.a.disk = world.a.cache
    world.acked[world.volumes[0]][page] = LOST
    world.until(lambda: any(reply.refusal is ms.Refusal.LOST for _, reply in world.replies))
    for _ in range(50):
        if not world.progress():
            world.tick()
    assert role(world, world.a) is Role.CEDED, "the source keeps everything"
    world.drive(world.a, world.machine(world.a, SourceMachine), ev.OperatorAcceptLost())
    finish(world, world.b, 2)
    assert ended(world).lost == 1 and ended(world, "B").lost == 1


def test_digests_that_differ_are_shown_and_nothing_completes() -> None:
    world = begin(REAL)
    world.until(lambda: any(isinstance(action, ev.Verify) for _, action in world.b.pending))
    at = next(i for i, (_, action) in enumerate(world.b.pending) if isinstance(action, ev.Verify))
    machine, action = world.b.pending.pop(at)
    assert isinstance(action, ev.Verify)
    wrong = tuple(ms.SegmentDigest(segment.uuid, bytes(32)) for segment in action.segments)
    world.drive(world.b, machine, ev.DigestsReady(action.token, wrong))
    world.until(lambda: any(reply.refusal is ms.Refusal.DIGEST for _, reply in world.replies))
    assert role(world, world.a) is Role.CEDED
    finish(world, world.b, 2)  # verified again after the reconnect


def test_what_no_correct_peer_sends_changes_nothing() -> None:
    world = begin(REAL)
    world.until(lambda: source(world) is SourceState.COPYING and target(world) is TargetState.INCOMING)
    a, b = world.machine(world.a, SourceMachine), world.machine(world.b, TargetMachine)
    head = (a.migration, a.session, a.volumes)
    segment = a.record.segments[0]
    before = (a.state, a.record, b.state, b.record)
    for machine, message in (
        (a, ms.Pull(*head, 1, segment.uuid, (ms.Run(10**6, 1),), ms.Priority.SWEEP)),
        (b, ms.Announce(*head, 9, (ms.Base(world.volumes[0], b"x" * 16),), (), True)),
        (b, ms.Announce(*head, 9, b.record.bases, (segment, segment), True)),
        (b, ms.Grant(*head, a.record.offered, b.record.bases, (segment,), (), (), (), False)),
        (
            b,
            ms.Grant(
                *head, a.record.offered, b.record.bases, (segment,), (ms.Base(segment.volume, segment.uuid),), (),
                (ms.MapPart(b"x" * 16, 0, None, ()),), False,
            ),
        ),
    ):  # fmt: skip
        with pytest.raises(ProtocolError):
            machine.handle(ev.Received(message), world.now)
        assert machine._flush() == []
    assert before == (a.state, a.record, b.state, b.record)
    finish(world, world.b, 2)


def test_named_snapshots_go_along_or_stay() -> None:
    for named in (True, False):
        world = World(6)
        world.connect()
        world.snapshot(world.a)
        world.write(world.a)
        world.start(world.a, Options(switchover=Switchover.NOW, snapshots=named))
        world.until(lambda w=world: source(w) is SourceState.COPYING)  # type: ignore[misc]
        world.snapshot(world.a)  # during the migration too
        finish(world, world.b, 2)
        names = world.b.cache.snapshots[world.volumes[0]]
        assert len(names) == (2 if named else 0) and all(uuid in world.b.cache.layers for uuid in names.values())


def test_answers_that_need_no_machine() -> None:
    head = (b"m" * 16, b"s" * 16, (ms.VolumeEpoch(b"v" * 16, 2),))

    def of(role_: Role, epoch: int) -> dict[bytes, Ownership]:
        return {b"v" * 16: Ownership(b"v" * 16, role_, epoch)}

    for owner in (of(Role.RETIRED, 2), of(Role.OWNER, 3), of(Role.CEDED, 3)):
        assert isinstance(strays.reply(ms.Complete(*head, 0), owner), ms.CompleteAck)
    for owner in ({}, of(Role.OWNER, 1), of(Role.CEDED, 2)):
        assert strays.reply(ms.Complete(*head, 0), owner) is None
    assert isinstance(strays.reply(ms.Ready(*head, ()), {}), ms.Cancelled)
    assert isinstance(strays.reply(ms.CancelAsk(*head), {}), ms.Cancelled)
    assert isinstance(strays.reply(ms.MapAsk(*head, 1, b"g" * 16, 0), {}), ms.Unserved)
    assert strays.reply(ms.Ack(*head), {}) is None
