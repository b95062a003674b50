"""The source's states, and what its machine has in all of them: the record, the ownership, one commit, the end."""

from __future__ import annotations

import enum

from silofs.migrate import events as ev
from silofs.migrate import messages as ms
from silofs.migrate.machine import Machine
from silofs.migrate.states import MigrationRecord, Ownership, Phase, Side


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


class Source(Machine):
    """Where the machine is, and what the shell may ask of it then."""

    def __init__(self, record: MigrationRecord, ownership: dict[bytes, Ownership]) -> None:
        super().__init__(record.id, record.peer, record.volumes)
        assert record.side is Side.SOURCE
        self.state = State.STARTING
        self.record = record  # as last committed, or being committed in STARTING, RECORDING, CEDING
        self.ownership = ownership
        self.phase = record.phase
        self.paused = False
        self._wait = 0  # token of the outcome that the state waits for
        self._lost = 0  # pages that the target could not get

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

    # Commits, and the end

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

    def _finish(self, phase: Phase, reason: ms.Refusal | None) -> None:
        self.state = State.DONE
        self._due = None
        self._enter(phase, self.record.round)
        self._do(ev.Finished(phase, reason, lost=self._lost))
