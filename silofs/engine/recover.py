"""Replaying the write log of a daemon that died into the store. Synchronous, before anything is served."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from silofs import failpoints
from silofs.blocks import PAGE_SHIFT
from silofs.engine.commits import grow
from silofs.layers.commit import CommitResult
from silofs.layers.log import WriteLog
from silofs.layers.pending import Pending
from silofs.layers.records import EXTEND, ZERO, Record
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


def recover(store: Store, write_log: WriteLog) -> Recovered:
    """Bring the store up to the log, and empty the log. Can be repeated: killed at any point, it starts over.

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
        floor = txn.last_lsn
    for record in write_log.replay():
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
    if any(pendings.values()):
        result: CommitResult[None] = store.commit(list(pendings.values()), write_log.ring, None).result()
        for uuid, damage in result.failed.items():
            log.error("writes to volume %s could not be applied: %s", volumes[uuid].name, damage)
    failpoints.hit("recover.after_commit")
    write_log.release(write_log.mark())
    write_log.raise_lsn(floor + 1)
    return found


def _index(pending: Pending, record: Record) -> None:
    if record.kind == ZERO:
        first = record.offset >> PAGE_SHIFT
        pending.zero(first, first + (record.length >> PAGE_SHIFT), record.lsn)
    else:
        pending.write(record.offset, record.position, record.length, record.lsn)
