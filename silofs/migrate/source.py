"""The source's machine: how the owner of a group of volumes gives it away (docs/protocol.md, "A: state × event").

Everything before CEDING can be undone by leaving the volumes as they are; nothing after it can be undone here at all.
What the target asks for (maps, pages, digests) is answered without state, from the durable manifest. The machine at
the old home of a RETURN is the same one, `returning`, run by the node that the volumes had gone to.

Longer than other modules because it is one table: a state must be seen with all its events.
"""

from __future__ import annotations

import enum

from msgspec.structs import replace

from silofs import limits
from silofs.blocks import PAGE
from silofs.errors import ProtocolError
from silofs.migrate import admission, plan, states
from silofs.migrate import events as ev
from silofs.migrate import messages as ms
from silofs.migrate.machine import Machine, by_uuid
from silofs.migrate.states import MigrationRecord, Options, Ownership, Phase, Role, Side, Switchover


class State(enum.Enum):
    STARTING = "starting"  # the migration's record is being committed
    OFFERING = "offering"  # waiting for READY in this session
    SEALING = "sealing"
    RECORDING = "recording"  # the manifest with the new round is being committed
    COPYING = "copying"  # waiting for ROUND_DONE
    WAITING = "waiting"  # converged, or paused: waiting for a command
    PREPARING = "preparing"
    FREEZING = "freezing"
    PUSHING = "pushing"  # RETURN: the final layer goes over, under the freeze
    CEDING = "ceding"  # CEDED was submitted: its outcome is not known
    CEDED = "ceded"
    DESCRIBING = "describing"  # CEDED, and the manifest is made anew
    RETIRING = "retiring"
    CANCELLING = "cancelling"
    DONE = "done"


BEFORE_FREEZE = frozenset(
    {State.STARTING, State.OFFERING, State.SEALING, State.RECORDING, State.COPYING, State.WAITING, State.PREPARING}
)
BEFORE_CEDING = BEFORE_FREEZE | {State.FREEZING, State.PUSHING}
AFTER_CEDING = frozenset({State.CEDED, State.DESCRIBING, State.RETIRING})


class SourceMachine(Machine):
    """See the module. Built by `start` or `restore`."""

    def __init__(self, record: MigrationRecord, ownership: dict[bytes, Ownership]) -> None:
        super().__init__(record.id, record.peer, record.volumes)
        assert record.side is Side.SOURCE
        self.state = State.STARTING
        self.record = record  # as last committed, or being committed in STARTING, RECORDING, CEDING
        self.ownership = ownership
        self.phase = record.phase
        self.writers = 0
        self.fence = record.options.fence_writer
        self.commanded = record.options.switchover is not Switchover.MANUAL
        self.paused = False
        self.rate = 0.0  # bytes per second of the last round
        self.pause_s: float | None = None  # freeze to ACK
        self.rounds: list[int] = []  # pages of each round of this attempt to converge
        self._wait = 0  # token of the outcome that the state waits for
        self._frozen: ev.Frozen | None = None
        self._pushed: dict[bytes, ms.Segment] = {}  # PUSHING: final layers, durable but not in the manifest yet
        self._segments = {segment.uuid: segment for segment in record.segments}
        self._last: tuple[int, float] = (0, 0.0)  # the last round: pages, when sealed
        self._attempt = 0
        self._freezes = 0
        self._freeze_at = 0.0
        self._freeze_until = 0.0
        self._granting = True  # off after a NACK, until the next session
        self._return_asked = False
        self._lost = 0
        self._accept_lost = False
        self._reason = ms.Refusal.CANCELLED
        self._settled = True  # the machine that brought the volumes, of which this is the RETURN
        self._digest_token = 0
        self._ack_token = 0
        self._ready_session: bytes | None = None
        self._maps: tuple[ms.MapPart, ...] = ()  # first parts of the final layers' maps, for the GRANT

    @classmethod
    def start(
        cls,
        *,
        migration: bytes,
        peer: bytes,
        ownership: tuple[Ownership, ...],
        offered: tuple[ms.Offered, ...],
        options: Options,
        writers: int,
        remote_pages: int,
        now: float,
        origin: bytes = b"",
    ) -> tuple[SourceMachine, list[ev.Action]]:
        """A new migration of the group `ownership` to the store `peer`. `origin` not empty: a RETURN, of that one.

        Busy or UserError (usage) if it may not start; nothing was changed then. Ask `machine.blocked` before.
        """
        admission.may_start(
            ownership, peer, options, writers=writers, remote_pages=remote_pages, origin=origin
        )
        volumes = tuple(ms.VolumeEpoch(record.uuid, record.epoch + 1) for record in ownership)
        record_ = MigrationRecord(
            id=migration,
            side=Side.SOURCE,
            peer=peer,
            phase=Phase.OFFERED,
            volumes=volumes,
            options=options,
            offered=offered,
            returning=bool(origin),
            origin=origin,
        )
        machine = cls(record_, by_uuid(ownership, volumes))
        machine.writers = writers
        if not origin:
            machine.ownership = {
                uuid: states.joined(record, migration, peer) for uuid, record in machine.ownership.items()
            }
        machine._commit(tuple(machine.ownership.values()), record_)
        return machine, machine._flush()

    @classmethod
    def restore(
        cls, record: MigrationRecord, ownership: tuple[Ownership, ...], now: float
    ) -> tuple[SourceMachine, list[ev.Action]]:
        """After a restart. CEDED is rewritten before anything is granted: what the store shows may not be on disk."""
        machine = cls(record, by_uuid(ownership, record.volumes))
        roles = {owner.role for owner in machine.ownership.values()}
        if record.phase in (Phase.CEDED, Phase.PULLING):
            assert roles == {Role.CEDED}, "a ceded migration whose volumes are not"
            machine.state = State.CEDING
            machine._commit(tuple(machine.ownership.values()), record, rewrite=True)
        else:
            assert roles == {Role.OWNER}, "a migration before its switch-over whose volumes are not owned"
            machine.state = State.OFFERING
            machine._settled = not record.returning
        return machine, machine._flush()

    # What the shell asks

    @property
    def done(self) -> bool:
        return self.state is State.DONE

    @property
    def unsettled(self) -> bool:
        return self.state in (State.STARTING, State.CEDING, State.RETIRING, State.CANCELLING)

    @property
    def locked(self) -> bool:
        """Rename, resize, rollback, delete and snapshot are refused (EBUSY)."""
        return self.state not in BEFORE_FREEZE

    @property
    def answers_reads(self) -> bool:
        """READ_ASK is answered here: from the live state, after CEDED from the final layer until the ACK."""
        return self.state not in (State.CANCELLING, State.DONE, State.RETIRING) and not self.record.acked

    # Connection and time

    def _on_connected(self, now: float) -> None:
        self._granting = True
        if self.state in (State.COPYING, State.WAITING, State.PREPARING):
            self.state = State.OFFERING
        if self.state is State.OFFERING:
            self._offer(now)
        elif self.state in (State.FREEZING, State.PUSHING):
            self._thaw(now)
        elif self.state is State.CEDED:
            self._grant(now)

    def _on_disconnected(self, now: float) -> None:
        if self.state in (State.COPYING, State.WAITING, State.PREPARING):
            self.state = State.OFFERING
            self._due = None
        elif self.state in (State.FREEZING, State.PUSHING):
            self._thaw(now)
        elif self.state in (State.OFFERING, State.CEDED):
            self._due = None

    def _on_timeout(self, now: float) -> None:
        self._due = None
        if self.state in (State.STARTING, State.RECORDING):
            self._commit(tuple(self.ownership.values()) if self.state is State.STARTING else (), self.record)
        elif self.state is State.OFFERING:
            self._offer(now)
        elif self.state is State.SEALING:
            self._seal(now)
        elif self.state is State.COPYING:
            self._announce(now)
        elif self.state is State.PREPARING:
            self._again(now)  # an answer this late would be followed by a head this big
        elif self.state in (State.FREEZING, State.PUSHING):
            self._thaw(now)
        elif self.state is State.CEDING:
            self._commit(tuple(self.ownership.values()), self.record, drop=self._superseded, rewrite=True)
        elif self.state is State.CEDED:
            self._grant(now)
        elif self.state is State.RETIRING:
            self._commit(tuple(self.ownership.values()), None, drop=(self.migration,), rewrite=True)
        elif self.state is State.CANCELLING:
            self._commit(tuple(self.ownership.values()), None, drop=(self.migration,))

    # Messages

    def _on_message(self, message: ms.MigrationMessage, now: float) -> None:
        match message:
            case ms.Pull():
                self._serve_pages(message)
            case ms.MapAsk():
                segment = self._serving(message.segment)
                if segment is None:
                    self._send(ms.Unserved(*self._header, message.request, message.segment))
                else:
                    self._do(ev.ServeMap(message.session, message.request, segment, message.first))
            case ms.Ready() if self.state is State.OFFERING and self._settled:
                self._ready(message, now)
            case ms.Refuse() if self.state in BEFORE_CEDING:
                self._cancel(message.reason, now)
            case ms.RoundDone() if message.round == self.record.round and self.state is State.COPYING:
                self._round_done(now)
            case ms.RoundDone() if message.round == self.record.round + 1 and self.state is State.PUSHING:
                self._cede(now)
            case ms.Prepared() if self.state is State.PREPARING and message.attempt == self._attempt:
                self._prepared(message, now)
            case ms.Ack() if self.state in (State.CEDED, State.DESCRIBING):
                self._acked(now)
            case ms.Nack() if self.state is State.CEDED and not self.record.acked:
                self._nacked(message, now)
            case ms.DigestAsk() if self.state in AFTER_CEDING:
                self._digest_token = self._next()
                bases = () if self.record.returning else self.record.bases  # RETURN: the base is not all here
                self._do(ev.ComputeDigests(self._digest_token, bases, self.record.segments))
            case ms.Complete():
                self._complete(message, now)
            case ms.CancelAsk() if self.state in BEFORE_CEDING:
                self._cancel(ms.Refusal.CANCELLED, now)
            case _:
                pass  # late, early or repeated: what it would bring about has happened or will be asked for again

    def _serving(self, uuid: bytes) -> ms.Segment | None:
        """The segment, if its bytes may leave now: named durably, or pushed under the freeze of a RETURN."""
        if self.state in (State.STARTING, State.CANCELLING, State.DONE):
            return None
        return self._segments.get(uuid) or self._pushed.get(uuid)

    def _serve_pages(self, message: ms.Pull) -> None:
        segment = self._serving(message.segment)
        held = self.paused and message.priority is ms.Priority.SWEEP
        if segment is None or held:
            self._send(ms.Unserved(*self._header, message.request, message.segment))
            return
        plan.check_runs(segment, message.runs)
        self._do(ev.ServePages(message.session, message.request, segment, message.runs, message.priority))

    # Other events

    def _on_event(self, event: ev.Event, now: float) -> None:
        match event:
            case ev.Committed() | ev.CommitFailed():
                self._commit_ended(event, now)
            case ev.Sealed() if self.state is State.SEALING and event.token == self._wait:
                self._sealed(event, now)
            case ev.SealFailed() if self.state is State.SEALING and event.token == self._wait:
                self._due = now + limits.REPEAT_S
            case ev.Frozen() if self.state is State.FREEZING and event.token == self._wait:
                self._frozen_now(event, now)
            case ev.FreezeFailed() if self.state is State.FREEZING and event.token == self._wait:
                self._thaw(now)
            case ev.Writers():
                self.writers = event.count
                automatic = self.record.options.switchover is Switchover.AUTO and not self.fence
                if event.count and automatic and self.state in BEFORE_FREEZE:
                    self._cancel(ms.Refusal.BUSY, now)
            case ev.VolumeChanged() if self.state in BEFORE_FREEZE:
                self._cancel(ms.Refusal.CHANGED, now)
            case ev.OriginSettled():
                waited, self._settled = not self._settled, True
                if waited and self.state is State.OFFERING:
                    self._offer(now)
            case ev.OperatorCancel():
                self._operator_cancel(now)
            case ev.OperatorSwitchover():
                self._switchover(event, now)
            case ev.OperatorAcceptLost():
                self._accept_lost = True
                self._do(ev.Replied(ev.Command.ACCEPT_LOST, None))
                if self._lost and self.state is State.CEDED:
                    self._retire()
            case ev.OperatorPause():
                self.paused = True
            case ev.OperatorResume():
                self.paused = False
                if self.state is State.WAITING:
                    self._converge(now)
            case ev.DigestsReady() if event.token == self._digest_token and self.session is not None:
                self._send(ms.Digests(*self._header, event.digests))
            case ev.Described() if self.state is State.DESCRIBING and event.token == self._wait:
                self.record = replace(self.record, bases=event.bases, segments=event.segments)
                self._maps = event.maps
                self._commit((), self.record)
            case _:
                pass  # an outcome that the machine no longer waits for

    def _commit(
        self,
        ownership: tuple[Ownership, ...],
        record: MigrationRecord | None,
        *,
        drop: tuple[bytes, ...] = (),
        rewrite: bool = False,
    ) -> None:
        self._wait = self._next()
        self._do(ev.Commit(self._wait, ownership, record, drop, (), rewrite))

    @property
    def _superseded(self) -> tuple[bytes, ...]:
        return (self.record.origin,) if self.record.returning else ()

    def _commit_ended(self, event: ev.Committed | ev.CommitFailed, now: float) -> None:
        if event.token != self._wait:
            return
        if isinstance(event, ev.CommitFailed):
            if self.state is State.STARTING:
                self._cancel(event.reason, now)
            else:
                self._due = now + limits.REPEAT_S
            return
        self._segments = {segment.uuid: segment for segment in self.record.segments}
        if self.state is State.STARTING:
            self.state = State.OFFERING
            self._offer(now)
        elif self.state is State.RECORDING:
            self.state = State.COPYING
            self._enter(Phase.PRECOPY, self.record.round)
            if self._ready_here:
                self._announce(now)
            else:
                self.state = State.OFFERING
                self._offer(now)
        elif self.state in (State.CEDING, State.DESCRIBING):
            self._pushed = {}
            self.state = State.CEDED
            self._enter(Phase.PULLING if self.record.acked else Phase.CEDED, self.record.round)
            self._grant(now)
        elif self.state is State.RETIRING:
            self._finish(Phase.COMPLETE, None)
            if self.session is not None:
                self._send(ms.CompleteAck(*self._header))
        elif self.state is State.CANCELLING:
            if self.session is not None:
                self._send(ms.Cancelled(*self._header, self._reason))
            self._finish(Phase.CANCELLED if self._reason is ms.Refusal.CANCELLED else Phase.FAILED, self._reason)

    def _finish(self, phase: Phase, reason: ms.Refusal | None) -> None:
        self.state = State.DONE
        self._due = None
        self._enter(phase, self.record.round)
        self._do(ev.Finished(phase, reason, lost=self._lost))

    # Before the freeze

    @property
    def _ready_here(self) -> bool:
        """READY came in the present session."""
        return self.session is not None and self._ready_session == self.session

    def _offer(self, now: float) -> None:
        if self.session is not None and self._settled:
            self._send(ms.Offer(*self._header, self.record.offered, self.record.returning, self.record.origin))
        self._repeat(now)

    def _ready(self, message: ms.Ready, now: float) -> None:
        states_of = {offered.uuid: offered.states for offered in self.record.offered}
        for base in message.bases:
            if base.base and base.base not in states_of.get(base.volume, ()):
                raise ProtocolError("a common state that was not offered")
        if {base.volume for base in message.bases} != set(states_of):
            raise ProtocolError("common states of other volumes than were offered")
        self._ready_session = message.session
        if message.bases != self.record.bases:  # the first READY, or the target has forgotten: begin anew
            self.record = replace(self.record, bases=message.bases, segments=(), snapshots=())
            self.rounds = []
        if self.record.segments:
            self.state = State.COPYING
            self._announce(now)
        else:
            self._seal(now)

    def _seal(self, now: float) -> None:
        self.state = State.SEALING
        self._due = None
        self._wait = self._next()
        self._do(ev.Seal(self._wait, self._above(), self.record.round + 1, self.record.options.snapshots))

    def _above(self) -> tuple[ev.Above, ...]:
        tips = plan.tips((volume.uuid for volume in self.volumes), self.record.bases, self.record.segments)
        return tuple(ev.Above(uuid, above) for uuid, above in tips.items())

    def _offered_now(self, offered: tuple[ms.Offered, ...]) -> tuple[ms.Offered, ...]:
        """Names and sizes as of now; the states stay those that the base was chosen from."""
        states_of = {old.uuid: old.states for old in self.record.offered}
        return tuple(replace(new, states=states_of[new.uuid]) for new in offered)

    def _sealed(self, event: ev.Sealed, now: float) -> None:
        pages = sum(segment.pages for segment in event.segments)
        self._last = (pages, now)
        self.rounds.append(pages)
        self.record = replace(
            self.record,
            phase=Phase.PRECOPY,
            round=self.record.round + 1,
            segments=self.record.segments + event.segments,
            snapshots=event.snapshots,
            offered=self._offered_now(event.offered),
        )
        self.state = State.RECORDING
        self._commit((), self.record)

    def _announce(self, now: float) -> None:
        pages = self.record.options.mode is not states.Mode.POSTCOPY
        if self.session is not None:
            record = self.record
            self._send(ms.Announce(*self._header, record.round, record.bases, record.segments, pages))
        self._repeat(now)

    def _round_done(self, now: float) -> None:
        pages, sealed_at = self._last
        if pages and now > sealed_at:
            self.rate = pages * PAGE / (now - sealed_at)
        self._converge(now)

    def _converge(self, now: float) -> None:
        """A round is complete at the target: another, the switch-over, or the end."""
        self._due = None
        self.state = State.WAITING
        if self.paused:
            return
        verdict = plan.Verdict.AGAIN
        if self.rounds:  # none: restarted, and how long ago the last was sealed is not known
            verdict = plan.verdict(self.record.options.mode, self.rounds, self.rate)
        if verdict is plan.Verdict.GIVE_UP:
            self._cancel(ms.Refusal.CONVERGE, now)
        elif verdict is plan.Verdict.AGAIN:
            self._seal(now)
        elif self.commanded and self._blocked:
            self._cut_off(now)
        elif self.commanded:
            self._prepare(now)

    @property
    def _blocked(self) -> bool:
        return self.writers > 0 and not self.fence

    def _cut_off(self, now: float) -> None:
        """A writer would be cut off: `now` and `auto` end, `manual` waits for another command."""
        if self.record.options.switchover is not Switchover.MANUAL:
            self._cancel(ms.Refusal.BUSY, now)
            return
        self.commanded = False
        self._do(ev.Replied(ev.Command.SWITCHOVER, ms.Refusal.BUSY, "a writer has the volume open"))
        self.state = State.WAITING if self._ready_here else State.OFFERING
        if self.state is State.OFFERING:
            self._offer(now)

    def _switchover(self, event: ev.OperatorSwitchover, now: float) -> None:
        refusal: ms.Refusal | None = None
        if self.state not in BEFORE_FREEZE:
            refusal = ms.Refusal.TRY_AGAIN if self.state in BEFORE_CEDING else ms.Refusal.ROLE
        elif self.writers and not (event.fence_writer or self.fence):
            refusal = ms.Refusal.BUSY
        self._do(ev.Replied(ev.Command.SWITCHOVER, refusal))
        if refusal is not None:
            return
        self.fence = self.fence or event.fence_writer
        self.commanded = True
        self._freezes = 0
        if self.state is State.WAITING and not self.paused:
            if now - self._last[1] > limits.CLOSING_ROUND_S:
                self.rounds = []
                self._seal(now)
            else:
                self._converge(now)

    def _again(self, now: float) -> None:
        """Another round before the switch-over is tried again, unless it was tried often enough."""
        if self._freezes >= limits.FREEZE_TRIES_MAX:
            self._freezes = 0
            if self.record.options.switchover is not Switchover.MANUAL:
                self._cancel(ms.Refusal.TRY_AGAIN, now)
                return
            self.commanded = False
            self._do(ev.Replied(ev.Command.SWITCHOVER, ms.Refusal.TRY_AGAIN, "the freeze took too long"))
        if self._ready_here:
            self._seal(now)
        else:
            self.state = State.OFFERING
            self._offer(now)

    # The switch-over

    def _prepare(self, now: float) -> None:
        assert self.session is not None
        self.state = State.PREPARING
        self._attempt += 1
        self._freezes += 1
        sent = {segment.uuid for segment in self.record.segments}
        named = tuple(dict.fromkeys(info.segment for info in self.record.snapshots if info.segment not in sent))
        self._send(ms.Prepare(*self._header, self._attempt, self.rounds[-1] if self.rounds else 0, named))
        self._due = now + limits.PREPARE_S

    def _prepared(self, message: ms.Prepared, now: float) -> None:
        if message.refusal is not None:
            if self.record.options.switchover is Switchover.MANUAL:
                self.commanded = False
                self._due = None
                self.state = State.WAITING
                self._do(ev.Replied(ev.Command.SWITCHOVER, message.refusal))
            else:
                self._cancel(message.refusal, now)
        elif self._blocked:
            self._due = None
            self._cut_off(now)
        else:
            self.state = State.FREEZING
            self._freeze_at, self._freeze_until = now, now + limits.FREEZE_S
            self._due = self._freeze_until
            self._wait = self._next()
            round_ = self.record.round + 1
            self._do(ev.Freeze(self._wait, self._above(), round_, self.record.options.snapshots, self._freeze_until))
            self._enter(Phase.FROZEN, round_)

    def _frozen_now(self, event: ev.Frozen, now: float) -> None:
        self._frozen = event
        self.writers = event.writers
        if self._blocked:
            self._thaw(now, again=False)
            self._cut_off(now)
        elif self.record.returning and any(segment.pages for segment in event.segments):
            self.state = State.PUSHING
            self._pushed = {segment.uuid: segment for segment in event.segments}
            segments = self.record.segments + event.segments
            self._send(ms.Announce(*self._header, self.record.round + 1, self.record.bases, segments, True))
        else:
            self._cede(now)

    def _thaw(self, now: float, *, again: bool = True) -> None:
        """Back to before the freeze. What it sealed stays sealed; the next round's segment spans it."""
        assert self.state in (State.FREEZING, State.PUSHING), "no thaw once CEDED was submitted"
        self._do(ev.Thaw())
        if self.state is State.PUSHING:  # that number is spent: a late ROUND_DONE must not count for the next round
            self.record = replace(self.record, round=self.record.round + 1)
        self._frozen = None
        self._pushed = {}
        self._wait = 0
        self._due = None
        self.state = State.WAITING
        self._enter(Phase.PRECOPY, self.record.round)
        if again:
            self._again(now)

    def _cede(self, now: float) -> None:
        """The commit point. In time, or not at all."""
        frozen = self._frozen
        assert frozen is not None
        if now >= self._freeze_until:
            self._thaw(now)
            return
        self.state = State.CEDING
        self._due = None
        lsns = {head.volume: lsn for head, lsn in zip(frozen.heads, frozen.last_lsns, strict=True)}
        expected = self.record.origin if self.record.returning else self.migration
        self.ownership = {
            uuid: states.ceded(record, expected, self.migration, self.peer, lsns[uuid])
            for uuid, record in self.ownership.items()
        }
        for volume in self.volumes:
            assert self.ownership[volume.uuid].epoch == volume.epoch, "I5: exactly the epoch that was offered"
        self._maps = frozen.maps
        self.record = replace(
            self.record,
            phase=Phase.CEDED,
            round=self.record.round + 1,
            segments=self.record.segments + frozen.segments,
            snapshots=frozen.snapshots,
            offered=self._offered_now(frozen.offered),
            heads=frozen.heads,
        )
        self._commit(tuple(self.ownership.values()), self.record, drop=self._superseded)

    # After the commit point

    def _grant(self, now: float) -> None:
        """Sent only in CEDED, that is after a confirmed commit of CEDED in this process."""
        assert self.state is State.CEDED
        if self.session is None or self.record.acked or not self._granting:
            self._due = None
            self._ask_return(now)
            return
        record = self.record
        self._send(
            ms.Grant(
                *self._header,
                record.offered,
                record.bases,
                record.segments,
                record.heads,
                record.snapshots,
                self._maps,
                record.returning,
            )
        )
        self._repeat(now)

    def _acked(self, now: float) -> None:
        if self.record.acked:
            return
        self._maps = ()
        self.record = replace(self.record, phase=Phase.PULLING, acked=True)
        if self._freeze_at:
            self.pause_s = now - self._freeze_at
        if self.state is State.CEDED:
            self._due = None
            self._enter(Phase.PULLING, self.record.round)
            self._ack_token = self._next()  # only shown to the operator: nothing waits for it
            self._do(ev.Commit(self._ack_token, (), self.record))
            self._ask_return(now)

    def _nacked(self, message: ms.Nack, now: float) -> None:
        self._due = None
        if message.reason is ms.Refusal.BASE and any(base.base for base in self.record.bases):
            self.state = State.DESCRIBING
            self._wait = self._next()
            bases = tuple(ms.Base(volume.uuid, b"") for volume in self.volumes)
            self._do(ev.Describe(self._wait, self.record.heads, bases, self.record.snapshots))
        else:
            self._granting = False
            self._do(ev.Replied(ev.Command.MIGRATE, message.reason, "the destination refuses the grant"))

    def _complete(self, message: ms.Complete, now: float) -> None:
        if self.state is State.CEDED:
            self._lost = message.lost
            if message.lost and not self._accept_lost:
                self._do(ev.Replied(ev.Command.MIGRATE, ms.Refusal.LOST, f"{message.lost} pages could not be read"))
            else:
                self._retire()
        elif self.state is State.DONE and self.phase is Phase.COMPLETE:
            self._send(ms.CompleteAck(*self._header))

    def _retire(self) -> None:
        self.state = State.RETIRING
        self._due = None
        self.ownership = {uuid: states.retired(record) for uuid, record in self.ownership.items()}
        self._commit(tuple(self.ownership.values()), None, drop=(self.migration,))

    # The operator's way out

    def _operator_cancel(self, now: float) -> None:
        refusal: ms.Refusal | None = None
        if self.state in BEFORE_CEDING:
            self._cancel(ms.Refusal.CANCELLED, now)
        elif self.state is State.CEDING:
            refusal = ms.Refusal.TRY_AGAIN
        elif self.state in (State.CEDED, State.DESCRIBING) and not self.record.returning:
            self._return_asked = True
            if self.state is State.CEDED and self.record.acked:
                self._ask_return(now)
        elif self.state is not State.CANCELLING:
            refusal = ms.Refusal.ROLE
        self._do(ev.Replied(ev.Command.CANCEL, refusal))

    def _ask_return(self, now: float) -> None:
        """RETURN_ASK until the target's RETURN supersedes this machine, or COMPLETE comes."""
        if self._return_asked and self.record.acked and self.session is not None:
            self._send(ms.ReturnAsk(*self._header))
            self._repeat(now)

    def _cancel(self, reason: ms.Refusal, now: float) -> None:
        """End before the commit point: the volumes stay as they are."""
        assert self.state in BEFORE_CEDING
        if self.state in (State.FREEZING, State.PUSHING):
            self._thaw(now, again=False)
        self.state = State.CANCELLING
        self._due = None
        self._reason = reason
        if not self.record.returning:
            self.ownership = {uuid: states.left(record, self.migration) for uuid, record in self.ownership.items()}
        self._commit(tuple(self.ownership.values()), None, drop=(self.migration,))
