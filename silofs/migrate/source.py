"""The source's machine: how the owner of a group of volumes gives it away (docs/protocol.md, "A: state × event").

This module is that table: which event counts in which state, and what follows. How that is done is in the classes that
it is built on, a module for each phase, and each of them uses only those below it:

    source_ceded        GRANT until ACK, RETURN_ASK, COMPLETE
    source_switchover   when the rounds end; prepare, freeze, thaw, cede; cancel
    source_rounds       OFFER, READY, seal, announce
    source_serving      maps, pages and digests for the target
    source_states       the states; the record, one commit, the end

Everything before CEDING can be undone by leaving the volumes as they are; nothing after it can be undone here at all.
The source of a RETURN is the same machine, `returning`, run by the node that the volumes had gone to.
"""

from __future__ import annotations

from silofs import limits
from silofs.migrate import admission, states
from silofs.migrate import events as ev
from silofs.migrate import messages as ms
from silofs.migrate.machine import by_uuid
from silofs.migrate.source_ceded import Ceded
from silofs.migrate.source_states import AFTER_CEDING, BEFORE_CEDING, BEFORE_FREEZE, State
from silofs.migrate.states import MigrationRecord, Options, Ownership, Phase, Role, Side, Switchover


class SourceMachine(Ceded):
    """See the module. Built by `start` or `restore`."""

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
        """After a restart. CEDED is rewritten before anything is granted: what the store shows may not be on disk.

        Before that, a group of which a volume is gone has nothing to offer, and the migration ends.
        """
        machine = cls(record, by_uuid(ownership, record.volumes))
        roles = {owner.role for owner in machine.ownership.values()}
        if record.phase in (Phase.CEDED, Phase.PULLING):
            assert roles == {Role.CEDED}, "a ceded migration whose volumes are not"
            machine.state = State.CEDING
            machine._commit(tuple(machine.ownership.values()), record, rewrite=True)
        elif roles == {Role.OWNER}:
            machine.state = State.OFFERING
            machine._settled = not record.returning
        else:
            machine._give_up(ms.Refusal.CHANGED)
        return machine, machine._flush()

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
                self._serve_map(message)
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
                self._serve_digests()
            case ms.Complete():
                self._complete(message, now)
            case ms.CancelAsk() if self.state in BEFORE_CEDING:
                self._cancel(ms.Refusal.CANCELLED, now)
            case _:
                pass  # late, early or repeated: what it would bring about has happened or will be asked for again

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
                self._operator_accept_lost()
            case ev.OperatorPause():
                self.paused = True
            case ev.OperatorResume():
                self.paused = False
                if self.state is State.WAITING:
                    self._converge(now)
            case ev.DigestsReady() if event.token == self._digest_token and self.session is not None:
                self._send(ms.Digests(*self._header, event.digests))
            case ev.Described() if self.state is State.DESCRIBING and event.token == self._wait:
                self._described(event)
            case _:
                pass  # an outcome that the machine no longer waits for

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
