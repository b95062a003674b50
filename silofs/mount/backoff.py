"""When a daemon that died is started again. Pure: time is an argument, in seconds of a clock that does not go back.

Restarting at once is right for the crash that happens once a month, and for twenty kills in a row by a test; it is
wrong for a daemon that dies at every start, which would eat a core for ever. So there is no delay until more than
CRASH_DEATHS deaths lie within CRASH_WINDOW_S, or more than CRASH_STARTS daemons in a row have died before they served;
from then on the holder *holds* (requests wait, without an error) and tries at doubling intervals.
"""

from __future__ import annotations

from silofs import limits


class Backoff:
    """The deaths of one mount's daemons."""

    def __init__(self) -> None:
        self._deaths: list[float] = []
        self._starts = 0  # in a row, that ended before anything was served
        self._held = 0

    @property
    def holding(self) -> bool:
        """The last death or failure asked for a delay."""
        return self._held > 0

    def died(self, now: float, *, served_s: float) -> float:
        """Seconds to wait before the next start. served_s: how long the dead one had served, 0 if it never did."""
        if served_s >= limits.CRASH_WINDOW_S:
            self._deaths.clear()
            self._held = 0
        self._deaths = [at for at in self._deaths if now - at < limits.CRASH_WINDOW_S]
        self._deaths.append(now)
        self._starts = 0 if served_s else self._starts + 1
        if len(self._deaths) <= limits.CRASH_DEATHS and self._starts <= limits.CRASH_STARTS:
            self._held = 0
            return 0.0
        return self._delay()

    def learnt(self) -> None:
        """The last death taught something: its successor knows what it must not touch again. It does not count."""
        self._deaths[-1:] = []
        self._starts = 0

    def failed(self) -> float:
        """The same for a daemon that said why it could not open the store: nobody gains from trying again at once."""
        return self._delay()

    def served(self) -> None:
        """A daemon serves again after failures. Deaths are forgotten by their age alone."""
        self._starts = 0
        if len(self._deaths) <= limits.CRASH_DEATHS:
            self._held = 0

    def _delay(self) -> float:
        delay = min(limits.CRASH_DELAY_MAX_S, limits.CRASH_DELAY_S * 2.0**self._held)
        self._held = min(self._held + 1, 30)
        return delay
