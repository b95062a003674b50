"""What can still be read of a store, whatever is wrong with it: sound records, by table, with plain reads.

LMDB is not asked: it ends the process over certain damage, and gives up a whole tree for one page of it. Records that a
damaged page of a tree leads to are not found here either; what proves that they were there tells `repair`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from silofs.errors import BadFormat, Damaged
from silofs.layers import catalog, containers, schema
from silofs.layers.catalog import R
from silofs.layers.rawcells import RawCells
from silofs.layers.rawtree import RawTree
from silofs.layers.schema import Table

log = logging.getLogger(__name__)

_TELLING: Final = (schema.META, schema.VOLUME, schema.LAYER)
"""Without a record of any of these, nothing says that there was a volume, or that there was none."""


class Salvage:
    """One data file, and the file of cells beside it. `damaged` counts what was found and is not sound, by table."""

    def __init__(self, data_file: Path) -> None:
        """BadFormat when nothing leads to any record: what could be made of that would be an empty store."""
        self._cells = RawCells(data_file)
        try:
            self._tree = RawTree(data_file)
        except BaseException:
            self._cells.close()
            raise
        self.newest_known = self._tree.newest_known
        self.damaged: dict[str, int] = {}
        if not self._tree.headers or not any(any(self._tree.records(table.name)) for table in _TELLING):
            self.close()
            raise BadFormat(
                f"nothing of a store can be found in {data_file}: what leads to its records is damaged",
                hint="restore the store from a copy; nothing was changed",
            )

        version = self._version()
        if version > schema.FORMAT_VERSION:
            self.close()
            message = f"the store has format {version}; this silofs knows up to {schema.FORMAT_VERSION}"
            raise BadFormat(message, hint="use the silofs that made it, or a newer one; nothing was changed")

    def _version(self) -> int:
        """Of the format, as far as its record can be read; 0 if it cannot."""
        for key, value in self._tree.records(schema.META.name):
            if key == schema.META_FORMAT:
                try:
                    return int(msgspec.msgpack.decode(schema.open_record(schema.META, key, value))[0])
                except (Damaged, msgspec.MsgspecError):
                    return 0
        return 0

    def close(self) -> None:
        self._tree.close()
        self._cells.close()

    def records(self, table: Table) -> Iterator[tuple[bytes, bytes]]:
        """(key, value) of every record that is what its checksum says, ascending as they are stored.

        Objects in cells come as records of `object`, after those that are some. One whose header is damaged has a new
        one if pages of it are sound, for each of which there is a checksum.
        """
        yield from self._sound(table, self._tree.records(table.name))
        if table is schema.OBJECT:
            yield from self._sound(table, self._objects_in_cells())

    def _objects_in_cells(self) -> Iterator[tuple[bytes, bytes]]:
        """(id, bytes) of every object that a sound record leads to; not of those that the file does not have."""
        missing = 0
        for key, value in self._sound(schema.CELL, self._tree.records(schema.CELL.name)):
            cell = schema.open_cell(key, value)
            if cell * schema.CELL_BYTES < self._cells.size:
                yield key, self._cells.object(cell)
            else:
                missing += 1
        if missing:
            log.warning("%d objects were in cells that %s does not have", missing, self._cells.path)

    def _sound(self, table: Table, records: Iterator[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
        for key, value in records:
            try:
                _verify(table, key, value)
            except Damaged as error:
                log.warning("%s", error)
                self.damaged[table.name] = self.damaged.get(table.name, 0) + 1
                mended = _mended(table, key, value)
                if mended is None:
                    continue
                value = mended
            yield key, value

    def decoded(self, table: Table, kind: type[R]) -> dict[bytes, R]:
        """The records of a catalog table."""
        found: dict[bytes, R] = {}
        for key, value in self.records(table):
            try:
                found[key] = catalog.decode(table, key, value, kind)
            except Damaged as error:
                log.warning("%s", error)
                self.damaged[table.name] = self.damaged.get(table.name, 0) + 1
        return found


def _mended(table: Table, key: bytes, value: bytes) -> bytes | None:
    """What can be made of a damaged record."""
    if table is not schema.OBJECT or len(key) != schema.KEY.size:
        return None
    try:
        return schema.with_sound_header(schema.KEY.unpack(key)[0], value)
    except Damaged:
        return None


def _verify(table: Table, key: bytes, value: bytes) -> None:
    """Damaged unless the record is sound as far as it can be told without others."""
    if table.key_bytes and len(key) != table.key_bytes:
        raise Damaged(f"table {table.name} has keys of another")
    if table is schema.OBJECT:
        schema.check_header(schema.KEY.unpack(key)[0], memoryview(value))
    elif table is schema.CONTAINER:
        containers.check_container(schema.KEY.unpack(key)[0], memoryview(value))
    elif table is schema.PAGES:
        if len(value) != schema.LONE_BYTES:
            raise Damaged(f"lone page {key.hex()} has a wrong length")
    elif table is schema.CELL:
        schema.open_cell(key, value)
    else:
        schema.open_record(table, key, value)
