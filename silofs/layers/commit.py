"""Applying what is pending in the write log to the store, in one transaction.

Order matters in one place only: all of it, with each volume's `applied_lsn`, is one LMDB transaction, so a crash
leaves either the state before, and the log still holds everything, or the state after, and replay skips what was
applied. docs/format.md says what each step leaves behind.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import lmdb
import numpy as np

from silofs.blocks import ZERO_PAGE, pages_for
from silofs.errors import Busy, Damaged
from silofs.extents import Extents
from silofs.layers import schema
from silofs.layers.ahead import Numbers
from silofs.layers.catalog import Volume
from silofs.layers.heads import HeadWriter
from silofs.layers.native import Source, zero_pages
from silofs.layers.pending import Patch, Pending
from silofs.layers.schema import Refs
from silofs.layers.transaction import RunAgain, WriteTxn

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Committed:
    """What a commit did to one volume."""

    record: Volume | None = None  # as it now is; None when the transaction's `then` deleted it
    leaves: dict[int, Refs] = field(default_factory=dict)  # changed leaves, resolved; read-only arrays
    stale: Extents = field(default_factory=Extents)  # changed leaves that are not in `leaves`: resolve them again


@dataclass
class CommitResult(Generic[T]):
    """What a commit did."""

    volumes: dict[bytes, Committed]
    failed: dict[bytes, Damaged]  # volumes whose records are damaged; nothing of theirs was applied
    chilled: set[int] = field(default_factory=set)  # leaves that changed below heads, of any volume: resolve them again
    value: T | None = None  # of the caller's own function
    txn_id: int = 0


def apply_all(
    txn: WriteTxn, pendings: Sequence[Pending], ring: memoryview, damaged: dict[bytes, Damaged]
) -> CommitResult[T]:
    """Apply pending writes of any number of volumes, several of one volume in the order given.

    What belongs to a volume in `damaged` is left out. A volume whose records lie in a damaged page of LMDB's trees
    takes the whole transaction with it: it is added to `damaged`, for the next attempt, and RunAgain raised.
    """
    result: CommitResult[T] = CommitResult({}, dict(damaged))
    lsn = txn.last_lsn
    for pending in pendings:
        if not pending or pending.uuid in result.failed:
            continue
        try:
            lsn = max(lsn, _apply_one(txn, pending, ring, result))
        except (Damaged, lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.BadTxnError) as error:
            spoilt = txn.spoilt or Damaged(f"the store's trees are damaged: {error}")
            damaged[pending.uuid] = spoilt
            log.error("nothing can be written to volume %s: %s", pending.uuid.hex(), spoilt)
            raise RunAgain from error
        if txn.spoilt is not None:
            damaged[pending.uuid] = txn.spoilt
            raise RunAgain
    if lsn > txn.last_lsn:
        txn.count(lsn=lsn)
    return result


def _apply_one(txn: WriteTxn, pending: Pending, ring: memoryview, result: CommitResult[T]) -> int:
    """Apply what is pending of one volume; the highest LSN of it that is in the store then."""
    try:
        if not txn.has_volume(pending.uuid):
            return 0  # deleted meanwhile; its writes go with it
        volume = txn.volume(pending.uuid)
        txn.chain(volume.head)
    except Damaged as error:
        if txn.spoilt is not None:
            raise
        log.error("nothing can be written to volume %s: %s", pending.uuid.hex(), error)
        result.failed[pending.uuid] = error
        return 0
    committed = result.volumes.setdefault(pending.uuid, Committed())
    if pending.last_lsn <= volume.applied_lsn:
        # Applied by an earlier attempt whose outcome was not known.
        for leaf in pending.leaves:
            committed.leaves[leaf] = txn.resolve(volume.head, leaf)
        return pending.last_lsn
    writer = HeadWriter(txn, volume)
    _apply(writer, txn, pending, ring)
    writer.finish(applied_lsn=pending.last_lsn)
    committed.leaves.update(writer.resolved)
    for start, end in writer.stale:
        committed.stale.add(start, end)
    return pending.last_lsn


def _apply(writer: HeadWriter, txn: WriteTxn, pending: Pending, ring: memoryview) -> None:
    """One volume's zeroed ranges, then its pages, which lie above them."""
    end_page = pages_for(writer.volume.size)
    writer.zero((first, min(end, end_page)) for first, end in pending.zeros)
    numbers, positions, patches = pending.split()
    _apply_patches(writer, txn, {page: patch for page, patch in patches.items() if page < end_page}, ring)
    inside = np.searchsorted(numbers, end_page)  # a shrunk volume has no pages beyond its size
    numbers, positions = numbers[:inside], positions[:inside]
    if len(numbers):
        refs = _adopt(writer, pending, numbers, positions)
        rest = np.flatnonzero(refs == 0)
        if len(rest):
            source = Source(ring, positions[rest])
            refs[rest] = writer.store(numbers[rest], source, zero_pages(source))
        writer.refer(numbers, refs)


def _adopt(writer: HeadWriter, pending: Pending, numbers: Numbers, positions: Numbers) -> Refs:
    """References to those pages that were written ahead; 0 for the others."""
    refs = np.zeros(len(numbers), np.uint64)
    for future in pending.ahead:
        ahead = future.result()
        if ahead is None:
            continue
        places, newest = ahead.newest(numbers, positions)
        if ahead.usable and newest.any():
            refs[places[newest]] = writer.adopt(ahead, newest)[newest]
        else:
            ahead.give_up()
    return refs


def _apply_patches(writer: HeadWriter, txn: WriteTxn, patches: dict[int, Patch], ring: memoryview) -> None:
    """Pages of which only ranges were written, merged with what they were written on."""
    rendered, lost = {}, []
    for page in sorted(patches):
        whole = _render(writer, txn, page, patches[page], ring)
        if whole is None:
            lost.append(page)
        else:
            rendered[page] = whole
    if lost:
        writer.lose(np.array(lost, np.int64))
    if rendered:
        numbers = np.fromiter(rendered, np.int64, len(rendered))
        zero = np.array([page == ZERO_PAGE for page in rendered.values()], np.bool_)
        writer.write(numbers, Source.of(list(rendered.values())), zero)


def _render(writer: HeadWriter, txn: WriteTxn, page: int, patch: Patch, ring: memoryview) -> bytes | None:
    """A page of which only ranges were written; None when what they were written on is damaged."""
    if patch.complete:
        return patch.render(ring)
    reference = writer.reference(page)
    if schema.kind_of(reference) == schema.REMOTE:
        raise Busy(f"page {page} of volume '{writer.volume.name}' is still remote: it is fetched before it is patched")
    try:
        base = txn.page(reference)
    except Damaged as error:
        log.error("page %d of volume '%s' cannot be merged and is lost: %s", page, writer.volume.name, error)
        return None
    return patch.render(ring, base)


def grow(txn: WriteTxn, sizes: dict[bytes, int]) -> None:
    """Make volumes at least so long: what writes beyond their ends have done to them."""
    for uuid, size in sizes.items():
        if txn.has_volume(uuid) and txn.volume(uuid).size < size:
            txn.resize(uuid, size)
