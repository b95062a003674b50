"""Times as they are shown. Pure."""

from __future__ import annotations

from datetime import UTC, datetime


def rfc3339(ns: int) -> str:
    """Nanoseconds since 1970 as RFC 3339, UTC, whole seconds."""
    return datetime.fromtimestamp(ns // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
