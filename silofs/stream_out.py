"""A snapshot as a stream, whole or as what changed since another one: synchronous, over a `Store`.

What is written never changes (both layers are sealed, and held by the caller), and frames go from the first page to the
last. So a file that an export was interrupted in is continued: its frames are read and verified, what follows the last
sound one is cut off, and the next one covers the pages from there on.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator

import numpy as np

from silofs import failpoints, stream
from silofs.blocks import LEAF_MASK, LEAF_SHIFT, PAGE
from silofs.errors import BadFormat, BadStream, Busy, Damaged, Interrupted, ObjectMissing
from silofs.facts import Fields
from silofs.images import READER_S, Cancelled, Progress, never
from silofs.layers import diff, schema
from silofs.layers.reader import ReadTxn
from silofs.layers.store import Store
from silofs.limits import STREAM_PAGES, STREAM_RUNS
from silofs.sink import Sink, Source
from silofs.states import Sent

Piece = tuple[int, int, int, bytes]  # first page, pages, kind of the run, its bytes


def write(store: Store, sent: Sent, fd: int, *, progress: Progress, cancelled: Cancelled = never) -> Fields:
    """Write the stream to `fd`; a regular file that has the beginning of this very stream is continued.

    Raises Damaged for a page that cannot be read, Busy for one that is still at a peer, Interrupted, StoreFull.
    """
    chain, whole = _continued(sent.head, fd, cancelled)
    kept = chain.bytes if chain is not None else 0
    encoder = stream.Encoder(sent.head, chain)
    if not whole:
        reader = store.reader()
        try:
            # No snapshot of the store grows old while a receiver is slow: what is written is in memory by then.
            _send(reader, sent, encoder, Sink(fd, cancelled, idle=reader.renew), progress, cancelled)
        finally:
            reader.close()
    done = encoder.chain
    counts = {"data_bytes": done.data_pages * PAGE, "zero_bytes": done.zero_pages * PAGE}
    return {"size": sent.head.size, "bytes_written": done.bytes - kept, "bytes_kept": kept, **counts}


def _send(
    reader: ReadTxn, sent: Sent, encoder: stream.Encoder, sink: Sink, progress: Progress, cancelled: Cancelled
) -> None:
    """All frames from where the stream stands."""
    if not encoder.chain.number:
        sink.write(encoder.header)
    total = sent.data_bytes if not sent.head.base else None

    def report(leaf: int, leaves: int) -> None:
        done = encoder.chain.data_pages * PAGE
        steps = {"steps_done": leaf, "steps_total": leaves} if total is None else {"bytes_total": total}
        progress({"stage": "sending", "bytes_done": done, "bytes_written": encoder.chain.bytes, **steps})

    batch = _Batch(encoder, sink)
    began = time.monotonic()
    first = encoder.chain.page
    leaves = [leaf for leaf in diff.suspects(reader, sent.base, sent.layer) if (leaf + 1) << LEAF_SHIFT > first]
    for number, leaf in enumerate(leaves):
        if cancelled():
            raise Interrupted("the export was stopped")
        if time.monotonic() - began > READER_S:
            reader.renew()
            began = time.monotonic()
        try:
            pieces = list(_pieces(reader, sent, leaf, first))
        except ObjectMissing:
            reader.renew()  # moved meanwhile: once, in a fresh transaction
            pieces = list(_pieces(reader, sent, leaf, first))
        for piece in pieces:
            batch.add(piece)
        report(number, len(leaves))
    batch.flush()
    sink.write(encoder.end())


class _Batch:
    """Gathers runs until a frame is full."""

    def __init__(self, encoder: stream.Encoder, sink: Sink) -> None:
        self._encoder = encoder
        self._sink = sink
        self._runs: list[stream.Run] = []
        self._data: list[bytes] = []
        self._pages = 0

    def add(self, piece: Piece) -> None:
        first, count, kind, data = piece
        while count:
            room = count if kind == stream.ZERO else min(count, STREAM_PAGES - self._pages)
            if not room or len(self._runs) == STREAM_RUNS:
                self.flush()
                continue
            self._runs.append((first, room, kind))
            if kind == stream.DATA:
                self._data.append(data[: room * PAGE])
                data = data[room * PAGE :]
                self._pages += room
            first, count = first + room, count - room

    def flush(self) -> None:
        if self._runs:
            last, count, _ = self._runs[-1]
            self._sink.write(self._encoder.frame(last + count, self._runs, b"".join(self._data)))
            failpoints.hit("stream.after_frame")
        self._runs, self._data, self._pages = [], [], 0


def _pieces(reader: ReadTxn, sent: Sent, leaf: int, first: int) -> Iterator[Piece]:
    """What changed in one leaf, from page `first` on, with the bytes."""
    refs = reader.resolve(sent.layer, leaf)
    for start, count, kind in diff.runs(reader, sent.base, sent.layer, leaf):
        if start < first:
            start, count = first, start + count - first
        if count <= 0:
            continue
        if kind == schema.ZERO:
            yield start, count, stream.ZERO, b""
            continue
        at = start & LEAF_MASK
        part = refs[at : at + count]
        kinds = schema.kinds(part)
        if (kinds == schema.LOST).any():
            lost = start + int(np.flatnonzero(kinds == schema.LOST)[0])
            raise Damaged(f"the page at byte {lost * PAGE} was damaged and is lost")
        if (kinds == schema.REMOTE).any():
            hint = "wait until the migration is complete: silofs migration ls"
            raise Busy(f"pages near byte {start * PAGE} are still at a peer", hint=hint)
        yield start, count, stream.DATA, b"".join(reader.views(part))


def _continued(head: stream.Head, fd: int, cancelled: Cancelled) -> tuple[stream.Chain | None, bool]:
    """Where the stream in a file stands, and whether it is whole; a torn end is cut off. Another one is emptied.

    What cannot be read, as a shell's `> FILE`, is written to from where it is, as a pipe.
    """
    readable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    if not readable or not stat.S_ISREG(os.fstat(fd).st_mode):
        return None, False
    os.lseek(fd, 0, os.SEEK_SET)
    chain, whole = None, False
    try:
        decoder = stream.Decoder(Source(fd, cancelled).read)
        if decoder.head == head:
            for _ in decoder.frames():
                chain = decoder.chain
            chain, whole = decoder.chain, True
    except (BadStream, BadFormat):
        pass
    end = chain.bytes if chain is not None else 0
    os.ftruncate(fd, end)
    os.lseek(fd, end, os.SEEK_SET)
    return chain, whole
