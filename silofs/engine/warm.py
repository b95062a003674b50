"""Pages of the store that can be read without waiting for the disk.

py-lmdb touches every page of a value that it looks up, so an object whose look-up is over is in memory as a whole, and
asking mincore(2) before would need the look-up first (docs/decisions/warm-objects.md). Hence: an object's first look-up
is a thread's; then its view into the map is kept, and reads are a slice and a checksum, without a look-up.

A view may outlive the transaction that it came from, because objects are immutable, their ids are never used again, and
a page that LMDB frees is reused only after a later commit: a view of an object that is gone is never asked for once the
leaves of the commit that removed it are published. A reader that breaks this sees a checksum that does not match, since
checksums are bound to object and slot; it then looks the object up anew.
"""

from __future__ import annotations

from xxhash import xxh3_64_intdigest

from silofs.cache.lru import LRU
from silofs.errors import Damaged, ObjectMissing
from silofs.layers.containers import BLOCK_MASK, BLOCK_PAGES, cut
from silofs.layers.reader import ReadTxn
from silofs.layers.schema import (
    DATA,
    HEADER_BYTES,
    KIND_MASK,
    OBJECT_SHIFT,
    PACKED,
    SLOT_MASK,
    SLOT_SHIFT,
    SUMS,
    SUMS_AT,
    U64,
)
from silofs.limits import WARM_OBJECTS


class Warm:
    """Views of objects (and a mark for lone pages) by object id."""

    __slots__ = ("_bad", "_lately", "_map_bytes", "_mark", "_newest", "_txn", "objects", "young")

    def __init__(self, txn: ReadTxn) -> None:
        self.look_into(txn)
        self.objects: LRU[int, memoryview] = LRU(WARM_OBJECTS)
        self.young = self.objects.young

    def look_into(self, txn: ReadTxn) -> None:
        """`txn` is the loop's snapshot from now on."""
        self._txn = txn
        self._mark = txn.mark_loop()
        self._bad = txn.bad
        self._map_bytes = txn.map_bytes
        self._newest = self._lately = txn.state.next_object

    def renewed(self) -> None:
        """The snapshot was renewed. Views into a map that has grown, and so moved, are void; and a view is not to be
        looked through at what a check has found unreadable."""
        if self._txn.map_bytes != self._map_bytes or self._txn.bad is not self._bad:
            self._map_bytes, self._bad = self._txn.map_bytes, self._txn.bad
            self.objects.clear()

    def page(self, ref: int) -> memoryview | None:
        """A DATA, LONE or PACKED page's bytes, verified; None when a thread should get it."""
        if ref & KIND_MASK == PACKED:
            return self._packed(ref, 1, here=True)
        object_id = ref >> OBJECT_SHIFT
        view = self.young.get(object_id)
        if view is None:
            view = self._view(ref)
            if view is None:
                return None
        if ref & KIND_MASK != DATA:
            return self._lone(ref)
        self._mark[1] = object_id  # its pages may have left the page cache, and be lost to the medium
        slot = ref >> SLOT_SHIFT & SLOT_MASK
        at = HEADER_BYTES + (slot << 12)
        page = view[at : at + 4096]
        # The seed is object id << 8 | slot, which is the reference without its kind.
        if xxh3_64_intdigest(page, ref >> SLOT_SHIFT) == U64.unpack_from(view, SUMS_AT + 8 * slot)[0]:
            return page
        self.objects.drop(object_id)
        return None

    def run(self, ref: int, count: int) -> memoryview | None:
        """The bytes of `count` consecutive slots of an object, each verified; None when a thread should get them."""
        object_id = ref >> OBJECT_SHIFT
        view = self._view(ref)
        if view is None:
            return None
        self._mark[1] = object_id
        slot = ref >> SLOT_SHIFT & SLOT_MASK
        at = start = HEADER_BYTES + (slot << 12)
        seed = ref >> SLOT_SHIFT
        for expected in SUMS[count].unpack_from(view, SUMS_AT + 8 * slot):
            if xxh3_64_intdigest(view[at : at + 4096], seed) != expected:
                self.objects.drop(object_id)
                return None
            at += 4096
            seed += 1
        return view[start:at]

    def packed_run(self, ref: int, count: int) -> memoryview | bytes | None:
        """The bytes of `count` consecutive slots of a container; None when a thread should get them."""
        here = count <= BLOCK_PAGES
        parts: list[memoryview] = []
        while count:
            some = min(count, BLOCK_PAGES - (ref >> SLOT_SHIFT & BLOCK_MASK))
            part = self._packed(ref, some, here=here)
            if part is None:
                return None
            parts.append(part)
            ref += some << SLOT_SHIFT
            count -= some
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _packed(self, ref: int, count: int, *, here: bool) -> memoryview | None:
        """Pages of one block. Unpacking one costs less than a thread would, so that is done `here` if the disk need

        not be waited for; of a long read, which has many, it is a thread's work.
        """
        container_id, slot = ref >> OBJECT_SHIFT, ref >> SLOT_SHIFT & SLOT_MASK
        unpacked = self._txn.unpacked.get(container_id, slot)
        if unpacked is not None:
            return cut(container_id, slot, count, unpacked)
        if not here or not (container_id in self.objects or container_id >= self._lately):
            return None
        try:
            return self._txn.packed(ref, count)
        except (Damaged, ObjectMissing):
            self.objects.drop(container_id)
            return None

    def _view(self, ref: int) -> memoryview | None:
        """The object's view if a look-up need not wait for the disk."""
        object_id = ref >> OBJECT_SHIFT
        view = self.objects.get(object_id)
        if view is None and object_id >= self._lately:
            # Written by this process a moment ago, so it is in the page cache.
            self.touched(ref)
            view = self.objects.get(object_id)
        return view

    def _lone(self, ref: int) -> memoryview | None:
        try:
            return memoryview(self._txn.page(ref))
        except (Damaged, ObjectMissing):
            self.objects.drop(ref >> OBJECT_SHIFT)
            return None

    def touched(self, ref: int) -> None:
        """A thread has just read this page: from now on it may be read inline."""
        object_id = ref >> OBJECT_SHIFT
        if object_id in self.objects:
            return
        if ref & KIND_MASK == DATA:
            try:
                self.objects.put(object_id, self._txn.object(object_id))
            except ObjectMissing:
                pass  # newer than the loop's snapshot: the next read of it comes back here
        else:
            self.objects.put(object_id, memoryview(b""))

    def age(self) -> None:
        """Called now and then: what nobody asked for since the last call is not taken to be in memory any more."""
        self.objects.age()
        self._lately, self._newest = self._newest, self._txn.state.next_object

    def forget(self) -> None:
        """The map is about to go."""
        self.objects.clear()
