"""Replaying a write log, or its journal, into the store. Synchronous, before anything is served.

The log's memfd has everything that was acknowledged, and is replayed while it exists: a daemon died. The journal has
what was synced, and is replayed when the memfd is gone: after a power cut, or when holder and daemon are both dead. The
routine is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from silofs import failpoints
from silofs.blocks import PAGE_SHIFT
from silofs.layers import journal
from silofs.layers.commit import CommitResult, grow
from silofs.layers.log import WriteLog
from silofs.layers.pending import Pending
from silofs.layers.records import EXTEND, ZERO, Mark, Record
from silofs.layers.transaction import WriteTxn

if TYPE_CHECKING:
    from silofs.layers.store import Store

log = logging.getLogger(__name__)


@dataclass
class Recovered:
    """What a replay found."""

    applied: int = 0  # records
    skipped: int = 0  # in the store already, or of volumes that are gone
    dropped: int = 0  # after a gap, or of another epoch

    def __str__(self) -> str:
        return f"{self.applied} records applied, {self.skipped} skipped, {self.dropped} dropped"


def recover(store: Store, write_log: WriteLog, journal_id: int = 0) -> Recovered:
    """Bring the store up to the log, and empty the log. Can be repeated: killed at any point, it starts over.

    From the commit of it on, the journal named (0: none) has what comes after. It may be one that an earlier daemon
    wrote for this log; whatever it holds by now is in the store then.
    """
    with store.reader() as txn:
        floor, named = txn.last_lsn, txn.state.journal

    def name(txn: WriteTxn) -> None:
        lap, position, lsn = write_log.mark()
        mark = Mark(lap, position, max(lsn, floor + 1)) if journal_id else Mark(0, 0, 0)
        txn.count(journal=journal_id, mark=mark)

    found = _replay(store, write_log.ring, write_log.replay(), name if journal_id or named else None)
    write_log.release(write_log.mark())
    write_log.raise_lsn(floor + 1)
    return found


def recover_journal(store: Store) -> Recovered:
    """Bring the store up to its journal, if it names one, and let it name none. Can be repeated.

    BadFormat or StoreError when the journal cannot be read: nothing has happened then. One that is missing is taken for
    removed on purpose.
    """
    with store.reader() as txn:
        state = txn.state
    if not state.journal:
        return Recovered()
    directory = store.path / journal.DIRECTORY
    try:
        source = journal.Replay(directory, state.journal, store.uuid, state.mark)
    except FileNotFoundError:
        log.error(
            "the journal of %s is gone: what was synced since the last commit is lost, if anything was", store.path
        )
        store.write(_name_none)
        return Recovered()
    return _replay(store, source.ring, source.records(), _name_none)


def _name_none(txn: WriteTxn) -> None:
    txn.count(journal=0, mark=Mark(0, 0, 0))


def _replay(
    store: Store, ring: memoryview, records: Iterable[Record], then: Callable[[WriteTxn], None] | None
) -> Recovered:
    """Apply what the store does not have yet, and `then`, in one transaction.

    Records at or below a volume's `applied_lsn` are in the store. A volume's records stop counting at the first whose
    predecessor is not there, or that was written under another epoch: what follows was never acknowledged here.
    """
    found = Recovered()
    pendings: dict[bytes, Pending] = {}
    sizes: dict[bytes, int] = {}
    stopped: set[bytes] = set()
    with store.reader() as txn:
        volumes = {volume.uuid: volume for volume in (*txn.volumes(), *txn.orphans())}
        epochs = {record.uuid: record.epoch for record in txn.ownerships()}
    for record in records:
        volume = volumes.get(record.uuid)
        if volume is None or record.lsn <= volume.applied_lsn:
            found.skipped += 1
            continue
        pending = pendings.setdefault(record.uuid, Pending(record.uuid))
        expected = pending.last_lsn or volume.applied_lsn
        if record.uuid in stopped or record.prev_lsn != expected or record.epoch != epochs.get(record.uuid):
            if record.uuid not in stopped:
                log.error("the write log of volume %s ends at LSN %d: %s", volume.name, expected, record)
            stopped.add(record.uuid)
            found.dropped += 1
            continue
        _index(pending, record)
        if record.kind == EXTEND:
            sizes[record.uuid] = record.offset + record.length
        found.applied += 1
    if sizes:
        store.write(lambda txn: grow(txn, sizes))
    failpoints.hit("recover.before_commit")
    if then is not None or any(pendings.values()):
        result: CommitResult[None] = store.commit(list(pendings.values()), ring, then).result()
        for uuid, damage in result.failed.items():
            log.error("writes to volume %s could not be applied: %s", volumes[uuid].name, damage)
    failpoints.hit("recover.after_commit")
    return found


def _index(pending: Pending, record: Record) -> None:
    if record.kind == ZERO:
        first = record.offset >> PAGE_SHIFT
        pending.zero(first, first + (record.length >> PAGE_SHIFT), record.lsn)
    else:
        pending.write(record.offset, record.position, record.length, record.lsn)
