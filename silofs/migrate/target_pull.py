"""What the target asks for: maps, then pages that its store says are missing; ROUND_DONE when none is.

It drives every transfer, because only it knows what it durably holds. What is in flight is in `transfer`.
"""

from __future__ import annotations

from collections.abc import Iterable

from silofs import limits
from silofs.migrate import events as ev
from silofs.migrate import messages as ms
from silofs.migrate.states import Ownership
from silofs.migrate.target_manifest import Manifest
from silofs.migrate.target_states import State


class Pull(Manifest):
    """Demand at any time, the sweep unless it is paused, held or resting."""

    def __init__(
        self, migration: bytes, peer: bytes, volumes: tuple[ms.VolumeEpoch, ...], ownership: dict[bytes, Ownership]
    ) -> None:
        super().__init__(migration, peer, volumes, ownership)
        self.paused = False
        self.held = False  # a RETURN of these volumes runs here: no sweep, no COMPLETE
        self._sweep_after: float | None = None  # the sweep rests until then
        self._progress_at = 0.0

    def expects(self, session: bytes, request: int, segment: bytes, runs: Iterable[ms.Run]) -> bool:
        """Whether these pages answer a PULL of this session: else they are not to be stored."""
        return session == self.session and self.transfer.order.expects(request, segment, runs)

    def _unserved(self, request: int, segment: bytes, now: float) -> None:
        if self.transfer.asked_map(segment, request):
            self._repeat(now)
        elif self.transfer.unserved(request, segment):
            self._sweep_after = now + limits.REPEAT_S

    def _advance_maps(self, now: float) -> None:
        if self.session is None or not self._manifest_current:
            return
        record = self.record
        assert record is not None
        if self._committing is not None and self._committing.map_next != record.map_next:
            return  # parts are on their way to the disk: what to ask for next shows when they are there
        for request, segment, first in self.transfer.ask_maps(record):
            self._send(ms.MapAsk(*self._header, request, segment, first))
            self._repeat(now)

    def _advance_pages(self, now: float) -> None:
        if self.session is None or not self._manifest_current or not self._maps_complete:
            return
        sweep = not self.paused and not self.held and self._sweep_after is None and self._wants_pages
        look = self.transfer.look(self.record) if sweep and self.record is not None else None
        if look is not None:
            self.transfer.find_token = self._next()
            self._do(ev.FindMissing(self.transfer.find_token, *look))
        flying = self.transfer.order.flying
        for request, wanted in self.transfer.order.take(sweep=sweep):
            if not flying:
                self._progress_at = now
                flying = 1
            self._send(ms.Pull(*self._header, request, wanted.segment, wanted.runs, wanted.priority))

    @property
    def _wants_pages(self) -> bool:
        if self.state is State.INCOMING:
            return self._announce is not None and self._announce.pages
        return self.state is State.PULLING or (self.state is State.GRANTED and self.returning)

    def _round_done(self) -> None:
        announce = self._announce
        if announce is None or self.session is None or not self._manifest_current or not self._maps_complete:
            return
        if (self.transfer.swept or not announce.pages) and self._done_sent != announce.round:
            self._done_sent = announce.round
            self._send(ms.RoundDone(*self._header, announce.round))
