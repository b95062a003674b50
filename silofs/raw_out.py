"""A volume or snapshot as a raw image: synchronous, over a `Store`.

Into a file only pages that are data are written, the rest stays a hole. What has to be written one byte after the other
(a pipe, a block device, a file that is appended to) gets the zeros as well.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

import numpy as np

from silofs.blocks import LEAF_BYTES, PAGE
from silofs.errors import Busy, Damaged, Interrupted, ObjectMissing
from silofs.facts import Fields
from silofs.images import READER_S, Cancelled, Progress, never
from silofs.layers import schema
from silofs.layers.reader import ReadTxn
from silofs.layers.store import Store
from silofs.sink import Sink
from silofs.states import State

_ZEROS: Final = bytes(1 << 20)

Piece = tuple[int, bytes]  # offset, data


def write(store: Store, state: State, fd: int, *, progress: Progress, cancelled: Cancelled = never) -> Fields:
    """Write the content of a sealed layer's chain to `fd`. The verb's result.

    Raises Damaged for a page that cannot be read, Busy for one that is still at a peer, Interrupted, StoreFull.
    """
    reader = store.reader()
    try:
        # No snapshot of the store grows old while a receiver is slow: what is written is in memory by then.
        sink = Sink(fd, cancelled, idle=reader.renew)
        return {"size": state.size, "bytes_written": _write(reader, state, fd, sink, progress, cancelled)}
    finally:
        reader.close()


def _write(reader: ReadTxn, state: State, fd: int, sink: Sink, progress: Progress, cancelled: Cancelled) -> int:
    """Bytes of data that were written."""
    written = at = 0
    sparse = _can_be_sparse(fd)
    if sparse:
        os.ftruncate(fd, 0)
        os.ftruncate(fd, state.size)
    for offset, data in _pieces(reader, state, cancelled):
        if sparse:
            os.lseek(fd, offset, os.SEEK_SET)
        else:
            _zeros(sink, offset - at)
        sink.write(data)
        at = offset + len(data)
        written += len(data)
        progress({"stage": "writing", "bytes_done": written, "bytes_total": state.data_bytes})
    if sparse:
        os.lseek(fd, state.size, os.SEEK_SET)
    else:
        _zeros(sink, state.size - at)
    return written


def _can_be_sparse(fd: int) -> bool:
    """Whether the image may be put into the file at its places: an empty beginning of a file, or one to be replaced."""
    appended = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND
    return stat.S_ISREG(os.fstat(fd).st_mode) and not appended and os.lseek(fd, 0, os.SEEK_CUR) == 0


def _zeros(sink: Sink, count: int) -> None:
    while count:
        part = _ZEROS[: min(count, len(_ZEROS))]
        sink.write(part)
        count -= len(part)


def _pieces(reader: ReadTxn, state: State, cancelled: Cancelled) -> Iterator[Piece]:
    """The data of the image, ascending; the read transaction never grows old."""
    began = time.monotonic()
    for leaf in list(reader.chain_leaves(state.layer)):
        if cancelled():
            raise Interrupted("the export was stopped")
        if time.monotonic() - began > READER_S:
            reader.renew()
            began = time.monotonic()
        try:
            pieces = _of_leaf(reader, state, leaf)
        except ObjectMissing:
            reader.renew()  # moved meanwhile: once, in a fresh transaction
            pieces = _of_leaf(reader, state, leaf)
        yield from pieces


def _of_leaf(reader: ReadTxn, state: State, leaf: int) -> list[Piece]:
    refs = reader.resolve(state.layer, leaf)
    kinds = schema.kinds(refs)
    if (kinds == schema.LOST).any():
        at = leaf * LEAF_BYTES + int(np.flatnonzero(kinds == schema.LOST)[0]) * PAGE
        raise Damaged(f"the page at byte {at} was damaged and is lost")
    if (kinds == schema.REMOTE).any():
        hint = "wait until the migration is complete: silofs migration ls"
        raise Busy(f"pages near byte {leaf * LEAF_BYTES} are still at a peer", hint=hint)
    edges = [0, *(np.flatnonzero(np.diff(kinds >= schema.DATA)) + 1).tolist(), len(kinds)]
    pieces = []
    for start, stop in pairwise(edges):
        at = leaf * LEAF_BYTES + start * PAGE
        if kinds[start] >= schema.DATA and at < state.size:
            pieces.append((at, b"".join(reader.views(refs[start:stop]))[: state.size - at]))
    return pieces
