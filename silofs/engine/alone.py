"""Whether one client has the daemon to itself and the disk answers at once: then its fsyncs are written in place.

To hand a write to a thread and to be woken by it takes 20 to 45 us, a tenth of an fsync of 4 KiB. To write on the event
loop itself saves that, and nothing else is served meanwhile. So it is for who has nobody to keep waiting: all requests
that came since its last flushes were its own. Whoever comes then waits for one small write, and ends the streak. Those
before it took less than IN_PLACE_NS; how long that one takes nobody knows (docs/decisions/journal.md).
"""

from __future__ import annotations

from silofs.engine.served import Served
from silofs.engine.threads import Bell
from silofs.limits import ALONE_FLUSHES, IN_PLACE_NS, IN_PLACE_REST


class Alone:
    """Compares what was read from /dev/fuse (`bell.requests`) with what one volume was served."""

    __slots__ = ("_bell", "_requests", "_served", "_served_requests", "_streak")

    def __init__(self, bell: Bell) -> None:
        self._bell = bell
        self._served: Served | None = None  # of the volume that was flushed last
        self._requests = 0  # all there were by then
        self._served_requests = 0  # and those of the volume
        self._streak = 0  # flushes of one volume with nobody's requests but its own between them

    def flushes(self, served: Served) -> bool:
        """A volume is about to be flushed, which has been served so much; whether that can be done in place."""
        requests, own = self._bell.requests, served.reads + served.writes + served.flushes
        # Its own request is read and not yet served now, as the last one was then.
        if served is self._served and requests - self._requests == own - self._served_requests:
            self._streak += 1
        else:
            self._streak = min(self._streak, 0)
        self._served, self._requests, self._served_requests = served, requests, own
        return self._streak >= ALONE_FLUSHES

    def took(self, nanoseconds: int) -> None:
        """A write in place lasted so long: a disk that is slow is not waited for again soon."""
        if nanoseconds > IN_PLACE_NS:
            self._streak = -IN_PLACE_REST
