"""The source's rounds: OFFER until READY, then seal, record and announce. When they end: `source_switchover`."""

from __future__ import annotations

from msgspec.structs import replace

from silofs.errors import ProtocolError
from silofs.migrate import events as ev
from silofs.migrate import messages as ms
from silofs.migrate import plan, states
from silofs.migrate.source_serving import Serving
from silofs.migrate.source_states import State
from silofs.migrate.states import MigrationRecord, Ownership, Phase


class Rounds(Serving):
    """One round after the other, each in the durable manifest before the target hears of it."""

    def __init__(self, record: MigrationRecord, ownership: dict[bytes, Ownership]) -> None:
        super().__init__(record, ownership)
        self.rounds: list[int] = []  # pages of each round of this attempt to converge
        self._last: tuple[int, float] = (0, 0.0)  # the last round: pages, when sealed
        self._settled = True  # the machine that brought the volumes, of which this is the RETURN
        self._ready_session: bytes | None = None

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
