"""What both machines share: tokens, the session, one timer, and the list of actions that a call builds up."""

from __future__ import annotations

from collections.abc import Iterable

from silofs import limits
from silofs.migrate import events as ev
from silofs.migrate import messages as ms
from silofs.migrate.states import Ownership, Phase


class Machine:
    """Base of SourceMachine and TargetMachine. Not thread-safe; one shell task owns it.

    `handle` and `tick` return actions in the order in which they must be performed. A ProtocolError from `handle`
    means that the peer sent what no correct peer sends: nothing was changed, and the session is to be closed.
    """

    def __init__(self, migration: bytes, peer: bytes, volumes: tuple[ms.VolumeEpoch, ...]) -> None:
        self.migration = migration
        self.peer = peer
        self.volumes = volumes
        self.session: bytes | None = None
        self.phase = Phase.OFFERED
        self._token = 0
        self._actions: list[ev.Action] = []
        self._due: float | None = None

    # What the shell calls

    def handle(self, event: ev.Event, now: float) -> list[ev.Action]:
        """Apply one event at time `now` (seconds of any monotonic clock)."""
        if isinstance(event, ev.Received):
            message = event.message
            ours = message.migration == self.migration and message.session == self.session
            if ours and message.volumes == self.volumes:
                self._on_message(message, now)
        elif isinstance(event, ev.Connected):
            self.session = event.session
            self._on_connected(now)
        elif isinstance(event, ev.Disconnected):
            if event.session == self.session:
                self.session = None
                self._on_disconnected(now)
        else:
            self._on_event(event, now)
        return self._flush()

    def tick(self, now: float) -> list[ev.Action]:
        """To be called at `deadline()` or later; earlier calls are harmless."""
        due = self.deadline()
        if due is not None and now >= due:
            self._on_timeout(now)
        return self._flush()

    def deadline(self) -> float | None:
        """When `tick` has something to do, in the caller's clock; None: nothing is waiting for time to pass."""
        return self._due

    @property
    def done(self) -> bool:
        """Finished was returned: the shell drops the machine."""
        raise NotImplementedError

    @property
    def unsettled(self) -> bool:
        """A commit of ownership records is not confirmed, and will be repeated until it is: see `blocked`."""
        raise NotImplementedError

    # What the machines define

    def _on_message(self, message: ms.MigrationMessage, now: float) -> None:
        raise NotImplementedError

    def _on_event(self, event: ev.Event, now: float) -> None:
        raise NotImplementedError

    def _on_connected(self, now: float) -> None:
        raise NotImplementedError

    def _on_disconnected(self, now: float) -> None:
        raise NotImplementedError

    def _on_timeout(self, now: float) -> None:
        raise NotImplementedError

    # What they use

    def _flush(self) -> list[ev.Action]:
        actions, self._actions = self._actions, []
        return actions

    def _do(self, action: ev.Action) -> None:
        self._actions.append(action)

    def _next(self) -> int:
        self._token += 1
        return self._token

    @property
    def _header(self) -> tuple[bytes, bytes, tuple[ms.VolumeEpoch, ...]]:
        assert self.session is not None
        return self.migration, self.session, self.volumes

    def _send(self, message: ms.MigrationMessage) -> None:
        self._do(ev.Send(message))

    def _repeat(self, now: float) -> None:
        """The present state's message is sent again when nothing came of it."""
        self._due = now + limits.REPEAT_S if self.session is not None else None

    def _enter(self, phase: Phase, round_: int) -> None:
        if phase is not self.phase:
            self.phase = phase
            self._do(ev.PhaseChanged(phase, round_))


def by_uuid(records: Iterable[Ownership], volumes: tuple[ms.VolumeEpoch, ...]) -> dict[bytes, Ownership]:
    """The ownership records of exactly these volumes, in the group's order."""
    found = {record.uuid: record for record in records}
    assert all(volume.uuid in found for volume in volumes), "a volume of the group has no ownership record"
    return {volume.uuid: found[volume.uuid] for volume in volumes}


def blocked(machines: Iterable[Machine], volumes: Iterable[bytes]) -> bool:
    """Whether no machine may be made now for these volumes: an older one may yet rewrite their ownership records.

    To be asked before `SourceMachine.start` (which is then Busy) and before `TargetMachine.create` (the message is
    dropped; it comes again). What the store shows meanwhile may be what that commit is about to overwrite.
    """
    wanted = set(volumes)
    return any(
        machine.unsettled and any(volume.uuid in wanted for volume in machine.volumes) for machine in machines
    )
