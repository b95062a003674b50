"""Shared copies: pages of one chain into the head of a volume, by reference.

Only pages of containers may have several references, each on record. So pages that are stored on their own are moved
into containers first, as they are, and the entry that had them refers to them there: the first copy of a range writes
its pages once, and what they took is free again; copies after that write records. What does not fill a container, or is
referred to by very many already, is copied like any other page.
"""

from __future__ import annotations

import time

import numpy as np

from silofs.blocks import LEAF_MASK, LEAF_SHIFT, PAGE_SHIFT, pages_for
from silofs.errors import Damaged, Unsupported
from silofs.layers import containers, schema
from silofs.layers.changes import Numbers
from silofs.layers.containers import BLOCK_PAGES, BLOCK_SHIFT, Block
from silofs.layers.heads import HeadWriter
from silofs.layers.native import Source
from silofs.layers.rewrite import Move, rewrite
from silofs.layers.schema import Refs
from silofs.layers.transaction import WriteTxn
from silofs.limits import SHARE_MOVED_PAGES, SHARE_PAGES


def share(txn: WriteTxn, source: int, first: int, uuid: bytes, to: int, count: int) -> int:
    """Let `count` pages of a volume, from number `to` on, be what a layer shows from `first` on; how many it was.

    The volume gets longer if it has to. Fewer than asked for: as far as the layer goes, so many at a time (limits.py),
    and up to the first page that is not here.
    Unsupported when that is the first one and at a peer, Damaged when it cannot be read.
    The ranges may overlap: what is copied is what was there before.
    """
    end = min(pages_for(txn.layer(source).size) - first, count, SHARE_PAGES)
    refs = _here(_resolved(txn, source, first, max(end, 0)))
    single = _single(txn, refs)
    if len(single) > SHARE_MOVED_PAGES:
        refs, single = refs[: single[SHARE_MOVED_PAGES]], single[:SHARE_MOVED_PAGES]
    data = _read(txn, refs[single])
    if len(data) < len(single):
        refs, single = refs[: single[len(data)]], single[: len(data)]
    numbers, refs = np.arange(to, to + len(refs)), refs.copy()
    volume = txn.volume(uuid)
    if volume.size < (to + len(refs)) << PAGE_SHIFT:
        volume = txn.resize(uuid, (to + len(refs)) << PAGE_SHIFT)
    refs[single] = _contain(txn, refs[single], data)
    left = [index for index, ref in zip(single.tolist(), refs[single].tolist(), strict=True) if not ref]
    if left:
        kept = dict(zip(single.tolist(), data, strict=True))
        refs[left] = txn.store_pages(volume.head, numbers[left].tolist(), Source.of([kept[index] for index in left]))
    writer = HeadWriter(txn, volume)
    writer.refer(numbers, np.where(refs == schema.HOLE, np.uint64(schema.ZERO), refs))
    writer.finish(mtime_ns=time.time_ns())
    txn.chilled.update(np.unique(numbers >> LEAF_SHIFT).tolist())
    return len(refs)


def _resolved(txn: WriteTxn, layer: int, first: int, count: int) -> Refs:
    """What a layer shows of consecutive pages."""
    parts = []
    page, end = first, first + count
    while page < end:
        stop = min(end, (page | LEAF_MASK) + 1)
        start = page & LEAF_MASK
        parts.append(txn.resolve(layer, page >> LEAF_SHIFT)[start : start + stop - page])
        page = stop
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)


def _here(refs: Refs) -> Refs:
    """The references up to the first page that is not here; an error when that is the first."""
    absent = np.flatnonzero(~schema.stored(refs) & (refs > np.uint64(schema.ZERO)))
    if not len(absent):
        return refs
    if absent[0] == 0:
        if schema.kind_of(int(refs[0])) == schema.LOST:
            raise Damaged("the page was damaged and is lost until it is overwritten")
        raise Unsupported("pages that are still at a peer cannot be shared")
    return refs[: absent[0]]


def _single(txn: WriteTxn, refs: Refs) -> Numbers:
    """Which of the references must not be given away as they are, by their places."""
    packed = schema.kinds(refs) == schema.PACKED
    blocks = refs >> np.uint64(schema.SLOT_SHIFT + BLOCK_SHIFT)
    single = schema.stored(refs) & ~packed
    for block in np.unique(blocks[packed]).tolist():
        container_id, number = divmod(block, 1 << (schema.OBJECT_SHIFT - schema.SLOT_SHIFT - BLOCK_SHIFT))
        if not txn.use(container_id).offered(number):
            single |= packed & (blocks == block)
    return np.flatnonzero(single)


def _read(txn: WriteTxn, refs: Refs) -> list[bytes]:
    """The pages, up to the first that is damaged; an error when that is the first."""
    data: list[bytes] = []
    for ref in refs.tolist():
        try:
            data.append(bytes(txn.page(ref)))
        except Damaged:
            if not data:
                raise
            break
    return data


def _contain(txn: WriteTxn, refs: Refs, data: list[bytes]) -> Refs:
    """Move pages that are stored on their own into containers: their references there, 0 for those that stay."""
    moved = np.zeros(len(refs), np.uint64)
    alone = np.flatnonzero(schema.kinds(refs) != schema.PACKED)
    groups = [alone[at : at + BLOCK_PAGES].tolist() for at in range(0, len(alone), BLOCK_PAGES)]
    blocks = [
        Block(containers.NO_HASH, (1 << len(group)) - 1, b"".join(data[index] for index in group)) for group in groups
    ]
    for pieces in containers.place(blocks):
        if not containers.worth(pieces):
            continue
        container_id = txn.store_container(pieces)
        for number, piece in enumerate(pieces):
            for slot in containers.slots_of(0, piece.pages):
                index = groups[piece.block][slot]
                moved[index] = schema.ref(schema.PACKED, container_id, number << BLOCK_SHIFT | slot)
    names: dict[int, list[tuple[int, int]]] = {}
    moves: list[Move] = []
    for old, new in zip(refs.tolist(), moved.tolist(), strict=True):
        if new:
            object_id = schema.object_of(old)
            if object_id not in names:
                key = schema.KEY.pack(object_id)
                names[object_id] = schema.open_name(key, txn.fetch(schema.NAME, key) or b"")
            moves.append((*names[object_id][schema.slot_of(old)], old, new))
    rewrite(txn, moves)
    # Heads are among those whose entries changed.
    txn.chilled.update({page >> LEAF_SHIFT for _, page, _, _ in moves})
    return moved
