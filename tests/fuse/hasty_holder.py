"""The holder, with less patience for a silent daemon than a test would have."""

from __future__ import annotations

import sys

from silofs import limits

limits.PING_DAEMON_S = 0.1
limits.PONG_DAEMON_S = 2.0

from silofs.mount import holder  # noqa: E402

if __name__ == "__main__":
    sys.exit(holder.main())
