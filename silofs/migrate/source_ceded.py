"""The source after the commit point: GRANT until ACK, then RETURN_ASK or COMPLETE. Nothing of it can be undone here."""

from __future__ import annotations

from msgspec.structs import replace

from silofs.migrate import events as ev
from silofs.migrate import messages as ms
from silofs.migrate import states
from silofs.migrate.source_states import State
from silofs.migrate.source_switchover import SwitchOver
from silofs.migrate.states import MigrationRecord, Ownership, Phase


class Ceded(SwitchOver):
    """Gives until the target has taken, and keeps everything until the target has all of it."""

    def __init__(self, record: MigrationRecord, ownership: dict[bytes, Ownership]) -> None:
        super().__init__(record, ownership)
        self.pause_s: float | None = None  # freeze to ACK
        self._granting = True  # off after a NACK, until the next session
        self._ack_token = 0
        self._return_asked = False
        self._accept_lost = False

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

    def _described(self, event: ev.Described) -> None:
        self.record = replace(self.record, bases=event.bases, segments=event.segments)
        self._maps = event.maps
        self._commit((), self.record)

    def _ask_return(self, now: float) -> None:
        """RETURN_ASK until the target's RETURN supersedes this machine, or COMPLETE comes."""
        if self._return_asked and self.record.acked and self.session is not None:
            self._send(ms.ReturnAsk(*self._header))
            self._repeat(now)

    def _complete(self, message: ms.Complete, now: float) -> None:
        if self.state is State.CEDED:
            self._lost = message.lost
            if message.lost and not self._accept_lost:
                self._do(ev.Replied(ev.Command.MIGRATE, ms.Refusal.LOST, f"{message.lost} pages could not be read"))
            else:
                self._retire()
        elif self.state is State.DONE and self.phase is Phase.COMPLETE:
            self._send(ms.CompleteAck(*self._header))

    def _operator_accept_lost(self) -> None:
        self._accept_lost = True
        self._do(ev.Replied(ev.Command.ACCEPT_LOST, None))
        if self._lost and self.state is State.CEDED:
            self._retire()

    def _retire(self) -> None:
        self.state = State.RETIRING
        self._due = None
        self.ownership = {uuid: states.retired(record) for uuid, record in self.ownership.items()}
        self._commit(tuple(self.ownership.values()), None, drop=(self.migration,))
