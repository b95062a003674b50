"""The target's machine: how a host receives a group of volumes (docs/protocol.md, "B: state × event").

This module is that table: which message or event counts in which state. Each call ends in `_advance`, which does
whatever the state now allows; so a restart, a reconnection and a repeated message need no path of their own. How it is
done is in the classes that the machine is built on, a module for each phase, and each of them uses only those below it:

    target_complete   verify, compare, COMPLETE; StartReturn
    target_pull       MAP_ASK, PULL, ROUND_DONE
    target_manifest   ANNOUNCE; manifest and maps made durable, and OWNER
    target_offer      OFFER, PREPARE and GRANT checked; the way back
    target_states     the states; the record, one commit, the end
"""

from __future__ import annotations

from msgspec.structs import replace

from silofs import limits
from silofs.errors import ProtocolError
from silofs.migrate import events as ev
from silofs.migrate import messages as ms
from silofs.migrate.machine import by_uuid
from silofs.migrate.states import MigrationRecord, Ownership, Phase, Role, Side
from silofs.migrate.target_complete import Completion
from silofs.migrate.target_states import OWNS, State


class TargetMachine(Completion):
    """See the module. Built by `create` (for the first OFFER or GRANT of a migration) or `restore`."""

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
            if any(owner.role is not Role.OWNER for owner in owners):
                raise ProtocolError("a volume that was being pulled is not owned here any more")
            machine.state = State.OWNING if record.phase is Phase.PULLING else State.COMPLETING
            machine._commit(owners, record, rewrite=True)
        machine._advance(now)
        return machine, machine._flush()

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

    def deadline(self) -> float | None:
        times = [at for at in (self._due, self._retry_at, self._sweep_after) if at is not None]
        if self.transfer.order.flying and self.session is not None:
            times.append(self._progress_at + limits.PULL_STALL_S)
        return min(times, default=None)

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

    # Messages

    def _on_message(self, message: ms.MigrationMessage, now: float) -> None:
        match message:
            case ms.Offer():
                self._offered(message, now)
            case ms.Announce() if self.state is State.INCOMING:
                self._announced(message)
            case ms.Prepare() if self.state is State.INCOMING:
                self._prepare_asked(message)
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
