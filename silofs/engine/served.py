"""How much was served since this daemon began: of one volume, or of all together. Pure.

Counted where the requests of the mount end (silofs/mount/files.py), so what migrations, exports and the background move
is not in here. Two additions for a request of the hot path; what else there is to know is worked out by who asks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class Served:
    """Requests that were answered with success, and their bytes."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    flushes: int = 0  # fsync(2) and fdatasync(2); writes that are synchronous by themselves are only writes
    discards: int = 0  # ranges that were punched or zeroed
    discarded_bytes: int = 0

    def add(self, other: Served) -> None:
        for name in _NAMES:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def figures(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in _NAMES}


_NAMES = tuple(field.name for field in fields(Served))
