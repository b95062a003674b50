"""What the target asks the source for: maps, pages, digests. Answered without state, from the durable manifest."""

from __future__ import annotations

from silofs.migrate import events as ev
from silofs.migrate import messages as ms
from silofs.migrate import plan
from silofs.migrate.source_states import Source, State
from silofs.migrate.states import MigrationRecord, Ownership


class Serving(Source):
    """Keeps no transfer state: what was not answered is asked for again."""

    def __init__(self, record: MigrationRecord, ownership: dict[bytes, Ownership]) -> None:
        super().__init__(record, ownership)
        self._segments = {segment.uuid: segment for segment in record.segments}
        self._pushed: dict[bytes, ms.Segment] = {}  # PUSHING: final layers, durable but not in the manifest yet
        self._digest_token = 0

    def _serving(self, uuid: bytes) -> ms.Segment | None:
        """The segment, if its bytes may leave now: named durably, or pushed under the freeze of a RETURN."""
        if self.state in (State.STARTING, State.CANCELLING, State.DONE):
            return None
        return self._segments.get(uuid) or self._pushed.get(uuid)

    def _serve_map(self, message: ms.MapAsk) -> None:
        segment = self._serving(message.segment)
        if segment is None:
            self._send(ms.Unserved(*self._header, message.request, message.segment))
        else:
            self._do(ev.ServeMap(message.session, message.request, segment, message.first))

    def _serve_pages(self, message: ms.Pull) -> None:
        segment = self._serving(message.segment)
        held = self.paused and message.priority is ms.Priority.SWEEP
        if segment is None or held:
            self._send(ms.Unserved(*self._header, message.request, message.segment))
            return
        plan.check_runs(segment, message.runs)
        self._do(ev.ServePages(message.session, message.request, segment, message.runs, message.priority))

    def _serve_digests(self) -> None:
        self._digest_token = self._next()
        bases = () if self.record.returning else self.record.bases  # RETURN: the base is not all here
        self._do(ev.ComputeDigests(self._digest_token, bases, self.record.segments))
