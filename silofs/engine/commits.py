"""Commits: what makes acknowledged writes durable, in the background, for fsync, and together with a change.

One commit at a time takes everything that is pending, of all volumes (the cut), and lets new writes go on into fresh
indices. Who wants something durable joins the batch of the next cut, so any number of fsyncs share one.

Steps that rely on having no await between them, and are marked so below:

- the cut: indices are swapped, and the log marked, in one step; else a record could be before the mark and in no index.
- the publication: resolved leaves, then the loop's snapshot, then the index that they replace, then the log's space. A
  read in between would see a page in neither place, or bytes that are being overwritten.

After a failed commit nothing is acknowledged any more. What was cut stays where it is, readable and in the log, and the
same cut is tried again; an fsync waits for that, or reports the error, and none says that data is durable which is not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import TypeVar, cast

import trio

from silofs import failpoints
from silofs.blocks import PAGE_SHIFT
from silofs.engine.claims import Claims
from silofs.engine.cut import Batch, Cut
from silofs.engine.journalling import Entry, Journalling
from silofs.engine.reads import Reads
from silofs.engine.threads import Threads
from silofs.engine.volume import VolumeState, again
from silofs.errors import SiloError, StoreBroken, StoreError
from silofs.layers.commit import CommitResult, grow
from silofs.layers.held import no_room
from silofs.layers.log import WriteLog
from silofs.layers.rewrite import Policy, Stepped
from silofs.layers.store import Store
from silofs.layers.transaction import WriteTxn
from silofs.limits import (
    ADMIT_BYTES,
    AHEAD_BYTES,
    COMMIT_AGE_S,
    COMMIT_AHEAD_BYTES,
    COMMIT_BYTES,
    COMMIT_LEAVES,
    COMMIT_RETRY_S,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

Also = Callable[[WriteTxn], object]


class Commits:
    """Cuts, commits and publishes. `claims`, `waiting` and `kick_at` are what the hot path of writes looks at."""

    def __init__(self, store: Store, write_log: WriteLog, reads: Reads, threads: Threads) -> None:
        self._store = store
        self._log = write_log
        self._reads = reads
        self._threads = threads
        self.claims = Claims(store.held)
        self.waiting = 0  # bytes pending, without those in flight
        self.kick_at = AHEAD_BYTES
        self._ahead = 0  # of what is waiting, in bytes: written ahead
        self._looked = 0  # `waiting` when that was last thought of
        self.failed: SiloError | None = None  # the last commit failed, and no other has succeeded since
        self.refresh: Callable[[Iterable[int]], None] = lambda leaves: None  # set by the engine
        self.replace: Callable[[Stepped], None] = lambda stepped: None  # set by the engine
        self._dirty: list[VolumeState] = []
        self._cut: Cut | None = None  # in flight, or failed and to be tried again
        self._flying: Batch | None = None
        self._next = Batch()
        self._lock = trio.Lock()
        self._dirt = trio.Event()  # something is pending
        self._kicked = trio.Event()  # and should be committed now
        self.journal = Journalling(store, write_log, threads, self.kick)
        self.reopened = False
        self.landed = trio.Event()  # set, and replaced, at every commit
        self.commits = 0
        self.failures = 0
        self.flushes = 0

    # Called by writes

    def grew(self, volume: VolumeState) -> None:
        """A volume has one more record, and is perhaps due."""
        if volume.clean:
            volume.clean = False
            volume.written_ns = time.time_ns()
            self._dirty.append(volume)
            self._dirt.set()
        if self.waiting >= self.kick_at:
            self.kick_at = self.waiting + AHEAD_BYTES
            if not self._store.writes_ahead or self.waiting - self._looked >= COMMIT_BYTES:
                self._write_ahead()
            if self.waiting >= COMMIT_BYTES and (self.waiting >= COMMIT_AHEAD_BYTES or not self._mostly_long()):
                self.kick()
        if volume.pending.leaves_touched >= COMMIT_LEAVES:
            self.kick()

    def _write_ahead(self) -> None:
        """Let the disk begin with long writes, if they are worth it."""
        self._looked = self.waiting
        for volume in self._dirty:
            pending = volume.pending
            if pending.long_pages << PAGE_SHIFT >= AHEAD_BYTES:
                runs = pending.take_long()
                pending.ahead.append(self._store.write_ahead(self._log.ring, runs))
                self._ahead += sum(end - first for first, end, _ in runs) << PAGE_SHIFT

    def _mostly_long(self) -> bool:
        """Whether what waits is written ahead for the most part, or will be."""
        left = sum(volume.pending.long_pages for volume in self._dirty) << PAGE_SHIFT
        return self._ahead + left > self.waiting // 2

    def kick(self) -> None:
        """Commit soon."""
        self._dirt.set()
        self._kicked.set()

    def admit(self, cost: int) -> None:
        """Hold the space of a write before it is acknowledged; StoreFull, or why nothing is admitted now."""
        if self.failed is not None:
            raise again(self.failed)
        if not self.claims.admits(cost):
            raise no_room()

    def admits(self, cost: int) -> bool:
        """`admit` for the hot path."""
        return self.failed is None and self.claims.admits(cost)

    async def make_room(self, cost: int) -> None:
        """Get the space that `admit` did not find: more of the disk, or what pending writes claim and do not need.

        StoreFull when there is none, and what a commit raises.
        """
        if self.failed is not None:
            raise again(self.failed)
        held, threads = self._store.held, self._threads
        if await threads.run(lambda: held.top_up(max(cost, ADMIT_BYTES))):
            return
        if self.unapplied:
            await self.round()
        async with self._lock:
            with trio.CancelScope(shield=True):
                # What a transaction freed is free for others once nobody sees the state before it: that takes another
                # one, and a look at the store as it is then.
                for _ in range(2):
                    await threads.wait(self._store.count_room())
                    self._reads.renew()
        if not await threads.run(lambda: held.top_up(cost)):
            self.admit(cost)

    @property
    def under_way(self) -> bool:
        """Whether a commit has begun and is not published."""
        return self._cut is not None

    @property
    def unapplied(self) -> int:
        """Bytes of writes that are in the log and not in the store."""
        return self.waiting + (self._cut.length if self._cut is not None else 0)

    # Waiting for commits

    async def round(self) -> None:
        """Wait until everything that is pending now has been committed, whoever does it; raise if that fails."""
        batch = self._next
        self.kick()
        await batch.done.wait()
        if batch.error is not None:
            raise again(batch.error)

    async def landing(self) -> None:
        """Wait until the log has more room: for the commit in flight, or else for a round; raise if it fails."""
        batch = self._flying
        if batch is None:
            await self.round()
            return
        await batch.done.wait()
        if batch.error is not None:
            raise again(batch.error)

    def flush_now(self, volume: VolumeState) -> bool:
        """Make the volume durable if that takes a moment only; else False, and `flush` is to be awaited."""
        target, journal = volume.last_lsn, self.journal
        if self.failed is not None or volume.damage is not None:
            return False
        if volume.durable_lsn < target and journal.durable_lsn <= target and journal.takes():
            journal.sync_now(volume.served)
        return volume.durable_lsn >= target or journal.durable_lsn > target

    async def flush(self, volume: VolumeState) -> None:
        """Return when every write to the volume that was acknowledged before the call is durable."""
        self.flushes += 1
        if volume.damage is not None:
            raise again(volume.damage)
        target = volume.last_lsn
        journal = self.journal
        while volume.durable_lsn < target and journal.durable_lsn <= target:
            if self.failed is None and journal.takes():
                await journal.sync()
                continue
            flushing, batch = volume.flushing, self._flying
            if flushing is not None and batch is not None and flushing.last_lsn >= target:
                await batch.done.wait()
                if batch.error is not None:
                    raise again(batch.error)
            else:
                await self.round()
            if volume.damage is not None:
                raise again(volume.damage)

    async def transact(self, fn: Callable[[WriteTxn], T]) -> T:
        """Run `fn` in the transaction that commits everything pending; its value, once durable and published.

        What `fn` raises comes out here; the pending writes are committed all the same.
        """
        async with self._lock:
            # A commit that was begun is finished, however impatient the caller is.
            with trio.CancelScope(shield=True):
                value = await self._commit(fn)
        return cast(T, value)

    @property
    def busy(self) -> bool:
        """Whether a commit runs, failed, is wanted, or will be before a step in between had ended."""
        soon = self._kicked.is_set() or self.waiting >= COMMIT_BYTES // 2
        return soon or self._lock.locked() or self.failed is not None

    async def step(self, policy: Policy) -> Stepped:
        """A step of background work, between commits, and published. Reads see the store before or after it."""
        async with self._lock:
            with trio.CancelScope(shield=True):
                stepped = await self._threads.wait(self._store.step(policy))
                if stepped.changed:
                    failpoints.hit("rewrite.durable")
                    # No await in here: leaves as they now are belong to the snapshot as it now is.
                    self.replace(stepped)
                    self._reads.renew()
                    if stepped.layers:
                        self.refresh(())
        return stepped

    async def resize(self, volume: VolumeState, size: int, also: Also = lambda txn: None) -> None:
        """Change the volume's size. Its mutations wait meanwhile, so none lands on the far side of a shrink; and it
        waits itself, as they do, while the volume is frozen."""
        while True:
            refusal = volume.refusal()
            if refusal is not None:
                raise refusal
            if not volume.frozen:
                break
            await volume.moved.wait()
        volume.freeze()
        try:
            await self.transact(lambda txn: (txn.resize(volume.uuid, size), also(txn)))
        finally:
            volume.thaw()

    # Committing

    async def run(self) -> None:
        """Commit by bytes, age and leaves, and for those who wait; for ever."""
        while True:
            await self._dirt.wait()
            with trio.move_on_after(COMMIT_AGE_S):
                await self._kicked.wait()
            try:
                await self.commit()
            except Exception as error:
                log.error("a commit failed and is tried again: %r", error)
                self._reopen()
                await trio.sleep(COMMIT_RETRY_S)

    async def commit(self) -> None:
        """Commit everything that is pending."""
        async with self._lock:
            with trio.CancelScope(shield=True):
                await self._commit(None)

    async def _commit(self, fn: Callable[[WriteTxn], T] | None) -> T | None:
        """What failed before, once more; then what is pending now, with `fn`. Holds the lock."""
        batch = self._flying = self._begin_batch()
        try:
            if self._cut is not None:
                await self._land(self._cut, None)
            self._cut = self._take()
            try:
                value = await self._land(self._cut, fn)
            except Exception:
                if fn is None or self._cut is None:
                    raise
                # `fn` took the writes down with it. They are not its hostages.
                await self._land(self._cut, None)
                raise
        except Exception as error:
            if self._cut is not None:
                self._fail(error if isinstance(error, SiloError) else StoreError(f"a commit failed: {error!r}"), batch)
            raise
        finally:
            self._flying = None
            if not batch.done.is_set():
                batch.settle()
        return value

    def _fail(self, error: SiloError, batch: Batch) -> None:
        """Nothing is acknowledged from here on, until the cut has landed after all."""
        self.failed = error
        self.failures += 1
        self.claims.give_back()
        self.kick()
        batch.settle(error)

    def _begin_batch(self) -> Batch:
        batch, self._next = self._next, Batch()
        return batch

    def _take(self) -> Cut:
        """The cut. No await in here."""
        if self._ahead:
            self._write_ahead()  # the rest, while the transaction adopts what was
        volumes = [volume for volume in dict.fromkeys(self._dirty) if not volume.clean]
        self._dirty = []
        grown = {volume.uuid: volume.grown for volume in volumes if volume.grown}
        for volume in volumes:
            volume.grown = 0
        cut = Cut(
            self._log.mark(),
            volumes,
            [volume.cut() for volume in volumes],
            self.waiting,
            self.claims.cut(),
            grown,
        )
        self.waiting = 0
        self.kick_at = AHEAD_BYTES
        self._ahead = self._looked = 0
        # Only events that were set are replaced: on the others the background task may be waiting.
        if self._dirt.is_set():
            self._dirt = trio.Event()
        if self._kicked.is_set():
            self._kicked = trio.Event()
        return cut

    async def _land(self, cut: Cut, fn: Callable[[WriteTxn], T] | None) -> T | None:
        """Make a cut durable, then publish it."""
        if cut.grown:
            # The volumes first: a commit leaves out what lies beyond their ends.
            grown = cut.grown
            await self._threads.wait(self._store.submit(lambda txn: grow(txn, grown)))
            cut.grown = {}
            failpoints.hit("commit.grown")
        failpoints.hit("commit.before")
        result: CommitResult[T | None] = CommitResult({}, {})
        entry = self.journal.entry(cut.mark)
        if cut.pendings or fn is not None or entry != self.journal.recorded:
            then = cut.then(entry, fn)
            result = await self._threads.wait(self._store.commit(cut.pendings, self._log.ring, then))
        failpoints.hit("commit.durable")
        self._publish(cut, entry, result, fn is not None)
        failpoints.hit("commit.published")
        return result.value

    def _publish(self, cut: Cut, entry: Entry, result: CommitResult[T | None], changed: bool) -> None:
        """Let everybody see what is durable. No await in here; the order matters."""
        reads = self._reads
        for volume in cut.volumes:
            committed = result.volumes.get(volume.uuid)
            if committed is not None:
                for first, end in committed.stale:
                    reads.forget_leaves(volume, first, end)
                reads.publish(volume, committed.leaves)
                if committed.record is not None:
                    volume.record = committed.record
        reads.renew()
        for volume, pending in zip(cut.volumes, cut.pendings, strict=True):
            damage = result.failed.get(volume.uuid)
            if damage is None:
                volume.durable_lsn = pending.last_lsn
            else:
                volume.damaged(damage)
            volume.landed()
        failpoints.hit("commit.before_release")
        self.journal.landed(entry)
        self._log.release(cut.mark)
        self.claims.landed(cut.claimed)
        self._cut = None
        self.failed = None
        if not self.waiting:
            self.claims.give_back()
        self.commits += 1
        landed, self.landed = self.landed, trio.Event()
        landed.set()
        if changed:
            self.refresh(result.chilled)

    def _reopen(self) -> None:
        """After an error of LMDB's: once. On a second one the store stays read-only until the daemon is restarted."""
        if not self._store.broken or self.reopened:
            return
        try:
            self.reopened = self._reads.reopen()
        except StoreBroken as error:
            self.reopened = True
            log.critical("the store is read-only from here on: %s", error)
        else:
            # What the failed transaction wanted may have been done after all, a cede among it.
            self.refresh(())

    def statistics(self) -> dict[str, object]:
        return {
            "commits": self.commits,
            "failures": self.failures,
            "flushes": self.flushes,
            "waiting_bytes": self.waiting,
            "credit_bytes": self.claims.credit,
            "dirty_volumes": len(self._dirty),
            "failed": str(self.failed) if self.failed else None,
            "journal": self.journal.statistics(),
        }
