"""Replaying a write log, or its journal, into the store. Synchronous, before anything is served.

The log's memfd has everything that was acknowledged, and is replayed while it exists: a daemon died. The journal has
what was synced, and is replayed when the memfd is gone: after a power cut, or when holder and daemon are both dead. The
routine is the same. Only a journal can have been damaged on a disk: then nothing is done (`recover_journal`), but for a
repair, which brings back what can be read and says what it gives up (`salvage_journal`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from silofs import failpoints
from silofs.blocks import PAGE_SHIFT
from silofs.errors import Damaged, StoreError
from silofs.extents import Extents
from silofs.layers import journal
from silofs.layers.catalog import Role
from silofs.layers.commit import CommitResult, grow
from silofs.layers.ending import Ending
from silofs.layers.log import WriteLog
from silofs.layers.pending import Pending
from silofs.layers.records import EXTEND, ZERO, Mark, Record
from silofs.layers.transaction import WriteTxn

if TYPE_CHECKING:
    from silofs.layers.store import Store

log = logging.getLogger(__name__)

SHOWN_MAX: Final = 4  # volumes, or ranges of LSNs, in one line


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

    replay = _Replay(store)
    for record in write_log.replay():
        replay.add(record)
    replay.log_ends()
    found = replay.apply(write_log.ring, name if journal_id or named else None)
    write_log.release(write_log.mark())
    write_log.raise_lsn(floor + 1)
    return found


def recover_journal(store: Store) -> Recovered:
    """Bring the store up to its journal, if it names one, and let it name none. Can be repeated.

    BadFormat or StoreError when the journal cannot be read, Damaged when what was synced is not in it: nothing has
    happened then. One that is missing is taken for removed on purpose.
    """
    with store.reader() as txn:
        state = txn.state
    if not state.journal:
        return Recovered()
    try:
        source = journal.Replay(store.path / journal.DIRECTORY, state.journal, store.uuid, state.mark)
    except FileNotFoundError:
        log.error(
            "the journal of %s is gone: what was synced since the last commit is lost, if anything was", store.path
        )
        store.write(_name_none)
        return Recovered()
    replay = _Replay(store)
    for record in source.records():
        replay.add(record)
    ending = source.ending()
    if ending.damaged:
        replay.go_on(ending)
        raise Damaged(
            f"the journal {source.path} is damaged: {_told(ending, replay.given_up(ending))}",
            hint="restore it from a copy; or silofs check --repair keeps what can be read, and says first what is lost",
        )
    replay.log_ends()
    return replay.apply(source.ring, _name_none)


class GivenUp(NamedTuple):
    """What a volume loses with the records of a journal that cannot be read: it stays as it was at LSN `kept`.

    `lsns` (ranges) are those of its writes that do not come back; if not `certain`, they were durable, but nothing says
    whose they were: this volume's, or another's.
    """

    volume: str
    kept: int
    lsns: list[tuple[int, int]]
    certain: bool

    def __str__(self) -> str:
        if self.certain:
            lsns = f"LSN {self.lsns[0][0]} to {self.lsns[-1][1] - 1}"
            return f"volume '{self.volume}' is as it was at LSN {self.kept}: its later writes, {lsns}, are lost"
        lsns = _lsns(self.lsns)
        return f"volume '{self.volume}' may lack its last writes: {lsns} cannot be read, and may have been its own"


def salvage_journal(store: Store, directory: Path) -> tuple[Path | None, list[GivenUp]]:
    """As `recover_journal`, but bring back what can be read of one that is damaged; its file, and what is given up.

    One that is missing or cannot be read at all stays named: the next to open the store says so.
    """
    with store.reader() as txn:
        state = txn.state
    if not state.journal:
        return None, []
    try:
        source = journal.Replay(directory, state.journal, store.uuid, state.mark)
    except (FileNotFoundError, StoreError) as error:
        log.error("the journal is left as it is: %s", error)
        return None, []
    replay = _Replay(store)
    for record in source.records():
        replay.add(record)
    ending = source.ending()
    if ending.damaged:
        replay.go_on(ending)
    given_up = replay.given_up(ending)
    replay.apply(source.ring, _name_none)
    return source.path, given_up


def _name_none(txn: WriteTxn) -> None:
    txn.count(journal=0, mark=Mark(0, 0, 0))


class _Replay:
    """What the store does not have yet of the records that are added, in their order.

    Records at or below a volume's `applied_lsn` are in the store. A volume's records stop counting at the first whose
    predecessor is not there, or that was written under another epoch: what follows was never acknowledged here, or is
    of no use without what is lost.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._found = Recovered()
        self._pendings: dict[bytes, Pending] = {}
        self._sizes: dict[bytes, int] = {}
        self._stopped: dict[bytes, str] = {}  # and why
        self._gaps: dict[bytes, Extents] = {}  # by volume: LSNs of its own that are not there, and of what follows them
        with store.reader() as txn:
            self._volumes = {volume.uuid: volume for volume in (*txn.volumes(), *txn.orphans())}
            self._owned = {record.uuid: record for record in txn.ownerships()}

    def add(self, record: Record, whole: bool = True) -> None:
        """The next record, or at least its header."""
        uuid, found = record.uuid, self._found
        volume = self._volumes.get(uuid)
        if volume is None or record.lsn <= volume.applied_lsn:
            found.skipped += 1
            return
        pending = self._pendings.setdefault(uuid, Pending(uuid))
        expected = pending.last_lsn or volume.applied_lsn
        owned = self._owned.get(uuid)
        if uuid in self._stopped:
            found.dropped += 1
            if uuid in self._gaps:
                self._gaps[uuid].add(record.lsn, record.lsn + 1)
        elif owned is None or record.epoch != owned.epoch:
            self._stop(record, expected)
        elif record.prev_lsn != expected or not whole:
            self._stop(record, expected)
            gap = self._gaps[uuid] = Extents([(record.lsn, record.lsn + 1)])
            if record.prev_lsn > expected:
                gap.add(record.prev_lsn, record.prev_lsn + 1)
        else:
            _index(pending, record)
            if record.kind == EXTEND:
                self._sizes[uuid] = record.offset + record.length
            found.applied += 1

    def _stop(self, record: Record, expected: int) -> None:
        name = self._volumes[record.uuid].name
        self._stopped[record.uuid] = f"the write log of volume {name} ends at LSN {expected}: {record}"
        self._found.dropped += 1

    def log_ends(self) -> None:
        for why in self._stopped.values():
            log.error("%s", why)

    def go_on(self, ending: Ending) -> None:
        """Behind the damage, each volume's records count on for as long as none of its own is missing."""
        for record, whole in ending.later:
            self.add(record, whole)

    def given_up(self, ending: Ending) -> list[GivenUp]:
        """What volumes lose of what was durable. Those that are known to are first."""
        unknown = ending.missing()
        for record, _ in ending.later:  # whose these are, and those before them, is said there
            unknown.remove(record.lsn, record.lsn + 1)
            unknown.remove(record.prev_lsn, record.prev_lsn + 1)
        hit, doubtful = [], []
        for uuid, volume in self._volumes.items():
            pending, owned = self._pendings.get(uuid), self._owned.get(uuid)
            kept = pending.last_lsn if pending else volume.applied_lsn
            gap = list(self._gaps.get(uuid, ()))
            rest = Extents(unknown)
            rest.remove(0, kept + 1)  # none of those is the volume's: its records say that they follow each other
            if gap and gap[0][0] < ending.durable:
                hit.append(GivenUp(volume.name, kept, gap, True))
            elif rest and not volume.orphan and owned is not None and owned.role == Role.OWNER:
                doubtful.append(GivenUp(volume.name, kept, list(rest), False))
        return [*sorted(hit), *sorted(doubtful)]

    def apply(self, ring: memoryview, then: Callable[[WriteTxn], None] | None) -> Recovered:
        """Bring it into the store, and do `then`, in one transaction."""
        sizes, pendings = self._sizes, self._pendings
        if sizes:
            self._store.write(lambda txn: grow(txn, sizes))
        failpoints.hit("recover.before_commit")
        if then is not None or any(pendings.values()):
            result: CommitResult[None] = self._store.commit(list(pendings.values()), ring, then).result()
            for uuid, damage in result.failed.items():
                log.error("writes to volume %s could not be applied: %s", self._volumes[uuid].name, damage)
        failpoints.hit("recover.after_commit")
        return self._found


def _told(ending: Ending, given_up: list[GivenUp]) -> str:
    """What is wrong with a journal, in a few words however many volumes there are."""
    missing = list(ending.missing())
    if not missing:
        return f"the end of a lap before LSN {ending.lsn} cannot be read, all records can"
    hit = [each.volume for each in given_up if each.certain]
    doubtful = [each.volume for each in given_up if not each.certain]
    whose = [f"{words}{_some(names)}" for words, names in (("of ", hit), ("perhaps of ", doubtful)) if names]
    return ", ".join([f"{_lsns(missing)} was synced and cannot be read", *(whose or ["of no volume that is left"])])


def _lsns(ranges: list[tuple[int, int]]) -> str:
    """LSN 5, 7-9."""
    pieces = [str(first) if end == first + 1 else f"{first}-{end - 1}" for first, end in ranges]
    more = f" and {len(pieces) - SHOWN_MAX} more pieces" if len(pieces) > SHOWN_MAX else ""
    return f"LSN {', '.join(pieces[:SHOWN_MAX])}{more}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_MAX} others" if len(names) > SHOWN_MAX else ""
    return f"{', '.join(repr(name) for name in names[:SHOWN_MAX])}{more}"


def _index(pending: Pending, record: Record) -> None:
    if record.kind == ZERO:
        first = record.offset >> PAGE_SHIFT
        pending.zero(first, first + (record.length >> PAGE_SHIFT), record.lsn)
    else:
        pending.write(record.offset, record.position, record.length, record.lsn)
