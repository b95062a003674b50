"""What the target has asked for and what it still looks for: maps, then pages. Pure; part of the target's machine.

Maps first, a few segments at a time. Then the sweep looks through the segments, newest first, for pages that the store
says are missing, as credit allows; at the end of a pass that found something it looks again, so that what was not
answered is found too. A pass that found nothing proves that nothing is missing.
"""

from __future__ import annotations

from collections.abc import Iterator

from silofs.migrate import messages as ms
from silofs.migrate import plan
from silofs.migrate.order import Order
from silofs.migrate.states import MAP_COMPLETE, MigrationRecord

MAPS_IN_FLIGHT = 4  # segments whose map is being asked for at a time


class Transfer:
    """Volatile: a restart begins with an empty one, and asks for what is missing then."""

    def __init__(self) -> None:
        self.order = Order()
        self.find_token = 0  # of the FindMissing in flight
        self.swept = False  # a whole pass found nothing missing
        self._asked: dict[bytes, int] = {}  # segment -> request of its MAP_ASK
        self._parts: list[ms.MapPart] = []  # arrived, not committed
        self._request = 0
        self._at = (0, 0)  # where the sweep is: index from the end of the manifest, page
        self._found = False

    def forget(self) -> None:
        """The session is gone, and with it what was asked for."""
        self.order.reset()
        self.drop_maps()
        self.restart()

    def restart(self) -> None:
        """The sweep begins anew."""
        self._at = (0, 0)
        self._found = self.swept = False
        self.find_token = 0

    # Maps

    def drop_maps(self) -> None:
        """The manifest changes: what was asked for may be of a layer that is no more, and is asked for again."""
        self._asked.clear()
        self._parts.clear()

    def maps_overdue(self) -> None:
        """Ask again for the maps that have not come."""
        queued = {part.segment for part in self._parts}
        self._asked = {uuid: request for uuid, request in self._asked.items() if uuid in queued}

    def ask_maps(self, record: MigrationRecord) -> Iterator[tuple[int, bytes, int]]:
        """(request, segment, first page) of the maps to ask for now."""
        for segment, at in zip(record.segments, record.map_next, strict=True):
            if len(self._asked) >= MAPS_IN_FLIGHT:
                return
            if at != MAP_COMPLETE and segment.uuid not in self._asked:
                self._request = (self._request + 1) & 0xFFFFFFFF
                self._asked[segment.uuid] = self._request
                yield self._request, segment.uuid, at

    def asked_map(self, segment: bytes, request: int) -> bool:
        return self._asked.get(segment) == request

    @property
    def maps_asked(self) -> bool:
        return bool(self._asked)

    def map_arrived(self, record: MigrationRecord, message: ms.Map) -> None:
        """Keep a part until it can be committed. ProtocolError if it is not what was asked for."""
        part = message.part
        if not self.asked_map(part.segment, message.request):
            return
        if any(queued.segment == part.segment for queued in self._parts):
            return
        plan.with_parts(record, (part,))
        self._parts.append(part)  # what follows it is asked for once it is durable

    @property
    def has_parts(self) -> bool:
        return bool(self._parts)

    def take_parts(self) -> tuple[ms.MapPart, ...]:
        """The parts to commit now."""
        parts, self._parts = tuple(self._parts), []
        for part in parts:
            self._asked.pop(part.segment, None)
        return parts

    # Pages

    def look(self, record: MigrationRecord) -> tuple[bytes, int] | None:
        """Where to look for missing pages next: segment and first page; None: not now, or `swept`."""
        if self.find_token or self.swept or not self.order.hungry:
            return None
        index, page = self._at
        if index >= len(record.segments):
            if not self.order.sweep_idle:
                return None
            if not self._found:
                self.swept = True
                return None
            index, page = self._at = (0, 0)
            self._found = False
        return record.segments[-1 - index].uuid, page

    def missing(self, segment: bytes, runs: tuple[ms.Run, ...], next_page: int | None) -> None:
        """What that look found."""
        self.find_token = 0
        index, _ = self._at
        self._at = (index + 1, 0) if next_page is None else (index, next_page)
        if runs:
            self._found = True
            self.order.add(segment, runs, ms.Priority.SWEEP)

    def unserved(self, request: int, segment: bytes) -> bool:
        """A PULL was not answered, or its pages could not be stored. True if it is one of ours."""
        wanted = self.order.failed(request, segment)
        if wanted is None:
            return False
        self._found = True
        if wanted.priority is ms.Priority.DEMAND:
            self.order.add(wanted.segment, wanted.runs, wanted.priority)
        return True
