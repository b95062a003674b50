"""A store with a plain bytearray as write log: what tests of the store's layers write and read through."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from silofs.blocks import LEAF_PAGES, PAGE, leaves_for
from silofs.layers import schema
from silofs.layers.aged import Pack
from silofs.layers.check import Finding, check
from silofs.layers.clean import Clean
from silofs.layers.merge import MergeLayers
from silofs.layers.pending import Pending
from silofs.layers.policies import drain
from silofs.layers.reader import ReadTxn
from silofs.layers.repack import Repack
from silofs.layers.rewrite import Reap
from silofs.layers.store import CommitResult, Store
from silofs.limits import CELL_OBJECTS_MIN

RING_BYTES = 8 << 20


INLINE_PAGES = (CELL_OBJECTS_MIN - 1) * schema.OBJECT_PAGES
"""In one commit, without a page that is left over: the most that stays in LMDB."""


class Rig:
    """Opens the store of a directory, makes it first when it is new; indexes writes and commits them."""

    def __init__(self, path: Path, *, map_bytes: int | None = None) -> None:
        self.path = path
        self.map_bytes = map_bytes
        if not (path / "data").exists():
            Store.create(path)
        self._over(Store.open(path, map_bytes=map_bytes))

    @classmethod
    def over(cls, store: Store) -> Rig:
        """On a store that is open already."""
        rig = cls.__new__(cls)
        rig.path, rig.map_bytes = store.path, None
        rig._over(store)
        return rig

    def _over(self, store: Store) -> None:
        self.store = store
        self.ring = bytearray(RING_BYTES)
        self.lsn = self.store.write(lambda txn: txn.last_lsn)
        self.at = 0
        self.pendings: dict[bytes, Pending] = {}

    def write(self, uuid: bytes, offset: int, data: bytes) -> None:
        """Append to the ring and index; nothing is in the store before `commit`."""
        if self.at + len(data) > RING_BYTES:
            self.at = 0
            assert not self.pendings, "the tests' ring does not wait for space"
        self.ring[self.at : self.at + len(data)] = data
        self.lsn += 1
        self.pendings.setdefault(uuid, Pending(uuid)).write(offset, self.at, len(data), self.lsn)
        self.at += -(-len(data) // 64) * 64

    def zero(self, uuid: bytes, first_page: int, end_page: int) -> None:
        self.lsn += 1
        self.pendings.setdefault(uuid, Pending(uuid)).zero(first_page, end_page, self.lsn)

    def commit(self, then: Callable[[Any], Any] | None = None) -> CommitResult[Any]:
        pendings, self.pendings, self.at = list(self.pendings.values()), {}, 0
        return self.store.commit(pendings, memoryview(self.ring), then).result()

    def put(self, uuid: bytes, pages: Iterable[int], seed: int = 0) -> None:
        """Write pages of bytes that say which they are, and commit."""
        for page in pages:
            self.write(uuid, page * PAGE, page_bytes(page, seed))
        self.commit()

    def put_inline(self, uuid: bytes, pages: range, seed: int = 0) -> None:
        """The same in commits whose objects stay in LMDB."""
        for first in range(pages.start, pages.stop, INLINE_PAGES):
            self.put(uuid, range(first, min(first + INLINE_PAGES, pages.stop)), seed)

    def read(self, name: str) -> bytes:
        with self.store.reader() as txn:
            volume = txn.volume_by_name(name)
            return read_layer(txn, volume.head, volume.size)

    def findings(self, *, read_data: bool = True) -> list[Finding]:
        with self.store.reader() as txn:
            return check(txn, read_data=read_data)

    def reopen(self) -> None:
        """Close and open; what was not committed is gone, as after a power cut."""
        self.store.close()
        self.__init__(self.path, map_bytes=self.map_bytes)  # type: ignore[misc]

    def close(self) -> None:
        self.store.close()


def hurry(store: Store) -> None:
    """Let every policy of the background work with no patience at all, until none finds anything to do."""
    eager = Clean(store.usage, at=1.0, slack=0, lone_age=0, lone_batch=31)
    drain(store, [Reap(), eager, MergeLayers(), Pack(age_s=0), Repack()])


def object_keys(txn: ReadTxn) -> list[bytes]:
    """Of all objects, wherever they are."""
    return [*txn.scan_keys(schema.OBJECT), *txn.scan_keys(schema.CELL)]


def page_bytes(page: int, seed: int = 0) -> bytes:
    """4096 bytes that no other page has."""
    return random.Random(page << 20 | seed).randbytes(PAGE)


def read_layer(txn: ReadTxn, layer: int, size: int) -> bytes:
    """Everything that a reader of that layer sees."""
    parts: list[Any] = []
    for leaf in range(leaves_for(size)):
        parts += txn.views(txn.resolve(layer, leaf))
    return b"".join(parts)[:size].ljust(size if size % (LEAF_PAGES * PAGE) else 0, b"\0")
