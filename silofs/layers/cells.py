"""The file of cells beside LMDB's: 128 KiB each, an object to a cell. Mapped for reading, written with plain writes.

Objects never change and are worth nothing before a transaction refers to them, so their bytes need no transaction: they
are written to cells that nothing refers to, the disk begins with them at once, and what the transaction has to make
durable is small. docs/decisions/sequential-writes.md has the figures, docs/format.md the steps and what crashes leave.

The map is larger than the file, which grows by 1 GiB without blocks: nothing moves while it is open. A cell is looked
at only below the file's end; beyond it lies SIGBUS.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from silofs.blocks import PAGE
from silofs.errors import BadFormat, Damaged
from silofs.layers import schema
from silofs.layers.filesystem import free_bytes, punch, sync_directory
from silofs.layers.native import Source, touch, write_cells
from silofs.layers.schema import CELL_BYTES, CELL_PAD, MAP_CELLS
from silofs.layers.syncer import Syncer
from silofs.limits import CELLS_FLOOR_BYTES, CELLS_RETRY_S

log = logging.getLogger(__name__)

FILE: Final = "cells"

_NO_RESERVE: Final = 0x4000
_FAILED: Final = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class CellsFailed(Exception):
    """Objects could not be written to cells: the transaction is run again, and keeps them in LMDB."""


class CellFile:
    """The file of one store; there is none before the first cell is used. Reading: any thread."""

    def __init__(self, directory: Path, *, map_bytes: int) -> None:
        """`map_bytes`: of address space, and so of the longest file. OSError."""
        self.path = directory / FILE
        self.cells = 0  # that the file has
        self._map_bytes = map_bytes
        self._fd = -1
        self._syncer: Syncer | None = None
        self._address = 0
        self._view = memoryview(b"")
        self._lock = threading.Lock()
        self._again = float("-inf")  # when cells are tried again after a failure
        self.rests = 0  # failures so far
        self._closed = False
        self._look()

    def _look(self) -> None:
        """Open and map the file, or see that it has grown, as its writer in another process makes it."""
        with self._lock:
            if self._closed:
                return
            if self._fd < 0:
                try:
                    self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
                except FileNotFoundError:
                    return
                self._syncer = Syncer(self._fd)
            size = os.fstat(self._fd).st_size
            if not self._address and size:
                self._map(max(self._map_bytes, size))
            self.cells = min(size, self._map_bytes) // CELL_BYTES

    def _map(self, length: int) -> None:
        address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED | _NO_RESERVE, self._fd, 0)
        if address in (None, _FAILED):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(self.path))
        self._address, self._map_bytes = address, length
        self._view = memoryview((ctypes.c_char * length).from_address(address)).cast("B").toreadonly()

    # Reading

    def object(self, cell: int) -> memoryview:
        """The object in a cell, in memory, not verified. Damaged when the file does not reach so far."""
        if cell >= self.cells:
            self._look()
        if cell >= self.cells:
            raise Damaged(f"cell {cell} lies behind the end of {self.path}")
        at = cell * CELL_BYTES + CELL_PAD
        touch(self._address + at, schema.HEADER_BYTES)
        # Nothing behind its last page, which may have no blocks: to read such a place needs memory on a full tmpfs.
        _, _, pages, _ = schema.HEADER.unpack_from(self._view, at)
        touch(self._address + at + schema.HEADER_BYTES, min(pages, schema.OBJECT_PAGES) * PAGE)
        return self._view[at : at + schema.OBJECT_BYTES]

    # Writing

    @property
    def takes(self) -> bool:
        """Whether cells are written to: not for a while after that has failed."""
        return time.monotonic() >= self._again

    def has_room(self, cells: int) -> bool:
        """Whether so many cells can get blocks and leave some to LMDB, which holds space for what is acknowledged."""
        return free_bytes(self.path.parent) >= cells * CELL_BYTES + CELLS_FLOOR_BYTES

    def grow(self) -> int:
        """Make the file longer by a map's worth of cells, without blocks; how many. 0 at the limit. CellsFailed."""
        size = (self.cells + MAP_CELLS) * CELL_BYTES
        if size > self._map_bytes:
            return 0
        try:
            if self._fd < 0:
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
                sync_directory(self.path.parent)
                self._look()
            os.ftruncate(self._fd, size)
            self._look()
        except OSError as error:
            raise self.failed(error) from error
        return MAP_CELLS

    def round_up(self, maps: int) -> None:
        """Let the file end with a whole map of cells, and have so many of them: a copy may end where its blocks do.

        OSError.
        """
        wanted = max(maps, -(-self.cells // MAP_CELLS)) * MAP_CELLS
        if self._fd >= 0 and wanted > self.cells:
            os.ftruncate(self._fd, wanted * CELL_BYTES)
            self._look()

    def write(self, first_id: int, source: Source, cells: Sequence[int]) -> int:
        """Write objects to cells that nothing refers to; a mark for `sync`. CellsFailed. Any thread."""
        assert self._syncer is not None, "there are cells"
        try:
            write_cells(self._fd, first_id, source, cells)
        except OSError as error:
            raise self.failed(error) from error
        return self._syncer.written()

    @property
    def syncing(self) -> bool:
        """Whether the disk is at it."""
        return self._syncer is not None and self._syncer.busy

    def begin_sync(self, mark: int) -> None:
        """Let the disk go about what was written up to the mark."""
        assert self._syncer is not None, "something was written"
        self._syncer.begin(mark)

    def sync(self, mark: int | None = None) -> None:
        """Make what was written (up to the mark) durable. CellsFailed: then nothing may refer to it."""
        assert self._syncer is not None, "something was written"
        try:
            self._syncer.wait(mark)
        except OSError as error:
            raise self.failed(error) from error

    def failed(self, error: OSError) -> CellsFailed:
        """Leave cells alone for a while; what to raise."""
        log.error("%s cannot be written to, and objects go to LMDB for now: %s", self.path, error)
        self.rest()
        return CellsFailed(str(error))

    def rest(self) -> None:
        """Leave cells alone for a while."""
        self.rests += 1
        self._again = time.monotonic() + CELLS_RETRY_S

    def punch(self, first: int, count: int) -> None:
        """Give the blocks of cells back that nothing refers to. OSError."""
        punch(self._fd, first * CELL_BYTES, count * CELL_BYTES)

    @property
    def stored_bytes(self) -> int:
        """Of blocks that the file has."""
        return os.fstat(self._fd).st_blocks * 512 if self._fd >= 0 else 0

    def close(self) -> None:
        """Every view given out is void."""
        if self._syncer is not None:
            self._syncer.close()
        with self._lock:
            self._closed, self.cells = True, 0
            if self._address:
                _libc.munmap(self._address, self._map_bytes)
                self._address = 0
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def check_cells(directory: Path, needed: int) -> None:
    """BadFormat unless the file has so many cells: one that was left behind or cut short is not the store's."""
    path = directory / FILE
    size = path.stat().st_size if path.exists() else 0
    if size < needed * CELL_BYTES:
        hint = "restore it from a copy; silofs check --repair does without"
        raise BadFormat(f"{path} {'is cut short' if path.exists() else 'is missing'}", hint=hint)
