"""The target from the last page to COMPLETE: all of it read back, digests compared, the outbox; or a RETURN instead."""

from __future__ import annotations

from msgspec.structs import replace

from silofs import limits
from silofs.migrate import events as ev
from silofs.migrate import messages as ms
from silofs.migrate import states
from silofs.migrate.states import Ownership, Phase
from silofs.migrate.target_pull import Pull
from silofs.migrate.target_states import State


class Completion(Pull):
    """COMPLETE lets the source delete its copy: only after what is here was seen to be what was sent."""

    def __init__(
        self, migration: bytes, peer: bytes, volumes: tuple[ms.VolumeEpoch, ...], ownership: dict[bytes, Ownership]
    ) -> None:
        super().__init__(migration, peer, volumes, ownership)
        self._theirs: tuple[ms.SegmentDigest, ...] | None = None
        self._ours: tuple[ms.SegmentDigest, ...] | None = None
        self._differs = False

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
