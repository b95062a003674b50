"""The target's states, and what its machine has in all of them: the record, the ownership, one commit, the end."""

from __future__ import annotations

import enum

from silofs.migrate import events as ev
from silofs.migrate import messages as ms
from silofs.migrate.machine import Machine
from silofs.migrate.states import MigrationRecord, Ownership, Phase


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


class Target(Machine):
    """Where the machine is, and what the shell may ask of it then.

    One commit is in flight at a time: `record` is what was last confirmed; the next is made from it.
    """

    def __init__(
        self, migration: bytes, peer: bytes, volumes: tuple[ms.VolumeEpoch, ...], ownership: dict[bytes, Ownership]
    ) -> None:
        super().__init__(migration, peer, volumes)
        self.state = State.NEW
        self.record: MigrationRecord | None = None
        self.ownership = ownership
        self.returning = False
        self._wait = 0  # token of CheckOffer, Verify
        self._commit_token = 0
        self._committing: MigrationRecord | None = None
        self._retry_at: float | None = None
        self._retry: ev.Commit | None = None
        self._lost = 0  # pages that the source could not read

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

    # Commits, and the end

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

    def _finish(self, phase: Phase, reason: ms.Refusal | None, detail: str = "") -> None:
        self.state = State.DONE
        self._due = None
        self._enter(phase, 0)
        self._do(ev.Finished(phase, reason, detail, self._lost))
