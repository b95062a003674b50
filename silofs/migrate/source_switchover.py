"""The source from the end of a round to the commit point: another round, or prepare, freeze and cede; thaw and cancel.

Whatever happens here, the volumes are still owned by this host, and are written again after a thaw. The last thing
that can happen here is that CEDED is submitted; from there on there is neither a thaw nor a cancel.
"""

from __future__ import annotations

from msgspec.structs import replace

from silofs import limits
from silofs.blocks import PAGE
from silofs.migrate import events as ev
from silofs.migrate import messages as ms
from silofs.migrate import plan, states
from silofs.migrate.source_rounds import Rounds
from silofs.migrate.source_states import BEFORE_CEDING, BEFORE_FREEZE, State
from silofs.migrate.states import MigrationRecord, Ownership, Phase, Role, Switchover


class SwitchOver(Rounds):
    """Decides when the volumes go, and gives them away in time or not at all."""

    def __init__(self, record: MigrationRecord, ownership: dict[bytes, Ownership]) -> None:
        super().__init__(record, ownership)
        self.writers = 0
        self.fence = record.options.fence_writer
        self.commanded = record.options.switchover is not Switchover.MANUAL
        self.rate = 0.0  # bytes per second of the last round
        self._attempt = 0
        self._freezes = 0
        self._freeze_at = 0.0
        self._freeze_until = 0.0
        self._frozen: ev.Frozen | None = None
        self._maps: tuple[ms.MapPart, ...] = ()  # first parts of the final layers' maps, for the GRANT
        self._reason = ms.Refusal.CANCELLED

    # Whether the rounds end

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

    # The way out

    def _cancel(self, reason: ms.Refusal, now: float) -> None:
        """End before the commit point: the volumes stay as they are."""
        assert self.state in BEFORE_CEDING
        if self.state in (State.FREEZING, State.PUSHING):
            self._thaw(now, again=False)
        self._give_up(reason)

    def _give_up(self, reason: ms.Refusal) -> None:
        """The record goes. A volume that was removed keeps what its own says."""
        self.state = State.CANCELLING
        self._due = None
        self._reason = reason
        if not self.record.returning:
            self.ownership = {
                uuid: states.left(record, self.migration) if record.role is Role.OWNER else record
                for uuid, record in self.ownership.items()
            }
        self._commit(tuple(self.ownership.values()), None, drop=(self.migration,))
