"""Reads: what is at hand inline, the rest by threads and peers.

`gather` is the heart. It builds the answer from what is in memory at this moment, in one step without an await, and
notes what was missing. The slow path gets what was missing and gathers anew, from the state of *then*; what it got is
kept by reference (references are never reused and what they name is immutable), so that nothing old can slip in under
something new: a commit that landed meanwhile has changed the references.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import trio

from silofs.blocks import LEAF_BYTES, LEAF_MASK, LEAF_PAGES, LEAF_SHIFT, PAGE, PAGE_SHIFT, ZERO_PAGE
from silofs.cache.flight import Flight, Flights
from silofs.cache.lru import LRU
from silofs.engine.remote import Fetches
from silofs.engine.threads import Threads
from silofs.engine.volume import KEY_SHIFT, Gate, VolumeState
from silofs.engine.warm import Warm
from silofs.errors import Damaged, FetchTimeout, NoSuchVolume, NotOwner, ObjectMissing, PeerError
from silofs.layers.pending import ZERO as PENDING_ZERO
from silofs.layers.pending import Buffer, Patch
from silofs.layers.reader import ReadTxn
from silofs.layers.schema import DATA, KIND_MASK, LONE, LOST, OBJECT_SHIFT, SLOT_STEP, ZERO, Refs
from silofs.layers.store import Store
from silofs.limits import CEDED_READ_WAIT_S, FETCH_DEADLINE_S, RESOLVED_LEAVES

ZEROS = memoryview(bytes(LEAF_BYTES))
_REPEAT = np.uint64(0)
_STEP = np.uint64(SLOT_STEP)


class Wanted:
    """What one read has got hold of so far, and what it still misses."""

    __slots__ = ("absent", "cold", "end", "first", "fresh", "gone", "got", "leaves", "remote")

    def __init__(self, offset: int, length: int) -> None:
        self.first = offset >> PAGE_SHIFT
        self.end = (offset + length + PAGE - 1) >> PAGE_SHIFT
        self.got: dict[int, bytes] = {}  # by reference
        self.remote: dict[tuple[int, int], bytes] = {}  # by (layer, page)
        self.leaves: set[int] = set()  # not resolved
        self.cold: list[tuple[int, int]] = []  # (page, reference) to be read by a thread
        self.absent: list[tuple[int, int]] = []  # (layer, page) at a peer
        self.fresh: set[int] = set()  # leaves to be resolved, or resolved, in a transaction begun for this read
        self.gone: set[int] = set()  # pages whose reference named nothing: a second time is damage

    def clear(self) -> None:
        self.leaves.clear()
        self.cold.clear()
        self.absent.clear()


class Reads:
    """Reads of any volume or snapshot over cache, store and peers. `txn` is the loop's snapshot of the store."""

    def __init__(self, store: Store, ring: memoryview, threads: Threads, fetches: Fetches) -> None:
        self._store = store
        self._ring = ring
        self._threads = threads
        self.fetches = fetches
        self.txn: ReadTxn = store.reader()
        self.warm = Warm(self.txn)
        self.leaves: LRU[int, Refs] = LRU(RESOLVED_LEAVES)
        self._young = self.leaves.young
        self._resolving: Flights[int, trio.Event] = Flights(trio.Event)
        self._idle: list[ReadTxn] = []
        self._generation = 0  # of the loop's snapshot
        self.waited = 0
        self.jobs = 0
        self.forwarded = 0

    # The hot path

    def read_now(self, volume: VolumeState, offset: int, length: int) -> Buffer | None:
        """The bytes if all of them are at hand, else None: await `read`. Valid until the caller's next await."""
        if length == PAGE and not offset & (PAGE - 1) and volume.local and offset + PAGE <= volume.size:
            page = offset >> PAGE_SHIFT
            if page not in volume.pending.pages and not volume.overlaid:
                leaf = self._young.get(volume.key | page >> LEAF_SHIFT)
                if leaf is not None:
                    ref = leaf.item(page & LEAF_MASK)
                    if ref & KIND_MASK == DATA:
                        return self.warm.page(ref)
                    if ref <= ZERO:
                        return ZERO_PAGE
            return self._page(volume, page, None)
        if not volume.local:
            return None
        return self.gather(volume, offset, length, None)

    # Gathering: no await in here

    def gather(self, volume: VolumeState, offset: int, length: int, wanted: Wanted | None) -> Buffer | None:
        """The bytes of a range clamped to the volume's end; None when some are missing, and `wanted` is told which."""
        length = min(length, volume.size - offset)
        if length <= 0:
            return b""
        first, end = offset >> PAGE_SHIFT, (offset + length + PAGE - 1) >> PAGE_SHIFT
        parts: list[Buffer] = []
        whole = True
        page = first
        while page < end:
            stop = min(end, (page | LEAF_MASK) + 1)
            if not self._segment(volume, page, stop, parts, wanted):
                if wanted is None:
                    return None
                whole = False
            page = stop
        if not whole:
            return None
        joined = parts[0] if len(parts) == 1 else b"".join(parts)
        if len(joined) == length:
            return joined
        skip = offset - (first << PAGE_SHIFT)
        return memoryview(joined)[skip : skip + length]

    def _segment(self, volume: VolumeState, page: int, stop: int, parts: list[Buffer], wanted: Wanted | None) -> bool:
        """Append the pages [page, stop) of one leaf; False when some are missing."""
        pending = volume.pending.pages
        if not volume.overlaid:
            if not pending:
                return self._stored(volume, page, stop, parts, wanted)
            entries = list(map(pending.get, range(page, stop)))
        else:
            lookup = volume.lookup
            entries = [lookup(each) for each in range(page, stop)]
        whole = True
        at, count = 0, stop - page
        while at < count:
            entry = entries[at]
            end = at + 1
            if entry is None:
                while end < count and entries[end] is None:
                    end += 1
                whole &= self._stored(volume, page + at, page + end, parts, wanted)
            elif isinstance(entry, Patch):
                merged = self._page(volume, page + at, wanted)
                if merged is None:
                    whole = False
                else:
                    parts.append(merged)
            elif entry == PENDING_ZERO:
                while end < count and entries[end] == PENDING_ZERO:
                    end += 1
                parts.append(ZEROS[: (end - at) << PAGE_SHIFT])
            else:
                # A long write lies in one piece in the ring.
                while end < count and entries[end] == entry + ((end - at) << PAGE_SHIFT):
                    end += 1
                parts.append(self._ring[entry : entry + ((end - at) << PAGE_SHIFT)])
            at = end
            if not whole and wanted is None:
                return False
        return whole

    def _stored(self, volume: VolumeState, page: int, stop: int, parts: list[Buffer], wanted: Wanted | None) -> bool:
        """Append pages of one leaf as the store has them; False when some are missing."""
        if stop - page == 1:
            single = self._stored_page(volume, page, wanted)
            if single is None:
                return False
            parts.append(single)
            return True
        leaf = self._leaf(volume, page >> LEAF_SHIFT, wanted)
        if leaf is None:
            return False
        refs = leaf[page & LEAF_MASK : (page & LEAF_MASK) + stop - page]
        if not refs.any():
            parts.append(ZEROS[: (stop - page) << PAGE_SHIFT])
            return True
        whole = True
        # Runs: slots of one object count up, every other kind repeats.
        steps = np.diff(refs)
        starts = [0, *(np.flatnonzero((steps != _STEP) & (steps != _REPEAT)) + 1).tolist(), stop - page]
        for at, end in pairwise(starts):
            ref = refs.item(at)
            if ref <= ZERO:
                parts.append(ZEROS[: (end - at) << PAGE_SHIFT])
                continue
            run = self.warm.run(ref, end - at) if ref & KIND_MASK == DATA else None
            if run is not None:
                parts.append(run)
                continue
            for each in range(at, end):
                single = self._stored_page(volume, page + each, wanted)
                if single is None:
                    if wanted is None:
                        return False
                    whole = False
                else:
                    parts.append(single)
        return whole

    def _leaf(self, volume: VolumeState, number: int, wanted: Wanted | None) -> Refs | None:
        leaf = self.leaves.get(volume.key | number)
        if leaf is None and wanted is not None:
            wanted.leaves.add(number)
        return leaf

    def _page(self, volume: VolumeState, page: int, wanted: Wanted | None) -> Buffer | None:
        """One page with all that is pending over it."""
        return self._over(volume, page, None) or self._over(volume, page, self._stored_page(volume, page, wanted))

    def _over(self, volume: VolumeState, page: int, stored: Buffer | None) -> Buffer | None:
        """`stored` beneath what is being committed beneath what is pending; None when it takes a `stored` to tell."""
        base = stored
        if volume.flushing is not None:
            base = self._apply(volume.flushing.lookup(page), base)
        return self._apply(volume.pending.lookup(page), base)

    def _apply(self, entry: int | Patch | None, base: Buffer | None) -> Buffer | None:
        if entry is None:
            return base
        if isinstance(entry, Patch):
            if base is not None or entry.complete:
                return entry.render(self._ring, base)
            return None
        return ZERO_PAGE if entry == PENDING_ZERO else self._ring[entry : entry + PAGE]

    def _stored_page(self, volume: VolumeState, page: int, wanted: Wanted | None) -> Buffer | None:
        """One page as the store has it."""
        leaf = self._leaf(volume, page >> LEAF_SHIFT, wanted)
        if leaf is None:
            return None
        ref = leaf.item(page & LEAF_MASK)
        kind = ref & KIND_MASK
        if ref <= ZERO:
            return ZERO_PAGE
        if kind in (DATA, LONE):
            data: Buffer | None = self.warm.page(ref)
            if data is None and wanted is not None:
                data = wanted.got.get(ref)
                if data is None:
                    wanted.cold.append((page, ref))
            return data
        if kind == LOST:
            raise Damaged(f"page {page} of {volume.name} was damaged and is lost until it is overwritten")
        if wanted is None:
            return None
        layer_id = ref >> OBJECT_SHIFT
        data = wanted.remote.get((layer_id, page))
        if data is None:
            wanted.absent.append((layer_id, page))
        return data

    def buffered_pages(self, volume: VolumeState) -> int:
        """By how many data pages the store will differ once what is pending is in it, as far as the caches tell."""
        pages = set(volume.pending.pages)
        zeros = [volume.pending.zeros]
        if volume.flushing is not None:
            pages |= {page for page in volume.flushing.pages if volume.pending.lookup(page) != PENDING_ZERO}
            zeros.append(volume.flushing.zeros)
        change = 0
        for page in pages:
            leaf = self.leaves.get(volume.key | page >> LEAF_SHIFT)
            change += leaf is None or leaf.item(page & LEAF_MASK) <= ZERO
        for first, end in (span for ranges in zeros for span in ranges):
            for number in range(
                first >> LEAF_SHIFT, min((end + LEAF_MASK) >> LEAF_SHIFT, (first >> LEAF_SHIFT) + 4096)
            ):
                leaf = self.leaves.get(volume.key | number)
                if leaf is not None:
                    base = number << LEAF_SHIFT
                    held = np.flatnonzero(leaf[max(first - base, 0) : max(end - base, 0)] > ZERO) + max(base, first)
                    change -= sum(page not in pages for page in held.tolist())
        return change

    # The slow path

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

    def page_state(self, volume: VolumeState, page: int, wanted: Wanted) -> bytes | None:
        """For a write of part of a page: the page's bytes if it is still at a peer, and b"" if it is here.

        None when that is not known or the page has not come yet; `wanted` is told.
        """
        if self._over(volume, page, None) is not None:
            return b""
        leaf = self._leaf(volume, page >> LEAF_SHIFT, wanted)
        if leaf is None:
            return None
        ref = leaf.item(page & LEAF_MASK)
        if ref & KIND_MASK <= LONE or ref & KIND_MASK == LOST:
            return b""
        stored = self._stored_page(volume, page, wanted)
        return None if stored is None else bytes(stored)

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
                await self._run(job, fresh=not wanted.fresh.isdisjoint(mine))
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

    async def _run(self, job: _Job, *, fresh: bool) -> None:
        self.jobs += 1
        generation = self._generation
        reader = self._idle.pop() if self._idle and not fresh else None

        def run() -> ReadTxn:
            txn = reader or self._store.reader()
            try:
                job.run(txn)
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
                data = await self.fetches.remote.forward_read(volume, offset, length)
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
        if end - first < 64:
            for number in range(first, end):
                self.leaves.drop(volume.key | number)
        else:
            self.leaves.drop_range(volume.key | first, volume.key | end)
        self._resolving.spoil_all()

    def forget(self, volume: VolumeState) -> None:
        self.forget_leaves(volume, 0, 1 << KEY_SHIFT)

    def reopen(self) -> None:
        """Let the store open its file anew, after LMDB failed. Raises StoreBroken; then nothing stored can be read."""
        self.close()
        self.leaves.clear()
        self._resolving.spoil_all()
        self._generation += 1
        self._store.reopen()
        self.txn = self._store.reader()
        self.warm.look_into(self.txn)

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
                if ref & KIND_MASK in (DATA, LONE):
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
