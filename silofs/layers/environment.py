"""The LMDB environment under a store: made, looked at before it is touched, opened and grown.

The only module that calls lmdb's own `open`. A file that is cut short would kill the process with SIGBUS at the first
read beyond its end, and another engine's file cannot be read at all: both are found with plain reads, first.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from struct import Struct
from typing import Any, Final

import lmdb
from lmdb import verify

from silofs.blocks import PAGE
from silofs.errors import BadFormat, NoStore, StoreBroken, StoreError
from silofs.layers.ahead import WritingAhead
from silofs.layers.cell_map import CellMap
from silofs.layers.cells import FILE as CELLS_FILE
from silofs.layers.cells import CellFile
from silofs.layers.filesystem import on_the_medium
from silofs.layers.held import Held
from silofs.layers.notes import Note, Notes
from silofs.layers.quarantine import Quarantine
from silofs.layers.schema import ENGINE_MAJOR, FORMAT_VERSION, TABLES, Table
from silofs.layers.unpacked import UnpackedBlocks
from silofs.limits import GIB, MAP_BYTES_MAX, MAP_BYTES_START, MAX_READERS, REOPEN_BYTES, UNPACKED_BLOCKS

DATA_FILE: Final = "data.mdb"

_MAGIC: Final = 0xBEEFC0DE
_VERSION: Final = 1  # of the data file, engine 0.9
# Page header 16 bytes, then magic, version, address, map size, two tree records of 48 bytes (the first one's first
# field is the page size), last page, transaction id.
_META: Final = Struct("<16xIIQQI44x48xQQ")


class Environment:
    """One open LMDB environment and its tables: those that a store of that format version has."""

    def __init__(
        self,
        path: Path,
        *,
        create: bool = False,
        map_bytes: int | None = None,
        version: int = FORMAT_VERSION,
        held: Held | None = None,
        notes: Notes | None = None,
    ) -> None:
        """What is in the store's quarantine is not touched. StoreBroken when that is needed for everything."""
        self.path = path
        self.data_file = path / DATA_FILE
        self.held = held or Held(self.data_file)
        self.notes = notes or Notes()
        self.bad: Quarantine | None = None
        self.look_again()
        self.notes.writer.go_through(0)
        self.unpacked = UnpackedBlocks(UNPACKED_BLOCKS)
        self.map_bytes = map_bytes or _map_bytes(path)
        try:
            self.cells = CellFile(path, map_bytes=_map_bytes(path))
        except OSError as error:
            raise StoreError(f"{path / CELLS_FILE} cannot be opened: {error.strerror}") from error
        self.free_cells: CellMap | None = None  # the writer's; without it no cell is written to
        self.ahead = WritingAhead(self)
        try:
            self.lmdb = lmdb.Environment(
                str(path),
                map_size=self.map_bytes,
                create=create,
                max_dbs=len(TABLES) + 4,
                max_readers=MAX_READERS,
                readahead=True,  # docs/decisions/readahead.md
                lib_version=ENGINE_MAJOR,
                mode=0o600,
            )
        except lmdb.Error as error:
            self.cells.close()
            raise StoreError(f"{self.data_file} cannot be opened: {error}") from error
        try:
            self.lmdb.reader_check()
            # Not in a read transaction of ours: the handles would be closed with it.
            self.tables: dict[Table, Any] = {
                table: self.lmdb.open_db(table.name.encode(), create=create)
                for table in TABLES
                if table.since <= version
            }
        except lmdb.Error as error:
            self.close()
            raise BadFormat(f"{self.data_file} is not a whole store: {error}") from error
        self.notes.writer.clear()

    def look_again(self) -> None:
        """Take up what the quarantine has now, and what of it can be read again."""
        found = Quarantine.load(self.path.parent, self.data_file)
        found.refuse_all()
        self.bad = found or None

    def begin(self, *, write: bool = False) -> lmdb.Transaction[memoryview]:
        """A transaction whose values are views. StoreBroken when not even a reader can begin, as after some errors."""
        if write:
            return self.lmdb.begin(write=True, buffers=True)
        try:
            try:
                return self.lmdb.begin(buffers=True)
            except lmdb.ReadersFullError:
                self.lmdb.reader_check()  # processes that died while they read keep their slots until somebody looks
                return self.lmdb.begin(buffers=True)
        except lmdb.Error as error:
            raise StoreBroken(f"the store cannot be read: {error}") from error

    def add_table(self, table: Table, txn: lmdb.Transaction[memoryview]) -> None:
        """Make a table that this store does not have yet, as part of a transaction."""
        self.tables[table] = self.lmdb.open_db(table.name.encode(), txn=txn)

    def unused_bytes(self, txn: lmdb.Transaction[memoryview], note: Note) -> int:
        """Bytes of the file that no table uses: what later transactions can write to before the file grows.

        `note`: the caller's. LMDB looks at the root of every table for this.
        """
        used = 0
        for table, handle in self.tables.items():
            if self.bad is not None and self.bad.has_root(table):
                continue
            note.go_through(table.number)
            pages = txn.stat(handle)
            used += pages["branch_pages"] + pages["leaf_pages"] + pages["overflow_pages"]
        return max(0, self.lmdb.info()["last_pgno"] + 1 - used) * PAGE

    @property
    def used_bytes(self) -> int:
        """Up to where the newest commit uses the file."""
        return int(self.lmdb.info()["last_pgno"] + 1) * PAGE

    def take_cells(self, count: int) -> list[int]:
        """So many free cells, fewer if there are not as many or the file system has no room for them. CellsFailed.

        Who calls it holds the lock of `ahead`.
        """
        file, free = self.cells, self.free_cells
        if free is None or not count or not file.takes:
            return []
        room = file.has_room(count)
        if not room and self.held.holds is False:
            return []  # what is written there anew needs new blocks as well
        if room and free.free < count:
            free.grow(file.grow())
        return free.take(count, hollow=room)

    def oldest_reader(self) -> int:
        """The oldest transaction that any reader of any process sees; a large number when nobody reads."""
        found = re.findall(r"^\s*\d+\s+\S+\s+(\d+)$", self.lmdb.readers(), re.MULTILINE)
        return min(map(int, found), default=1 << 62)

    def newest(self) -> int:
        """The newest transaction that has landed."""
        return int(self.lmdb.info()["last_txnid"])

    def grow(self) -> bool:
        """Double the map. Only while no transaction is open; False at the limit."""
        if self.map_bytes >= MAP_BYTES_MAX:
            return False
        self.map_bytes = min(MAP_BYTES_MAX, 2 * self.map_bytes)
        self.lmdb.set_mapsize(self.map_bytes)
        return True

    def close(self) -> None:
        self.ahead.stop()
        self.lmdb.close()
        self.cells.close()


def _map_bytes(path: Path) -> int:
    """Map size to open with: only address space, so 4 times the file system. Growing later needs all readers gone."""
    status = os.statvfs(path)
    wanted = 4 * status.f_blocks * status.f_frsize
    return max(MAP_BYTES_START, min(MAP_BYTES_MAX, -(-wanted // GIB) * GIB))


def last_page(data_file: Path) -> int:
    """The last page that the newest commit may refer to, read without LMDB. BadFormat when this is no such file.

    The two header pages take turns: even transactions in the first, odd ones in the second, and one is the other's
    successor. LMDB believes the higher number, so one that does not fit would bring back a state of the past.
    """
    pages = []
    with data_file.open("rb") as file:
        for at in (0, PAGE):
            file.seek(at)
            raw = file.read(_META.size)
            if len(raw) < _META.size:
                raise BadFormat(f"{data_file} is cut short")
            magic, version, _, _, page_size, last, txn_id = _META.unpack(raw)
            if magic != _MAGIC or version != _VERSION or page_size != PAGE:
                raise BadFormat(f"{data_file} was not written by this engine (LMDB 0.9, 4 KiB pages)")
            pages.append((txn_id, last))
    (even, _), (odd, _) = pages
    if even & 1 or abs(even - odd) > 1 or (odd and not odd & 1):
        raise BadFormat(f"{data_file} has headers of transactions {even} and {odd}, which do not follow each other")
    return int(max(pages)[1])


def check_file(data_file: Path) -> None:
    """BadFormat or NoStore unless the file is as long as what is in it. Changes nothing but a tail of free pages."""
    if not data_file.exists():
        raise NoStore(f"{data_file} is missing")
    needed = (last_page(data_file) + 1) * PAGE
    if data_file.stat().st_size >= needed:
        return
    # Pages that were allocated and freed in one transaction are never written; at the end of the file they leave it
    # legitimately short. Only a walk of the whole file tells that from a file that was cut.
    try:
        errors: list[str] = verify.verify(str(data_file), subdir=False)  # type: ignore[no-untyped-call]
    except verify.VerifyError as error:
        raise BadFormat(f"{data_file} is cut short: {error}") from error
    if errors:
        raise BadFormat(f"{data_file} is cut short: {data_file.stat().st_size} of {needed} bytes")
    os.truncate(data_file, needed)


def drop_cache(data_file: Path) -> None:
    """Let the next reads come from the disk: after a failed write the page cache shows what never got there.

    A page that somebody else maps stays in the cache; so the two are compared, in a large file its ends. The file of
    cells is not: a commit does not begin before its cells are durable, and one whose cells failed refers to none.
    """
    with data_file.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    end = (last_page(data_file) + 1) * PAGE
    middle = end // 2 // PAGE * PAGE
    if not on_the_medium(data_file, [(0, min(middle, REOPEN_BYTES)), (max(middle, end - REOPEN_BYTES), end)]):
        raise StoreBroken(f"{data_file} is not on the disk as it was written")
