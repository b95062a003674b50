"""What a write transaction does to cells: takes some for new objects, and gives up those of objects that are gone.

The maps of cells are catalog records, so that a lost or an older one is seen when the store is opened: a cell that only
seems to be free would be written to.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import lmdb

from silofs import failpoints
from silofs.errors import Damaged
from silofs.layers import schema
from silofs.layers.ahead import Ahead
from silofs.layers.catalog import Value
from silofs.layers.catalog_reader import CatalogReader
from silofs.layers.cell_map import CellMap, changed_map
from silofs.layers.cells import CellsFailed, check_cells
from silofs.layers.environment import Environment
from silofs.layers.native import Source
from silofs.layers.puts import Puts
from silofs.layers.schema import MAP_BYTES, MAP_SHIFT, OBJECT_PAGES, Table
from silofs.limits import CELL_OBJECTS_MIN

log = logging.getLogger(__name__)


class CellChanges(Puts):
    """Stores objects in cells and removes them. What became of the cells is the writer's to say, at the end."""

    def __init__(self, environment: Environment, txn: lmdb.Transaction[memoryview]) -> None:
        super().__init__(environment, txn)
        self.cells_taken: list[int] = []
        self.cells_unused: list[int] = []  # written ahead for nothing
        self.adopted: list[Ahead] = []
        self._cells_mark = 0
        self.cells_given_up: list[int] = []

    def _put_in_cells(self, first_id: int, source: Source) -> int:
        """Store objects in cells, 31 pages to each, and which cells they have; for how many there was room.

        CellsFailed. Few are better off in LMDB: they cost it less than another fdatasync does.
        """
        count = -(-len(source.at) // OBJECT_PAGES)
        if count < CELL_OBJECTS_MIN:
            return 0
        with self._environment.ahead.lock:
            cells = self._environment.take_cells(count)
        if cells:
            self.cells_taken += cells
            some = Source(source.base, source.at[: len(cells) * OBJECT_PAGES])
            self._cells_mark = self._environment.cells.write(first_id, some, cells)
            self._environment.cells.begin_sync(self._cells_mark)  # it has the time until the end of the transaction
            keys = [schema.KEY.pack(object_id) for object_id in range(first_id, first_id + len(cells))]
            records = [(key, schema.cell_record(key, cell)) for key, cell in zip(keys, cells, strict=True)]
            self._append(schema.CELL, records)
        return len(cells)

    def _adopt_cells(self, ahead: Ahead, wanted: list[bool]) -> None:
        """Refer to objects that were written ahead, those that are wanted."""
        records = []
        for object_id, (cell, some) in enumerate(zip(ahead.cells, wanted, strict=True), ahead.first_id):
            if some:
                key = schema.KEY.pack(object_id)
                records.append((key, schema.cell_record(key, cell)))
            else:
                self.cells_unused.append(cell)
        self._store(schema.CELL, records, ahead.first_id)
        self.adopted.append(ahead)
        self._cells_mark = max(self._cells_mark, ahead.mark)

    def _store(self, table: Table, records: Sequence[tuple[bytes, bytes]], first_id: int) -> None:
        """Store records of objects whose ids ascend from `first_id`, and which others may have been given out after."""
        if first_id >= self._counters.next_object:
            self._append(table, records)
        else:
            for key, value in records:
                self._put(table, key, value)

    def _remove_object(self, key: bytes) -> bool:
        """Remove an object, wherever it is; False when there is none. Damaged."""
        value = self.fetch(schema.CELL, key)
        if value is None:
            return self._delete(schema.OBJECT, key)
        cell = schema.open_cell(key, value)
        self.cells_given_up.append(cell)
        return self._delete(schema.CELL, key)

    def settle_cells(self) -> None:
        """Bring the maps of cells up to date. CellsFailed when one cannot be read that new cells are in."""
        unused = set(self.cells_unused)
        adopted = [cell for ahead in self.adopted for cell in ahead.cells if cell not in unused]
        taken, given_up = _by_map(self.cells_taken + adopted), _by_map(self.cells_given_up)
        for number in sorted(taken.keys() | given_up.keys()):
            key = schema.KEY.pack(number)
            some = list(dict.fromkeys(given_up.get(number, [])))
            try:
                record = self._get(schema.CELL_MAP, key, Value)
            except Damaged as error:
                log.error("%s; its cells keep what is in them", error)
                if number in taken:
                    with self._environment.ahead.lock:
                        self._environment.free_cells = None
                    raise CellsFailed(str(error)) from error
                wrong = some
            else:
                bitmap = record.data if record is not None else bytes(MAP_BYTES)
                bitmap, wrong = changed_map(bitmap, number << MAP_SHIFT, taken.get(number, []), some)
                if wrong:
                    log.error("cells %s were given up that nothing had", wrong[:8])
                self.put_record(schema.CELL_MAP, key, Value(bitmap))
            if wrong:
                self.cells_given_up = [cell for cell in self.cells_given_up if cell not in set(wrong)]
        self.cells_given_up = list(dict.fromkeys(self.cells_given_up))  # damage may have given one to two objects
        if self._cells_mark:
            failpoints.hit("cells.written")
            self._environment.cells.sync(self._cells_mark)
            failpoints.hit("cells.synced")


def _by_map(cells: Iterable[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for cell in cells:
        found.setdefault(cell >> MAP_SHIFT, []).append(cell)
    return found


def free_cells(txn: CatalogReader, environment: Environment) -> CellMap:
    """Which cells are free. BadFormat when the file has not all that are in use; Damaged when that is not known."""
    maps = {schema.KEY.unpack(key)[0]: value.data for key, value in txn._scan_records(schema.CELL_MAP, Value)}
    expected = txn.state.rows.get(schema.CELL_MAP.name, 0)
    if len(maps) != expected or any(len(each) != MAP_BYTES for each in maps.values()):
        raise Damaged("the maps of cells are not those that were last written")
    highest = [(number << MAP_SHIFT) + int.from_bytes(each, "little").bit_length() for number, each in maps.items()]
    check_cells(environment.path, max(highest, default=0))
    environment.cells.round_up(max(maps, default=-1) + 1)
    found = CellMap(environment.cells.cells, maps)
    if environment.oldest_reader() < txn.txn_id:
        found.withhold(txn.txn_id)  # a check that an earlier daemon began, and that has outlived it
    return found
