"""Reads that must wait: for a thread that touches the disk, for a peer, or for a volume's owner.

What can be answered at once is answered by gather.py. Here, what it misses is brought, and it is asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, TypeVar

import trio

from silofs.blocks import LEAF_PAGES, LEAF_SHIFT
from silofs.cache.flight import Flight, Flights
from silofs.engine.gather import Gatherer, Wanted
from silofs.engine.remote import Fetches
from silofs.engine.threads import Threads
from silofs.engine.volume import KEY_SHIFT, Gate, VolumeState
from silofs.errors import Damaged, FetchTimeout, NoSuchVolume, NotOwner, ObjectMissing, PeerError, StoreBroken
from silofs.layers.pending import Buffer
from silofs.layers.reader import ReadTxn
from silofs.layers.schema import KIND_MASK, STORED, Refs
from silofs.layers.store import Store
from silofs.limits import CEDED_READ_WAIT_S, FETCH_DEADLINE_S

T = TypeVar("T")

LEAF_OF_KEY: Final = (1 << KEY_SHIFT) - 1


class Reads(Gatherer):
    """Reads of any volume or snapshot over cache, store and peers."""

    def __init__(self, store: Store, ring: memoryview, threads: Threads, fetches: Fetches) -> None:
        super().__init__(store.reader(), ring)
        self._store = store
        self._threads = threads
        self.fetches = fetches
        self._resolving: Flights[int, trio.Event] = Flights(trio.Event)
        self._idle: list[ReadTxn] = []
        self._generation = 0  # of the loop's snapshot
        self.waited = 0
        self.jobs = 0
        self.forwarded = 0

    async def read(self, volume: VolumeState, offset: int, length: int) -> Buffer:
        """The bytes of a range, shorter only at the volume's end. Valid until the caller's next await.

        Raises Damaged, FetchTimeout and other PeerErrors, NotOwner, NoSuchVolume.
        """
        self.waited += 1
        wanted = Wanted(offset, length)
        while True:
            if not volume.local:
                answer = await self._elsewhere(volume, offset, length)
                if answer is not None:
                    return answer
                continue
            wanted.clear()
            data = self.gather(volume, offset, length, wanted)
            if data is not None:
                return data
            await self.bring(volume, wanted)

    async def bring(self, volume: VolumeState, wanted: Wanted) -> None:
        """Get what is missing, as far as one step goes: leaves and cold pages first, then pages of peers."""
        if wanted.leaves or wanted.cold:
            await self._load(volume, wanted)
            return
        # A leaf may be older than the arrival of its pages: the store is asked before the peer is.
        stale = {page >> LEAF_SHIFT for _, page in wanted.absent} - wanted.fresh
        if stale:
            wanted.leaves |= stale
            wanted.fresh |= stale
            await self._load(volume, wanted)
            return
        assert wanted.absent, "something is missing"
        wanted.remote.update(await self.fetches.get(volume, wanted.absent))

    async def _load(self, volume: VolumeState, wanted: Wanted) -> None:
        """Resolve leaves and read cold pages in a thread, in one transaction."""
        mine: dict[int, Flight[trio.Event]] = {}
        theirs: list[Flight[trio.Event]] = []
        for number in wanted.leaves:
            flight, leads = self._resolving.join(volume.key | number)
            if leads:
                mine[number] = flight
            else:
                theirs.append(flight)
        if mine or wanted.cold:
            key = volume.key
            try:
                job = _Job(volume.head, list(mine), wanted)
                await self._run(job.run, fresh=not wanted.fresh.isdisjoint(mine))
                # From here to the landing nothing awaits: a leaf that a commit overtook is stale, and is not kept.
                for number, leaf in job.resolved.items():
                    if not mine[number].stale:
                        self.leaves.put(key | number, leaf)
                wanted.got.update(job.got)
                for ref in job.got:
                    self.warm.touched(ref)
                for page in job.missing:
                    # The leaf is older than the store: what it names has gone. Once more, in one fresh transaction.
                    self.leaves.drop(key | page >> LEAF_SHIFT)
                    wanted.fresh.add(page >> LEAF_SHIFT)
                    wanted.gone.add(page)
            finally:
                for number, flight in mine.items():
                    self._resolving.land(key | number, flight)
                    flight.waiter.set()
        for flight in theirs:
            await flight.waiter.wait()

    async def ask(self, question: Callable[[ReadTxn], T]) -> T:
        """What a question to the store is answered, in a thread, by a snapshot that is no older than the loop's."""
        answers: list[T] = []
        await self._run(lambda txn: answers.append(question(txn)), fresh=False)
        return answers[0]

    async def _run(self, job: Callable[[ReadTxn], None], *, fresh: bool) -> None:
        self.jobs += 1
        generation = self._generation
        reader = self._idle.pop() if self._idle and not fresh else None

        def run() -> ReadTxn:
            txn = reader or self._store.reader()
            try:
                job(txn)
            except BaseException:
                txn.close()
                raise
            return txn

        try:
            txn = await self._threads.run(run)
        except BaseException:
            if reader is not None:
                reader.close()
            raise
        # Readers are kept only while they show what the loop's snapshot shows, so that none pins freed space.
        if generation == self._generation and not fresh:
            self._idle.append(txn)
        else:
            txn.close()

    async def _elsewhere(self, volume: VolumeState, offset: int, length: int) -> bytes | None:
        """A read answered by the owner. None when the volume's gate changed meanwhile: the answer may be old."""
        length = min(length, volume.size - offset)
        if length <= 0:
            return b""
        moves = volume.gate_changes
        if volume.gate is Gate.GONE:
            raise NoSuchVolume(f"{volume.name} was deleted")
        self.forwarded += 1
        if volume.gate is Gate.INCOMING:
            with trio.move_on_after(FETCH_DEADLINE_S):
                try:
                    data = await self.fetches.remote.forward_read(volume, offset, length)
                except PeerError:
                    if volume.gate_changes == moves:
                        raise
                    return None  # the migration was over first: the new role answers
                return data if volume.gate_changes == moves else None
            raise FetchTimeout(f"the owner of {volume.name} did not answer a read in time")
        with trio.move_on_after(CEDED_READ_WAIT_S):
            while not volume.owner_known:
                await volume.moved.wait()
                if volume.gate_changes != moves:
                    return None
            try:
                data = await self.fetches.remote.forward_read(volume, offset, length)
            except PeerError as error:
                raise NotOwner(f"{volume.name} has moved, and its owner does not answer: {error}") from error
            return data if volume.gate_changes == moves else None
        raise NotOwner(f"{volume.name} has moved, and its new owner does not answer")

    # What commits change

    def publish(self, volume: VolumeState, leaves: dict[int, Refs]) -> None:
        """These leaves are so in the store from now on. No await between this and `renew`."""
        put, spoil, busy = self.leaves.put, self._resolving.spoil, bool(self._resolving)
        for number, leaf in leaves.items():
            put(volume.key | number, leaf)
            if busy:
                spoil(volume.key | number)

    def replace(self, volume: VolumeState, number: int, leaf: Refs | None) -> None:
        """A leaf refers to other places from now on; None: to such as are to be looked up. No await before `renew`."""
        key = volume.key | number
        if leaf is None or key not in self.leaves:
            self.leaves.drop(key)
        else:
            self.leaves.put(key, leaf)
        self._resolving.spoil(key)

    def renew(self) -> None:
        """Let the loop's snapshot show the newest commit."""
        self.txn.renew()
        self.warm.renewed()
        self._generation += 1
        for reader in self._idle:
            reader.close()
        self._idle.clear()

    def forget_leaves(self, volume: VolumeState, first: int, end: int) -> None:
        """The leaves [first, end) may be different now."""
        start, stop = volume.key + first, volume.key + end
        if end - first < 64:
            for key in range(start, stop):
                self.leaves.drop(key)
        else:
            self.leaves.drop_range(start, stop)
        # Only those: a reader of another leaf must not have to begin again at every arrival of a page.
        for key in self._resolving:
            if start <= key < stop:
                self._resolving.spoil(key)

    def forget_everywhere(self, numbers: Iterable[int]) -> None:
        """These leaves may be different now, in whatever volume."""
        wanted = frozenset(numbers)
        if wanted:
            for key in self.leaves:
                if key & LEAF_OF_KEY in wanted:
                    self.leaves.drop(key)
            for key in self._resolving:
                if key & LEAF_OF_KEY in wanted:
                    self._resolving.spoil(key)

    def forget(self, volume: VolumeState) -> None:
        self.forget_leaves(volume, 0, 1 << KEY_SHIFT)

    def reopen(self) -> bool:
        """Let the store open its file anew, after LMDB failed. False: others are reading, so not now.

        Raises StoreBroken when it cannot be opened any more; then nothing stored can be read.
        """
        self.close()
        self.leaves.clear()
        self._resolving.spoil_all()
        self._generation += 1
        done = True
        try:
            self._store.reopen()
        except StoreBroken as error:
            try:
                self.txn = self._store.reader()
            except Exception:
                raise error from None
            done = False
        else:
            self.txn = self._store.reader()
        self.warm.look_into(self.txn)
        return done

    def age(self) -> None:
        self.warm.age()

    def close(self) -> None:
        self.warm.forget()
        for reader in (*self._idle, self.txn):
            reader.close()
        self._idle.clear()

    def statistics(self) -> dict[str, object]:
        return {
            "waited": self.waited,
            "jobs": self.jobs,
            "forwarded": self.forwarded,
            "leaves": self.leaves.statistics(),
            "resolving": self._resolving.statistics(),
            "warm": self.warm.objects.statistics(),
            "threads": self._threads.statistics(),
            "fetches": self.fetches.statistics(),
        }


class _Job:
    """What a thread does for one read: all of it in one transaction."""

    def __init__(self, head: int, leaves: list[int], wanted: Wanted) -> None:
        self._head = head
        self._leaves = leaves
        self._wanted = wanted
        self.resolved: dict[int, Refs] = {}
        self.got: dict[int, bytes] = {}
        self.missing: list[int] = []

    def run(self, txn: ReadTxn) -> None:
        wanted = self._wanted
        for page, ref in wanted.cold:
            try:
                self.got[ref] = bytes(txn.page(ref))
            except ObjectMissing:
                self.missing.append(page)
        for number in self._leaves:
            leaf = self.resolved[number] = txn.resolve(self._head, number)
            base = number << LEAF_SHIFT
            for page in range(max(base, wanted.first), min(base + LEAF_PAGES, wanted.end)):
                ref = leaf.item(page - base)
                if ref & KIND_MASK in STORED:
                    self._guess(txn, page, ref)

    def _guess(self, txn: ReadTxn, page: int, ref: int) -> None:
        """A page that is most likely wanted; it is asked for by name later if it is and cannot be had now."""
        try:
            self.got[ref] = bytes(txn.page(ref))
        except ObjectMissing as error:
            if page in self._wanted.gone:
                raise Damaged(f"page {page}: {error}") from error
        except Damaged:
            pass
