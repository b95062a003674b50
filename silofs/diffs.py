"""`silofs diff`: the changed extents of two states of a volume, written to a file as they are found.

They go through a file of the caller's, as records of offset, length (bytes) and kind, and not through the answer: a
volume that was written all over has more of them than anybody wants to hold in memory.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from typing import BinaryIO, Final

from silofs.blocks import PAGE
from silofs.errors import Interrupted
from silofs.facts import Fields
from silofs.images import READER_S, Cancelled, Progress, never
from silofs.layers import diff, schema
from silofs.layers.store import Store
from silofs.states import Pair

_RECORD: Final = struct.Struct("<QQQ")
_BATCH: Final = 4096  # records between two writes
KINDS: Final = {schema.ZERO: "zero", schema.DATA: "data"}


def write(store: Store, pair: Pair, fd: int, *, progress: Progress, cancelled: Cancelled = never) -> Fields:
    """Write the extents that differ to `fd`; both states are held by the caller. The verb's result but for them."""
    old, new = pair.old, pair.new
    bytes_of = dict.fromkeys(KINDS.values(), 0)
    count = 0
    with os.fdopen(os.dup(fd), "wb") as file:
        batch = bytearray()
        for first, pages, kind in _merged(_runs(store, old.layer, new.layer, progress, cancelled)):
            offset = first * PAGE
            length = min(pages * PAGE, new.size - offset)
            bytes_of[KINDS[kind]] += length
            count += 1
            batch += _RECORD.pack(offset, length, kind)
            if len(batch) >= _BATCH * _RECORD.size:
                file.write(batch)
                batch.clear()
        file.write(batch)
    changed = {f"{kind}_bytes": total for kind, total in bytes_of.items()}
    return {"from": old.name, "to": new.name, "from_size": old.size, "to_size": new.size, "count": count, **changed}


def read(file: BinaryIO) -> Iterator[Fields]:
    """The extents that `write` has put into a file, as they are shown."""
    while record := file.read(_RECORD.size):
        offset, length, kind = _RECORD.unpack(record)
        yield {"offset": offset, "length": length, "kind": KINDS[kind]}


def _runs(store: Store, old: int, new: int, progress: Progress, cancelled: Cancelled) -> Iterator[diff.Run]:
    """The changed runs, leaf by leaf; the read transaction never grows old."""
    reader = store.reader()
    try:
        began = time.monotonic()
        leaves = diff.suspects(reader, old, new)
        for number, leaf in enumerate(leaves):
            if cancelled():
                raise Interrupted("the comparison was stopped")
            if time.monotonic() - began > READER_S:
                reader.renew()
                began = time.monotonic()
                progress({"stage": "comparing", "steps_done": number, "steps_total": len(leaves)})
            yield from diff.runs(reader, old, new, leaf)
    finally:
        reader.close()


def _merged(found: Iterator[diff.Run]) -> Iterator[diff.Run]:
    """Runs that touch and are of one kind become one."""
    first = count = kind = 0
    for start, pages, what in found:
        if count and start == first + count and what == kind:
            count += pages
            continue
        if count:
            yield first, count, kind
        first, count, kind = start, pages, what
    if count:
        yield first, count, kind
