"""The pages of a stream into the layer that waits for them: verified frame by frame, stored batch by batch.

Synchronous, over a `Store`. Only what the layer does not have is stored, and what the store has under another name is
referred to (packing.py); so an import that breaks off costs its next attempt the reading, and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import msgspec
import numpy as np
import numpy.typing as npt

from silofs import failpoints, stream
from silofs.blocks import LEAF_MASK, LEAF_SHIFT, PAGE
from silofs.errors import BadStream
from silofs.facts import Fields
from silofs.images import Progress
from silofs.layers import schema
from silofs.layers.reader import ReadTxn
from silofs.layers.store import Store
from silofs.limits import STREAM_ZEROS
from silofs.packing import BlockWriter
from silofs.sink import Source, nothing
from silofs.stream import Decoder, Frame
from silofs.stream_in import Target

Mask = npt.NDArray[np.bool_]


class Stored(msgspec.Struct):
    """What became of the pages of a stream."""

    stored: int = 0
    skipped: int = 0  # the layer had them
    shared: int = 0  # of those that were stored: the store had them under another name
    zeros: int = 0

    def fields(self) -> Fields:
        counted = {"stored": self.stored, "skipped": self.skipped, "shared": self.shared}
        return {f"bytes_{what}": pages * PAGE for what, pages in counted.items()} | {"zero_bytes": self.zeros * PAGE}


def fill(
    store: Store,
    target: Target,
    decoder: Decoder,
    source: Source,
    *,
    progress: Progress,
    total: int | None,
    batch_bytes: int,
) -> Stored:
    """Verify the stream to its end, and store what the layer does not have. Raises BadStream, StoreFull, Interrupted.

    total: bytes of the stream, if that is known. When it raises, every frame that was verified is durable.
    """
    done = Stored()
    if not target.layer:
        for frame in decoder.frames():
            done.skipped += sum(count for _, count, kind in frame.runs if kind == stream.DATA)
        return done
    reader = store.reader()
    source.idle = reader.renew  # no snapshot of the store grows old while a sender is slow
    try:
        with BlockWriter(store, target.layer, batch_bytes=batch_bytes) as writer:
            filler = _Filler(store, target, reader, writer, done)
            try:
                for frame in decoder.frames():
                    reader.renew()
                    filler.take(frame)
                    known = {} if total is None else {"bytes_total": total}
                    progress({"stage": "receiving", "bytes_done": decoder.chain.bytes, **known, **done.fields()})
            finally:
                filler.finish()
    finally:
        source.idle = nothing
        reader.close()
    return done


class _Filler:
    """Sorts what comes into what is there, what is data and what is zero."""

    def __init__(self, store: Store, target: Target, reader: ReadTxn, writer: BlockWriter, done: Stored) -> None:
        self._store = store
        self._target = target
        self._reader = reader
        self._writer = writer
        self._done = done
        self._zeros: list[tuple[int, int, int]] = []  # as put_map wants them
        self._landed = 0

    def take(self, frame: Frame) -> None:
        at = 0
        last, tail = divmod(self._target.head.size, PAGE)
        for first, count, kind in frame.runs:
            if kind == stream.ZERO:
                self._zero(first, count)
                continue
            data = frame.data[at * PAGE : (at + count) * PAGE]
            at += count
            if tail and first + count > last and any(data[(last - first) * PAGE + tail :]):
                raise BadStream("the stream has bytes beyond the end of the volume")
            for start, stop, missing in self._parts(first, count):
                if missing:
                    self._data(start, data[(start - first) * PAGE : (stop - first) * PAGE])
                else:
                    self._done.skipped += stop - start
        stored = self._writer.stored
        self._done.shared = stored.found
        landed = stored.found + stored.packed + stored.raw
        if landed != self._landed:
            self._landed = landed
            failpoints.hit("stream.after_batch")

    def _data(self, first: int, data: memoryview) -> None:
        """Pages that are said to be data; those of zeros among them are zeros."""
        some: Mask = np.asarray(np.frombuffer(data, np.uint64).reshape(-1, PAGE // 8).any(axis=1))
        for start, stop in _runs(some):
            if some[start]:
                self._done.stored += stop - start
                self._writer.add(first + start, data[start * PAGE : stop * PAGE])
            else:
                self._zero(first + start, stop - start)

    def _zero(self, first: int, count: int) -> None:
        """Only where the base has something: elsewhere pages read as zeros, however many they are said to be."""
        if not self._target.base:
            return
        end_leaf = ((first + count - 1) >> LEAF_SHIFT) + 1
        for leaf in self._reader.chain_leaves(self._target.base, first >> LEAF_SHIFT, end_leaf):
            page = max(first, leaf << LEAF_SHIFT)
            end = min(first + count, (leaf + 1) << LEAF_SHIFT)
            for start, stop, missing in self._parts(page, end - page):
                if missing:
                    self._done.zeros += stop - start
                    self._zeros.append((start, stop - start, schema.ZERO))
            if len(self._zeros) >= STREAM_ZEROS:
                self._put_zeros()

    def _put_zeros(self) -> None:
        zeros, self._zeros = self._zeros, []
        if zeros:
            layer = self._target.layer
            self._store.write(lambda txn: txn.put_map(layer, zeros))

    def finish(self) -> None:
        """Make durable what was taken."""
        self._put_zeros()
        self._writer.flush()
        self._done.shared = self._writer.stored.found

    def _parts(self, first: int, count: int) -> Iterator[tuple[int, int, bool]]:
        """(first, end, whether the layer lacks them) of pages; each part lies in one leaf."""
        page, end = first, first + count
        while page < end:
            leaf = page >> LEAF_SHIFT
            stop = min(end, (leaf + 1) << LEAF_SHIFT)
            own = self._reader.own_leaf(self._target.layer, leaf)
            at = page & LEAF_MASK
            holes = np.ones(stop - page, bool) if own is None else own[at : at + stop - page] == schema.HOLE
            for begin, until in _runs(holes):
                yield page + begin, page + until, bool(holes[begin])
            page = stop


def _runs(mask: Mask) -> Iterator[tuple[int, int]]:
    """(first, end) of the parts of a mask that are all true or all false."""
    yield from pairwise([0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)])
