"""Pages into a layer of a store, in bulk: imports and streams. Blocks are hashed and compressed in threads.

A block that is in the store already is not compressed; what is there is read back first, since a reference to damage
would be a loss that the source in hand could have made good. The transaction looks it up again: what counts is what is
in the index then.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from types import TracebackType
from typing import Final

import numpy as np

from silofs import limits
from silofs.blocks import PAGE
from silofs.layers import containers
from silofs.layers.containers import BLOCK_PAGES, BLOCK_SHIFT
from silofs.layers.pack import Laid, Packed, prepare
from silofs.layers.schema import Buffer
from silofs.layers.store import Store

BATCH_BYTES: Final = 16 * limits.MIB  # or a little more, in one transaction; three batches are in memory at most
SHARED_BATCH_BYTES: Final = 4 * limits.MIB  # while guests wait for commits of their own
JOB_BLOCKS: Final = 16  # that a thread is given at a time: 1 MiB
BLOCK_BYTES: Final = BLOCK_PAGES * PAGE


class BlockWriter:
    """Takes pages in ascending order and stores them in a received layer; pages of zeros are left out.

    A context: at its end everything is durable; when it is left by an exception, what was under way has ended.
    """

    def __init__(self, store: Store, layer: int, *, batch_bytes: int = BATCH_BYTES) -> None:
        self._store = store
        self._layer = layer
        self._batch_bytes = batch_bytes
        self._pool = ThreadPoolExecutor(min(limits.PACK_THREADS, os.cpu_count() or 1), "silofs-pack")
        self._number = -1  # of the block that is being filled
        self._parts: list[tuple[int, bytes]] = []  # (page in the block, bytes)
        self._blocks: list[tuple[int, int, bytes]] = []  # (first page, mask, pages): the next job
        self._jobs: deque[Future[list[Laid]]] = deque()
        self._prepared: list[Laid] = []
        self._bytes = 0  # given to threads and not to a transaction
        self._under_way: Future[Packed] | None = None
        self.stored = Packed()

    def add(self, first: int, data: Buffer) -> None:
        """Pages from number `first` on; a last one that is not whole is filled up with zeros.

        Raises what storing raises: StoreFull, StoreBroken.
        """
        view = memoryview(data)
        while view:
            number, at = first >> BLOCK_SHIFT, first & (BLOCK_PAGES - 1)
            if number != self._number:
                self._end_block()
                self._number = number
            part = view[: (BLOCK_PAGES - at) * PAGE]
            self._parts.append((at, bytes(part)))
            view = view[len(part) :]
            first += -(-len(part) // PAGE)
        if self._bytes >= self._batch_bytes:
            self._submit()

    def _end_block(self) -> None:
        """The block is complete: leave zeros out, and put it with the others."""
        if not self._parts:
            return
        whole = bytearray(BLOCK_BYTES) if len(self._parts) > 1 or len(self._parts[0][1]) < BLOCK_BYTES else None
        if whole is not None:
            for at, part in self._parts:
                whole[at * PAGE : at * PAGE + len(part)] = part
        plain = self._parts[0][1] if whole is None else whole
        self._parts = []
        some = np.frombuffer(plain, np.uint64).reshape(BLOCK_PAGES, -1).any(axis=1)
        if not some.any():
            return
        pages = int(np.packbits(some, bitorder="little").view("<u2")[0])
        if pages != containers.FULL:
            plain = np.frombuffer(plain, np.uint8).reshape(BLOCK_PAGES, -1)[some].tobytes()
        self._blocks.append((self._number << BLOCK_SHIFT, pages, bytes(plain)))
        self._bytes += len(plain)
        if len(self._blocks) >= JOB_BLOCKS:
            self._hand_out()

    def _hand_out(self) -> None:
        if self._blocks:
            self._jobs.append(self._pool.submit(_prepare, self._store, self._blocks))
            self._blocks = []

    def _submit(self) -> None:
        """Commit what is prepared, once the batch before it has landed."""
        self._hand_out()
        blocks: list[Laid] = []
        while self._jobs:
            blocks += self._jobs.popleft().result()
        if not blocks:
            return
        self._settle()
        nbytes, self._bytes = self._bytes, 0
        self._under_way = self._store.submit(lambda txn: txn.put_blocks(self._layer, blocks), nbytes=nbytes)

    def _settle(self) -> None:
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            done = under_way.result()
            self.stored.found += done.found
            self.stored.packed += done.packed
            self.stored.raw += done.raw

    def flush(self) -> None:
        """Everything that was added is durable; the last block is taken for complete."""
        self._end_block()
        self._number = -1
        self._submit()
        self._settle()

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self._pool.shutdown(cancel_futures=True)
            if self._under_way is not None:
                self._under_way.exception()


def _prepare(store: Store, blocks: list[tuple[int, int, bytes]]) -> list[Laid]:
    """Hash and compress, in a thread."""
    with closing(store.reader()) as reader:
        return [Laid(first, prepare(reader, pages, plain)) for first, pages, plain in blocks]
