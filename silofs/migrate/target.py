"""The target's machine: how a host receives a group of volumes (docs/protocol.md, "B: state × event").

It drives every transfer: it asks for maps, then pages, because only it knows what it durably holds. Each call ends in
`_advance`, which does whatever the state now allows; so a restart, a reconnection and a repeated message need no path
of their own. One commit is in flight at a time: `record` is what was last confirmed; the next is made from it.

Longer than other modules because it is one table: a state must be seen with all its events.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

from msgspec.structs import replace

from silofs import limits
from silofs.errors import ProtocolError
from silofs.migrate import admission, plan, states
from silofs.migrate import events as ev
from silofs.migrate import messages as ms
from silofs.migrate.machine import Machine, by_uuid
from silofs.migrate.states import MigrationRecord, Options, Ownership, Phase, Role, Side
from silofs.migrate.transfer import Transfer


class State(enum.Enum):
    NEW = "new"
    CHECKING = "checking"  # an OFFER; or, `granted`, a GRANT to a node that knows nothing of it
    RECORDING = "recording"  # INCOMING is being committed
    INCOMING = "incoming"
    GRANTED = "granted"  # the source is CEDED to us: maps first
    OWNING = "owning"  # OWNER was submitted: its outcome is not known
    PULLING = "pulling"
    VERIFYING = "verifying"
    COMPLETING = "completing"  # the outbox entry is being committed
    COMPLETE = "complete"
    CLOSING = "closing"  # COMPLETE was acknowledged: the entry is being deleted
    FORGETTING = "forgetting"
    DONE = "done"


OWNS = frozenset({State.PULLING, State.VERIFYING, State.COMPLETING, State.COMPLETE, State.CLOSING})


class TargetMachine(Machine):
    """See the module. Built by `create` (for the first OFFER or GRANT of a migration) or `restore`."""

    def __init__(
        self, migration: bytes, peer: bytes, volumes: tuple[ms.VolumeEpoch, ...], ownership: dict[bytes, Ownership]
    ) -> None:
        super().__init__(migration, peer, volumes)
        self.state = State.NEW
        self.record: MigrationRecord | None = None
        self.ownership = ownership
        self.returning = False
        self.transfer = Transfer()
        self.paused = False
        self.held = False  # a RETURN of these volumes runs here: no sweep, no COMPLETE
        self._offer: ms.Offer | None = None
        self._announce: ms.Announce | None = None
        self._done_sent: int | None = None  # the round of the last ROUND_DONE in this session
        self._grant: ms.Grant | None = None
        self._wait = 0  # token of CheckOffer, Verify
        self._prepare: tuple[int, int] = (0, 0)  # token, attempt
        self._commit_token = 0
        self._committing: MigrationRecord | None = None
        self._retry_at: float | None = None
        self._retry: ev.Commit | None = None
        self._cancel_wanted = False
        self._forget_pending = False
        self._sweep_after: float | None = None  # the sweep rests until then
        self._progress_at = 0.0
        # verification
        self._theirs: tuple[ms.SegmentDigest, ...] | None = None
        self._ours: tuple[ms.SegmentDigest, ...] | None = None
        self._lost = 0
        self._differs = False

    @classmethod
    def create(
        cls, migration: bytes, peer: bytes, volumes: tuple[ms.VolumeEpoch, ...], ownership: tuple[Ownership, ...]
    ) -> TargetMachine:
        """For an OFFER or GRANT of an unknown migration; `Connected` and then the message are to be handed to it.

        `ownership` has a record for each volume; for one that was never here: Ownership(uuid, Role.NONE, 0).
        """
        return cls(migration, peer, volumes, by_uuid(ownership, volumes))

    @classmethod
    def restore(
        cls, record: MigrationRecord, ownership: tuple[Ownership, ...], now: float
    ) -> tuple[TargetMachine, list[ev.Action]]:
        """After a restart. OWNER (and COMPLETE) are rewritten before anything follows from them."""
        assert record.side is Side.TARGET
        machine = cls(record.id, record.peer, record.volumes, by_uuid(ownership, record.volumes))
        machine.record = record
        machine.returning = record.returning
        machine.phase = record.phase
        machine._lost = record.lost
        if record.phase in (Phase.OFFERED, Phase.PRECOPY):
            machine.state = State.INCOMING
        else:
            owners = tuple(machine.ownership.values()) if record.phase is Phase.PULLING else ()
            assert all(owner.role is Role.OWNER for owner in owners), "a pulled migration whose volumes are not owned"
            machine.state = State.OWNING if record.phase is Phase.PULLING else State.COMPLETING
            machine._commit(owners, record, rewrite=True)
        machine._advance(now)
        return machine, machine._flush()

    # What the shell asks

    @property
    def done(self) -> bool:
        return self.state is State.DONE

    @property
    def unsettled(self) -> bool:
        return self._busy and self.state is not State.CLOSING

    @property
    def locked(self) -> bool:
        """Delete and rollback are refused (EBUSY) until complete."""
        return self.state not in (State.COMPLETE, State.CLOSING, State.DONE)

    @property
    def may_return(self) -> bool:
        """A RETURN may be started: the volumes are owned here and not reported complete."""
        return self.state in (State.PULLING, State.VERIFYING) and not self.returning

    def expects(self, session: bytes, request: int, segment: bytes, runs: Iterable[ms.Run]) -> bool:
        """Whether these pages answer a PULL of this session: else they are not to be stored."""
        return session == self.session and self.transfer.order.expects(request, segment, runs)

    def deadline(self) -> float | None:
        times = [at for at in (self._due, self._retry_at, self._sweep_after) if at is not None]
        if self.transfer.order.flying and self.session is not None:
            times.append(self._progress_at + limits.PULL_STALL_S)
        return min(times, default=None)

    # Connection and time

    def _on_connected(self, now: float) -> None:
        self.transfer.forget()
        self._done_sent = None
        self._announce = None
        self._differs = False
        if self.state is State.GRANTED:
            self._ungrant()
        if self.state is State.INCOMING:
            assert self.record is not None
            self._send(ms.Ready(*self._header, self.record.bases))
        self._remind(now)
        self._advance(now)

    def _on_disconnected(self, now: float) -> None:
        self.transfer.forget()
        self._announce = None
        self._due = None
        if self.state is State.GRANTED:
            self._ungrant()
        if self.state is State.CHECKING:
            self._ungrant()
        if self.state is State.INCOMING and self._cancel_wanted:
            self._forget()
        self._advance(now)

    def _ungrant(self) -> None:
        """OFFER and GRANT come again with the next session; until then this is what it was before."""
        self._grant = None
        self.state = State.INCOMING if self.record is not None else State.NEW
        if self.state is State.NEW and not self._busy:
            self._finish(Phase.CANCELLED, ms.Refusal.TRY_AGAIN)

    def _on_timeout(self, now: float) -> None:
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None
            assert self._retry is not None
            self._commit_token = self._next()
            self._retry = replace(self._retry, token=self._commit_token, rewrite=True)
            self._do(self._retry)
        if self._sweep_after is not None and now >= self._sweep_after:
            self._sweep_after = None
        if self.transfer.order.flying and self.session is not None and now >= self._progress_at + limits.PULL_STALL_S:
            self.transfer.order.reset()
            self.transfer.restart()
        if self._due is not None and now >= self._due:
            self._due = None
            self.transfer.maps_overdue()
            self._remind(now)
        self._advance(now)

    def _remind(self, now: float) -> None:
        """Send again what the present state waits for an answer to."""
        if self.session is None:
            return
        if self.state is State.VERIFYING and self._theirs is None and not self._differs:
            self._send(ms.DigestAsk(*self._header))
        elif self.state is State.COMPLETE:
            self._send(ms.Complete(*self._header, self._lost))
        elif self.state is State.INCOMING and self._cancel_wanted:
            self._send(ms.CancelAsk(*self._header))
        elif not self.transfer.maps_asked:
            return
        self._repeat(now)

    # Messages

    def _on_message(self, message: ms.MigrationMessage, now: float) -> None:
        match message:
            case ms.Offer():
                self._offered(message, now)
            case ms.Announce() if self.state is State.INCOMING:
                self._announced(message)
            case ms.Prepare() if self.state is State.INCOMING:
                self._prepare = (self._next(), message.attempt)
                self._do(ev.CheckPrepare(self._prepare[0], message.pages, message.named))
            case ms.Grant():
                self._granted(message)
            case ms.Cancelled() if self.state is State.CHECKING:
                self._finish(Phase.CANCELLED, message.reason)
            case ms.Cancelled() if self.state in (State.RECORDING, State.INCOMING):
                self._forget()
            case ms.Map() if self.record is not None:
                self.transfer.map_arrived(self.record, message)
            case ms.Unserved():
                self._unserved(message.request, message.segment, now)
            case ms.Digests() if self.state is State.VERIFYING:
                self._theirs = message.digests
                self._due = None
            case ms.CompleteAck() if self.state is State.COMPLETE:
                self.state = State.CLOSING
                self._due = None
                self._commit((), None, drop=(self.migration,))
            case ms.ReturnAsk():
                self._start_return()
            case _:
                pass  # early, late or repeated
        self._advance(now)

    def _offered(self, message: ms.Offer, now: float) -> None:
        refusal = admission.offer_refusal(self.ownership, self.peer, message)
        if self.state is State.INCOMING and not self._cancel_wanted:
            assert self.record is not None
            self._send(ms.Ready(*self._header, self.record.bases))
            return
        if self.state is not State.NEW:
            return  # under way, or (a late duplicate) long past
        if refusal is not None:
            self._refuse(refusal, "the destination's record of the volume does not allow it")
            return
        self._offer = message
        self.returning = message.returning
        self.state = State.CHECKING
        self._wait = self._next()
        self._do(ev.CheckOffer(self._wait, message.offered, self.volumes, self.peer, message.returning, False))

    def _refuse(self, reason: ms.Refusal, detail: str) -> None:
        if self.session is not None:
            self._send(ms.Refuse(*self._header, reason, detail[:512]))
        self._finish(Phase.FAILED, reason, detail)

    def _announced(self, message: ms.Announce) -> None:
        assert self.record is not None
        if message.bases != self.record.bases:
            raise ProtocolError("a round builds on other states than were agreed")
        plan.check_manifest(self.volumes, message.bases, message.segments)
        self._announce = message
        self._done_sent = None

    def _granted(self, message: ms.Grant) -> None:
        admission.check_grant(message)
        if self.state in OWNS:
            self._send(ms.Ack(*self._header))
            return
        if self.state not in (State.NEW, State.INCOMING):
            return  # RECORDING and so on: it is repeated
        held = [(owner.role, owner.epoch) for owner in self.ownership.values()]
        if held == [(Role.OWNER, volume.epoch) for volume in self.volumes]:
            self._send(ms.Ack(*self._header))
            self._finish(Phase.COMPLETE, None)
            return
        for volume in self.volumes:
            record = self.ownership[volume.uuid]
            if not states.may_accept(record, self.peer, volume.epoch, returning=message.returning):
                own = tuple(ms.VolumeEpoch(uuid, record.epoch) for uuid, record in self.ownership.items())
                self._send(ms.Nack(*self._header, ms.Refusal.EPOCH, own))
                if self.state is State.NEW:
                    self._finish(Phase.FAILED, ms.Refusal.EPOCH)
                return
        self._grant = message
        self.returning = message.returning
        if self.record is not None and self.record.bases == message.bases:
            self.state = State.GRANTED
        else:
            self.state = State.CHECKING
            self._wait = self._next()
            self._do(ev.CheckOffer(self._wait, message.offered, self.volumes, self.peer, message.returning, True))

    def _unserved(self, request: int, segment: bytes, now: float) -> None:
        if self.transfer.asked_map(segment, request):
            self._repeat(now)
        elif self.transfer.unserved(request, segment):
            self._sweep_after = now + limits.REPEAT_S

    # Other events

    def _on_event(self, event: ev.Event, now: float) -> None:
        match event:
            case ev.Committed() if event.token == self._commit_token:
                self._commit_token = 0
                self._committed(now)
            case ev.CommitFailed() if event.token == self._commit_token:
                self._commit_token = 0
                if event.reason is ms.Refusal.BASE:
                    self._check_again()
                else:
                    self._retry_at = now + limits.REPEAT_S
            case ev.OfferChecked() if self.state is State.CHECKING and event.token == self._wait:
                self._checked(event)
            case ev.PrepareChecked() if event.token == self._prepare[0] and self.session is not None:
                self._send(ms.Prepared(*self._header, self._prepare[1], event.refusal))
            case ev.MissingPages() if event.token == self.transfer.find_token:
                self.transfer.missing(event.segment, event.runs, event.next_page)
            case ev.PagesDurable() if event.session == self.session:
                if self.transfer.order.arrived(event.request, event.segment, event.runs, event.last):
                    self._progress_at = now
            case ev.PagesFailed() if event.session == self.session:
                self._unserved(event.request, event.segment, now)
            case ev.Demand() if self.state in OWNS or self.state is State.OWNING:
                self.transfer.order.add(event.segment, (event.run,), event.priority)
            case ev.DigestsReady() if self.state is State.VERIFYING and event.token == self._wait:
                self._ours = event.digests
                self._lost = event.lost
            case ev.DigestsFailed() if self.state is State.VERIFYING and event.token == self._wait:
                self._back_to_pulling(now)
            case ev.OperatorCancel():
                self._operator_cancel(now)
            case ev.OperatorPause():
                self.paused = True
            case ev.OperatorResume():
                self.paused = False
                self._differs = False
            case ev.ReturnStarted():
                self.held = True
            case ev.ReturnEnded():
                self.held = False
            case _:
                pass
        self._advance(now)

    def _check_again(self) -> None:
        """A common state was deleted after it was found: nothing was committed, and another is looked for."""
        assert self.state in (State.NEW, State.RECORDING, State.GRANTED, State.OWNING)
        self._retry = self._committing = None
        granted = self._grant is not None
        about = self._grant if granted else self._offer
        if about is None:  # the session ended meanwhile: all of it comes again
            self._finish(Phase.CANCELLED, ms.Refusal.TRY_AGAIN)
            return
        self.state = State.CHECKING
        self._wait = self._next()
        self._do(ev.CheckOffer(self._wait, about.offered, self.volumes, self.peer, self.returning, granted))

    def _checked(self, event: ev.OfferChecked) -> None:
        if self._grant is not None:
            bases = {base.volume: base.base for base in event.bases}
            gone = any(base.base and bases.get(base.volume) != base.base for base in self._grant.bases)
            if event.refusal is None and not gone:
                self.state = State.GRANTED
                return
            own = tuple(ms.VolumeEpoch(uuid, record.epoch) for uuid, record in self.ownership.items())
            reason = event.refusal or ms.Refusal.BASE
            if self.session is not None:
                self._send(ms.Nack(*self._header, reason, own))
            self._grant = None
            if self.record is not None:
                self.state = State.INCOMING
            else:
                self._finish(Phase.FAILED, reason, event.detail)
            return
        offer = self._offer
        assert offer is not None
        if event.refusal is not None:
            self._refuse(event.refusal, event.detail)
            return
        assert {base.volume for base in event.bases} == {volume.uuid for volume in self.volumes}
        self.state = State.RECORDING
        owners, drop = self._incoming() if not self.returning else ((), ())
        record = self._new_record(offer.offered, event.bases, offer.origin)
        self._commit(owners, record, drop=drop)

    def _incoming(self) -> tuple[tuple[Ownership, ...], tuple[bytes, ...]]:
        owners = tuple(
            states.incoming(self.ownership[volume.uuid], self.migration, self.peer, volume.epoch)
            for volume in self.volumes
        )
        old = {owner.migration for owner in self.ownership.values() if owner.role is Role.INCOMING}
        return owners, tuple(sorted(old - {self.migration, b""}))

    def _new_record(
        self, offered: tuple[ms.Offered, ...], bases: tuple[ms.Base, ...], origin: bytes
    ) -> MigrationRecord:
        return MigrationRecord(
            id=self.migration,
            side=Side.TARGET,
            peer=self.peer,
            phase=Phase.OFFERED,
            volumes=self.volumes,
            options=Options(),
            offered=offered,
            returning=self.returning,
            origin=origin,
            bases=bases,
        )

    # Commits

    def _commit(
        self,
        ownership: tuple[Ownership, ...],
        record: MigrationRecord | None,
        *,
        drop: tuple[bytes, ...] = (),
        maps: tuple[ms.MapPart, ...] = (),
        rewrite: bool = False,
    ) -> None:
        """One at a time: anything else waits in the state until this one is confirmed (and is retried until it is)."""
        assert not self._busy
        self._commit_token = self._next()
        self._committing = record
        self._retry = ev.Commit(self._commit_token, ownership, record, drop, maps, rewrite)
        self._do(self._retry)

    @property
    def _busy(self) -> bool:
        return bool(self._commit_token) or self._retry_at is not None

    def _committed(self, now: float) -> None:
        assert self._retry is not None
        if self._committing is not None:
            known = self.record.segments if self.record is not None else ()
            if self._committing.segments != known:
                self.transfer.restart()
                if self._committing.segments[: len(known)] != known:
                    self.transfer.order.reset()  # begun anew: what is asked for may be of a layer that is no more
            self.record = self._committing
        self.ownership.update((owner.uuid, owner) for owner in self._retry.ownership)
        self._retry = self._committing = None
        if self.state in (State.RECORDING, State.NEW):
            self.state = State.INCOMING
            if self.session is not None:
                assert self.record is not None
                self._send(ms.Ready(*self._header, self.record.bases))
        elif self.state is State.OWNING:
            self.state = State.PULLING
            self._grant = None
            assert self.record is not None
            self._enter(Phase.PULLING, self.record.round)
            self.transfer.restart()
            if self.session is not None:
                self._send(ms.Ack(*self._header))
        elif self.state is State.COMPLETING:
            self.state = State.COMPLETE
            self._enter(Phase.COMPLETE, 0)
            self._remind(now)
        elif self.state is State.CLOSING:
            self._finish(Phase.COMPLETE, None)
        elif self.state is State.FORGETTING and not self._forget_pending:
            self._finish(Phase.CANCELLED, ms.Refusal.CANCELLED)

    def _finish(self, phase: Phase, reason: ms.Refusal | None, detail: str = "") -> None:
        self.state = State.DONE
        self._due = None
        self._enter(phase, 0)
        self._do(ev.Finished(phase, reason, detail, self._lost))

    # What the state now allows

    def _advance(self, now: float) -> None:
        if self.state is State.DONE:
            return
        if self.state is State.FORGETTING and self._forget_pending and not self._busy:
            self._forget_now()
            return
        if not self._busy:
            self._advance_record()
        if self.state in (State.INCOMING, State.GRANTED, State.PULLING):
            self._advance_maps(now)
            self._advance_pages(now)
        if self.state is State.GRANTED and not self._busy:
            self._advance_record()  # RETURN: the sweep may just have ended
        if self.state is State.INCOMING:
            self._round_done()
        elif self.state is State.PULLING and self.transfer.swept and not (self.held or self.paused or self._differs):
            self._verify(now)
        if self.state is State.VERIFYING:
            self._advance_pages(now)  # demand still; the sweep found all
            self._compare()

    def _advance_record(self) -> None:
        """The one commit that is due, if any."""
        record = self.record
        if self.state is State.GRANTED:
            grant = self._grant
            assert grant is not None
            if record is None or not self._matches(record, grant):
                self._take_manifest(record, grant)
                return
            if self._maps_complete and (self.transfer.swept or not self.returning):
                self._own(record, ())
                return
        elif self.state is State.INCOMING and record is not None and self._announce is not None:
            announce = self._announce
            if record.segments != announce.segments:
                arrived = plan.carry_over(record.segments, record.map_next, announce.segments)
                self.transfer.drop_maps()
                new = replace(
                    record,
                    phase=Phase.PRECOPY,
                    segments=announce.segments,
                    map_next=arrived,
                    round=announce.round,
                )
                self._commit((), new)
                self._enter(Phase.PRECOPY, announce.round)
                return
        pulling = self.state in (State.INCOMING, State.GRANTED, State.PULLING)
        if self.transfer.has_parts and record is not None and pulling:
            parts = self.transfer.take_parts()
            self._commit((), plan.with_parts(record, parts), maps=parts)

    def _matches(self, record: MigrationRecord, grant: ms.Grant) -> bool:
        return (record.bases, record.segments, record.heads, record.snapshots) == (
            grant.bases,
            grant.segments,
            grant.heads,
            grant.snapshots,
        )

    def _take_manifest(self, record: MigrationRecord | None, grant: ms.Grant) -> None:
        """The GRANT's manifest becomes ours; with its maps in the same transaction if they fit, and OWNER too."""
        old = record if record is not None else self._new_record(grant.offered, grant.bases, b"")
        same_bases = old.bases == grant.bases
        arrived = plan.carry_over(
            old.segments if same_bases else (), old.map_next if same_bases else (), grant.segments
        )
        new = replace(
            old,
            phase=Phase.PRECOPY,
            offered=grant.offered,
            bases=grant.bases,
            segments=grant.segments,
            map_next=arrived,
            heads=grant.heads,
            snapshots=grant.snapshots,
        )
        self.transfer.drop_maps()
        at = {segment.uuid: next_page for segment, next_page in zip(new.segments, arrived, strict=True)}
        parts = tuple(part for part in grant.maps if at.get(part.segment) == part.first)
        new = plan.with_parts(new, parts)
        if not self.returning and plan.maps_complete(new):
            self._own(new, parts)
        else:
            owners, drop = ((), ()) if self.returning else self._incoming()
            self._commit(owners, new, drop=drop, maps=parts)

    def _own(self, record: MigrationRecord, maps: tuple[ms.MapPart, ...]) -> None:
        """OWNER, durably; then, and only then, serve and ACK."""
        owners = tuple(
            states.owned(
                self.ownership[volume.uuid], self.migration, self.peer, volume.epoch, returning=self.returning
            )
            for volume in self.volumes
        )
        old = {owner.migration for owner in self.ownership.values()} - {self.migration, b""}
        self.state = State.OWNING
        self._commit(owners, replace(record, phase=Phase.PULLING), drop=tuple(sorted(old)), maps=maps)

    @property
    def _maps_complete(self) -> bool:
        return self.record is not None and plan.maps_complete(self.record)

    @property
    def _manifest_current(self) -> bool:
        """The durable manifest is the one that the source last told."""
        if self.record is None:
            return False
        if self.state is State.GRANTED:
            return self._grant is not None and self._matches(self.record, self._grant)
        if self.state is State.INCOMING:
            return self._announce is not None and self.record.segments == self._announce.segments
        return True

    def _advance_maps(self, now: float) -> None:
        if self.session is None or not self._manifest_current:
            return
        record = self.record
        assert record is not None
        if self._committing is not None and self._committing.map_next != record.map_next:
            return  # parts are on their way to the disk: what to ask for next shows when they are there
        for request, segment, first in self.transfer.ask_maps(record):
            self._send(ms.MapAsk(*self._header, request, segment, first))
            self._repeat(now)

    def _advance_pages(self, now: float) -> None:
        if self.session is None or not self._manifest_current or not self._maps_complete:
            return
        sweep = not self.paused and not self.held and self._sweep_after is None and self._wants_pages
        look = self.transfer.look(self.record) if sweep and self.record is not None else None
        if look is not None:
            self.transfer.find_token = self._next()
            self._do(ev.FindMissing(self.transfer.find_token, *look))
        flying = self.transfer.order.flying
        for request, wanted in self.transfer.order.take(sweep=sweep):
            if not flying:
                self._progress_at = now
                flying = 1
            self._send(ms.Pull(*self._header, request, wanted.segment, wanted.runs, wanted.priority))

    @property
    def _wants_pages(self) -> bool:
        if self.state is State.INCOMING:
            return self._announce is not None and self._announce.pages
        return self.state is State.PULLING or (self.state is State.GRANTED and self.returning)

    def _round_done(self) -> None:
        announce = self._announce
        if announce is None or self.session is None or not self._manifest_current or not self._maps_complete:
            return
        if (self.transfer.swept or not announce.pages) and self._done_sent != announce.round:
            self._done_sent = announce.round
            self._send(ms.RoundDone(*self._header, announce.round))

    # The end

    def _verify(self, now: float) -> None:
        record = self.record
        assert record is not None
        self.state = State.VERIFYING
        self._ours = self._theirs = None
        self._wait = self._next()
        self._do(ev.Verify(self._wait, () if self.returning else record.bases, record.segments))
        self._remind(now)

    def _back_to_pulling(self, now: float) -> None:
        """What was read back was damaged, or not readable: what is missing is pulled (again), then verified again."""
        self.state = State.PULLING
        self.transfer.restart()
        self._sweep_after = now + limits.REPEAT_S

    def _compare(self) -> None:
        if self._ours is None or self._theirs is None or self._differs or self.held or self._busy:
            return
        if self._ours != self._theirs:
            self._differs = True
            self._ours = self._theirs = None
            self.state = State.PULLING
            self._do(ev.Replied(ev.Command.MIGRATE, ms.Refusal.DIGEST, "what arrived is not what was sent"))
            return
        assert self.record is not None
        self.state = State.COMPLETING
        owners = tuple(states.settled(owner, self.migration) for owner in self.ownership.values())
        self._commit(owners, replace(self.record, phase=Phase.COMPLETE, lost=self._lost))

    def _start_return(self) -> None:
        if self.may_return and not self.held:
            self.held = True  # from here on no COMPLETE may overtake the RETURN
            self._do(ev.StartReturn(self.volumes))

    def _operator_cancel(self, now: float) -> None:
        refusal: ms.Refusal | None = None
        if self.may_return:
            self._start_return()
        elif self.state in (State.NEW, State.CHECKING):
            self._refuse(ms.Refusal.CANCELLED, "cancelled at the destination")
        elif self.state in (State.RECORDING, State.INCOMING) and self.session is None:
            self._forget()
        elif self.state is State.INCOMING:
            self._cancel_wanted = True
            self._remind(now)
        elif self.state is not State.FORGETTING:
            refusal = ms.Refusal.TRY_AGAIN
        self._do(ev.Replied(ev.Command.CANCEL, refusal))

    def _forget(self) -> None:
        self.state = State.FORGETTING
        self._forget_pending = True
        self._due = None

    def _forget_now(self) -> None:
        self._forget_pending = False
        owners = tuple(
            states.forgotten(owner)
            for owner in self.ownership.values()
            if owner.role is Role.INCOMING and owner.migration == self.migration
        )
        self._commit(owners, None, drop=(self.migration,))
