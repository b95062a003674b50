"""The holder, with less patience for a silent daemon than a test would have."""

from __future__ import annotations

import sys

from silofs import limits
from silofs.mount import holder

PONG_S = 2.0

if __name__ == "__main__":
    limits.PING_DAEMON_S, limits.PONG_DAEMON_S = 0.1, PONG_S  # of this process: a test that imports it keeps its own
    sys.exit(holder.main())
