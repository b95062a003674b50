"""A stream into a store: synchronous steps over a `Store`; nothing is seen of it before all of it is there.

What arrives goes into a layer that nothing shows, under the uuid that names the snapshot's content, on the layer of the
state that it changes. The layer is pinned, and a record says for whom: so an import that was interrupted keeps what is
durable, and the next one stores only what is missing. The end of the stream, verified, is one transaction: the volume
shows the layer, the snapshot has its name, pin and record are gone. docs/stream.md has what a crash leaves.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import pairwise
from typing import Final

import msgspec
import numpy as np

from silofs import failpoints, stream
from silofs.blocks import LEAF_MASK, LEAF_PAGES, LEAF_SHIFT, PAGE, pages_for
from silofs.errors import BadStream, Busy, Exists, NoSuchSnapshot, NoSuchVolume, TryAgain, UserError
from silofs.facts import Facts, Fields, View
from silofs.images import Progress
from silofs.layers import schema
from silofs.layers.catalog import Volume
from silofs.layers.reader import ReadTxn
from silofs.layers.store import Store
from silofs.layers.transaction import WriteTxn
from silofs.limits import STREAM_KEEP_S
from silofs.stream import Decoder, Frame, Head
from silofs.verbs import Args, name_in, receiving

TABLE: Final = "host"
PREFIX: Final = "stream:"


class Arriving(msgspec.Struct, frozen=True):
    """What is kept of a stream that has not come to its end. Key: uuid of its content."""

    name: str  # of the volume that it is for
    header: bytes  # of the stream: another one begins anew
    layer: int
    since_ns: int


class Target(msgspec.Struct, frozen=True):
    """Where a stream goes. `layer` 0: the store has that content already, and nothing is stored."""

    head: Head
    name: str
    onto: bool
    layer: int
    base: int = 0  # layer


# Transactions


def begin(txn: WriteTxn, args: Args, head: Head, view: View) -> Target:
    """Check that the stream fits, and make or find the layer for it. Raises Busy (with what to do), Exists."""
    name, onto = name_in(args, "name"), args.get("onto") is True
    _forget_old(txn)
    if onto:
        volume = receiving(txn, name, view)
        if txn.unchanged(volume.uuid) == head.uuid and _named(txn, volume, head):
            return Target(head, name, onto, 0)
        base = _base(txn, volume, head)
        if any(snapshot.name == head.snapshot for snapshot in txn.snapshots(volume.uuid)):
            raise Exists(f"{name} has a snapshot '{head.snapshot}', and it is another state", hint="remove it first")
    else:
        if head.base:
            hint = f"silofs import --onto NAME brings a volume from {head.base_name} to {head.name}"
            raise UserError(f"the stream has only what changed since {head.base_name}", hint=hint)
        if any(volume.name == name for volume in txn.volumes()):
            raise Exists(f"there is a volume {name!r} already")
        base = 0
    return Target(head, name, onto, _layer(txn, name, head, base), base)


def _base(txn: WriteTxn, volume: Volume, head: Head) -> int:
    """The layer of the state that the stream changes, which the volume has to be at."""
    if not head.base:
        raise UserError(f"the stream has all of {head.name}", hint="silofs import FILE NAME makes a volume of it")
    layer = txn.layer_by_uuid(head.base)
    if layer is None or not any(each.id == layer.id for each in txn.chain(volume.head)):
        hint = "export the whole snapshot, or what changed since one that is here: silofs info shows them"
        raise Busy(f"{volume.name} has never been at {head.base_name}", hint=hint)
    if txn.unchanged(volume.uuid) != head.base:
        names = [each.name for each in txn.snapshots(volume.uuid) if each.layer == layer.id]
        back = f"silofs rollback {volume.name}@{names[0]} --yes" if names else "a rollback to that state"
        hint = f"{back} goes back there; what was written since is lost then"
        raise Busy(f"{volume.name} is not at {head.base_name} any more: it was changed since", hint=hint)
    return layer.id


def _named(txn: WriteTxn, volume: Volume, head: Head) -> bool:
    try:
        found = txn.find_snapshot(volume.uuid, head.snapshot)
    except NoSuchSnapshot:
        return False
    return txn.layer(found.layer).uuid == head.uuid


def _layer(txn: WriteTxn, name: str, head: Head, base: int) -> int:
    """The layer that the stream is stored in, as an earlier attempt left it; 0 if the content is here."""
    key, header = PREFIX + head.uuid.hex(), stream.header_of(head)
    known, record = txn.layer_by_uuid(head.uuid), _arriving(txn).get(key)
    if record is not None and (record.header != header or record.name != name):
        _forget(txn, key, record)
        known, record = txn.layer_by_uuid(head.uuid), None
    if known is not None and known.doomed:
        raise TryAgain(f"what is left of an older import of {head.name} is being removed", hint="try again soon")
    if known is not None and record is None:
        if any(not layer.complete for layer in txn.chain(known.id)):
            raise Busy(f"{head.name} is arriving here in another way", hint="silofs migration ls")
        return 0
    layer = txn.receive_layer(head.uuid, base, head.size, head.clip)
    txn.pin(layer.id, key)
    if record is None:
        arriving = Arriving(name, header, layer.id, time.time_ns())
        txn.put_value(TABLE, key, msgspec.msgpack.encode(arriving))
    return layer.id


def _arriving(txn: ReadTxn) -> dict[str, Arriving]:
    values = txn.values(TABLE).items()
    return {key: msgspec.msgpack.decode(data, type=Arriving) for key, data in values if key.startswith(PREFIX)}


def _forget(txn: WriteTxn, key: str, record: Arriving) -> None:
    txn.delete_value(TABLE, key)
    txn.unpin(record.layer, key)


def _forget_old(txn: WriteTxn) -> None:
    """Drop what interrupted imports have left, when nobody came back for it."""
    for key, record in _arriving(txn).items():
        if time.time_ns() - record.since_ns > STREAM_KEEP_S * 1e9:
            _forget(txn, key, record)


def abandon(txn: WriteTxn, args: Args, view: View) -> Fields:
    """Drop what interrupted imports have stored for a volume."""
    name = name_in(args, "name")
    found = {key: record for key, record in _arriving(txn).items() if record.name == name}
    if not found:
        raise NoSuchVolume(f"no import of {name!r} was interrupted", hint="there is nothing to abandon")
    stored = sum(txn.layer(record.layer).own_pages for record in found.values())
    for key, record in found.items():
        _forget(txn, key, record)
    return {"name": name, "bytes_dropped": stored * PAGE}


def publish(txn: WriteTxn, target: Target, view: View) -> Fields:
    """The end: the volume is at the new state, and its snapshot has its name. Raises Busy as `begin` does."""
    head = target.head
    key = PREFIX + head.uuid.hex()
    if target.onto:
        volume = receiving(txn, target.name, view)
        if txn.unchanged(volume.uuid) == head.uuid and _named(txn, volume, head):
            return Facts(txn, view).info(volume)
        _base(txn, volume, head)
    layer = txn.layer_by_uuid(head.uuid)
    if layer is None or layer.doomed:
        raise TryAgain(f"{head.name} was removed meanwhile", hint="send it again")
    if target.layer:
        layer = txn.put_map(layer.id, [], mapped=pages_for(head.size))
    if target.onto:
        volume = txn.rollback(volume.uuid, layer.id)
    else:
        volume = txn.create_volume(target.name, head.size, uid=os.geteuid(), gid=os.getegid(), parent=layer.id)
    txn.add_snapshot(volume.uuid, head.snapshot, layer.id, created_ns=head.created_ns)
    txn.delete_value(TABLE, key)
    txn.unpin(layer.id, key)
    return Facts(txn, view).info(txn.volume(volume.uuid))


# Storing


class Stored(msgspec.Struct):
    """What became of the pages of a stream."""

    stored: int = 0
    skipped: int = 0
    zeros: int = 0

    def fields(self) -> Fields:
        counted = {"bytes_stored": self.stored, "bytes_skipped": self.skipped, "zero_bytes": self.zeros}
        return {key: pages * PAGE for key, pages in counted.items()}


def store_frames(
    store: Store, target: Target, decoder: Decoder, *, progress: Progress, total: int | None, batch_bytes: int
) -> Stored:
    """Verify the stream to its end, and store what the layer does not have. Raises BadStream, StoreFull, Interrupted.

    total: bytes of the stream, if that is known. Everything up to the last whole batch stays when it raises.
    """
    done = Stored()
    batch = _Batch(store, target.layer, batch_bytes)
    reader = store.reader()
    try:
        for frame in decoder.frames():
            if target.layer:
                reader.renew()
                _sort(reader, target, frame, batch, done)
            else:
                done.skipped += sum(count for _, count, kind in frame.runs if kind == stream.DATA)
            known = {} if total is None else {"bytes_total": total}
            progress({"stage": "receiving", "bytes_done": decoder.chain.bytes, **known, **done.fields()})
    finally:
        reader.close()
        batch.end()
    return done


def _sort(reader: ReadTxn, target: Target, frame: Frame, batch: _Batch, done: Stored) -> None:
    """Give the batch what the layer does not have yet of a frame."""
    at = 0
    last, tail = divmod(target.head.size, PAGE)
    for first, count, kind in frame.runs:
        if kind == stream.ZERO:
            _sort_zeros(reader, target, first, count, batch, done)
            continue
        data = bytes(frame.data[at * PAGE : (at + count) * PAGE])
        at += count
        if tail and first + count > last and any(data[(last - first) * PAGE + tail :]):
            raise BadStream("the stream has bytes beyond the end of the volume")
        for start, stop, missing in _parts(reader, target.layer, first, count):
            if not missing:
                done.skipped += stop - start
                continue
            pages = nonzero_pages(data[(start - first) * PAGE : (stop - first) * PAGE], start)
            done.stored += len(pages)
            batch.add(pages, [])
            if len(pages) < stop - start:
                for zero, length in runs([page for page in range(start, stop) if page not in pages]):
                    _sort_zeros(reader, target, zero, length, batch, done)


def _sort_zeros(reader: ReadTxn, target: Target, first: int, count: int, batch: _Batch, done: Stored) -> None:
    """Only where the base has something: elsewhere pages read as zeros as it is, however many they are said to be."""
    if not target.base:
        return
    for leaf in reader.chain_leaves(target.base, first >> LEAF_SHIFT, ((first + count - 1) >> LEAF_SHIFT) + 1):
        page = max(first, leaf << LEAF_SHIFT)
        end = min(first + count, (leaf + 1) << LEAF_SHIFT)
        for start, stop, missing in _parts(reader, target.layer, page, end - page):
            if missing:
                done.zeros += stop - start
                batch.add({}, [(start, stop - start)])


def _parts(reader: ReadTxn, layer: int, first: int, count: int) -> Iterator[tuple[int, int, bool]]:
    """(first, end, whether the layer lacks them) of pages; a run of them is in one leaf."""
    page, end = first, first + count
    while page < end:
        leaf = page >> LEAF_SHIFT
        stop = min(end, (leaf + 1) << LEAF_SHIFT)
        own = reader.own_leaf(layer, leaf)
        start = page & LEAF_MASK
        holes = np.ones(stop - page, bool) if own is None else own[start : start + stop - page] == schema.HOLE
        edges = [0, *(np.flatnonzero(np.diff(holes)) + 1).tolist(), len(holes)]
        for begin, until in pairwise(edges):
            yield page + begin, page + until, bool(holes[begin])
        page = stop


def runs(pages: list[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of the runs in a sorted list."""
    at = 0
    while at < len(pages):
        end = at + 1
        while end < len(pages) and pages[end] == pages[end - 1] + 1:
            end += 1
        yield pages[at], end - at
        at = end


def nonzero_pages(data: bytes, first: int) -> dict[int, bytes]:
    """Those of some pages that are not all zero."""
    words = np.frombuffer(data, np.uint64).reshape(-1, PAGE // 8)
    return {first + at: data[at * PAGE : (at + 1) * PAGE] for at in np.flatnonzero(words.any(axis=1)).tolist()}


class _Batch:
    """Gathers pages for a transaction; one is filled while the one before it commits."""

    def __init__(self, store: Store, layer: int, batch_bytes: int) -> None:
        self._store = store
        self._layer = layer
        self._pages_max = max(1, batch_bytes // PAGE)
        self._pages: dict[int, bytes] = {}
        self._zeros: list[tuple[int, int]] = []
        self._under_way: Future[None] | None = None

    def add(self, pages: dict[int, bytes], zeros: list[tuple[int, int]]) -> None:
        self._pages |= pages
        self._zeros += zeros
        if len(self._pages) >= self._pages_max or len(self._zeros) >= LEAF_PAGES:
            self._submit()

    def _submit(self) -> None:
        pages, zeros, layer = self._pages, self._zeros, self._layer
        self._pages, self._zeros = {}, []
        self._wait()
        if pages or zeros:
            nbytes = len(pages) * PAGE
            self._under_way = self._store.submit(lambda txn: _put(txn, layer, pages, zeros), nbytes=nbytes)

    def _wait(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()
            failpoints.hit("stream.after_batch")

    def end(self) -> None:
        """Make durable what is left."""
        self._submit()
        self._wait()


def _put(txn: WriteTxn, layer: int, pages: dict[int, bytes], zeros: list[tuple[int, int]]) -> None:
    txn.put_map(layer, [(first, count, schema.ZERO) for first, count in zeros])
    txn.put_map(layer, [(first, count, schema.REMOTE) for first, count in runs(sorted(pages))])
    txn.fill(layer, pages)
