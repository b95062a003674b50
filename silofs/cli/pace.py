"""How fast long work goes, and how long it will take: out of what it reports of itself. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Final

WINDOW_S: Final = 5.0  # the rate is over about this long, so that one slow second does not make an hour of what is left
MIN_S: Final = 0.2  # and is said only after this long


class Pace:
    """Rate and remaining time of one piece of work after the other; a new `stage` begins anew."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()
        self._stage: object = None

    def of(self, fields: Mapping[str, Any], now: float) -> dict[str, Any]:
        """`rate` in bytes a second and `eta_seconds`, as far as a report with `bytes_done` tells by `now`."""
        done, total = fields.get("bytes_done"), fields.get("bytes_total")
        if not isinstance(done, int) or "rate" in fields:
            return {}
        if fields.get("stage") != self._stage or (self._samples and done < self._samples[-1][1]):
            self._samples.clear()
            self._stage = fields.get("stage")
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[1][0] >= WINDOW_S:
            self._samples.popleft()
        since, first = self._samples[0]
        if now - since < MIN_S or done == first:
            return {}
        rate = (done - first) / (now - since)
        left = {} if not isinstance(total, int) or total < done else {"eta_seconds": round((total - done) / rate, 1)}
        return {"rate": int(rate), **left}
