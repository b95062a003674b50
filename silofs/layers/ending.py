"""How the replay of a journal ends: where nothing was synced yet, or at damage.

The walk over a journal ends where the next record is not, and a write that the power cut tore looks there like a byte
that the disk has spoilt. What tells them apart is what lies behind: a record says as `synced` below which LSN all was
durable when it was appended. So

    a record behind the end says that the one missing was durable     damaged: what was synced is lost
    none says so                                                      torn: what is missing was never synced

Nothing that is whole, and older than the loss, can say so wrongly: what was durable once lies before the store's mark,
or in the journal without a gap from there on, and the walk would have come by it. Hence neither where a record lies nor
what else is behind the end matters (docs/write-path.md has the table). Nobody can say so of what was synced last.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from silofs.extents import Extents
from silofs.layers.records import ALIGN, HEADER, RECORD_MAGIC, WRAP, Mark, Record, header_at, payload_is_sound


class Later(NamedTuple):
    """A record behind the end. `whole`: its payload is sound as well."""

    record: Record
    whole: bool


class Ending(NamedTuple):
    """What follows the end of a walk."""

    lsn: int  # of the record that should have been there
    durable: int  # records below were durable, by what follows; at least `lsn`
    later: list[Later]  # by LSN

    @property
    def damaged(self) -> bool:
        return self.durable > self.lsn

    def missing(self) -> Extents:
        """LSNs of what was durable and cannot be read."""
        found = Extents([(self.lsn, self.durable)])
        for record, whole in self.later:
            if whole:
                found.remove(record.lsn, record.lsn + 1)
        return found


def look_behind(ring: memoryview, secret: int, end: Mark) -> Ending:
    """What is behind a mark at which a walk has ended."""
    durable = end.lsn
    later: dict[int, Later] = {}
    for position in _candidates(ring, end.lsn):
        found = header_at(ring, secret, position)
        if found is None or found.place < end[:2] or found.record.lsn < end.lsn:
            continue
        durable = max(durable, found.synced)
        if found.record.kind != WRAP:
            later[found.record.lsn] = Later(found.record, payload_is_sound(ring, secret, found))
    return Ending(end.lsn, durable, [later[lsn] for lsn in sorted(later)])


def _candidates(ring: memoryview, lsn: int) -> list[int]:
    """Where headers of records from an LSN on may be."""
    lines = np.frombuffer(ring, "<u8").reshape(-1, ALIGN // 8)
    firsts = lines[: 1 - HEADER // ALIGN]
    found = ((firsts[:, 0] & 0xFFFFFFFF) == RECORD_MAGIC) & (firsts[:, 2] >= lsn)
    return [int(at) * ALIGN for at in np.flatnonzero(found)]
