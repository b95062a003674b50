"""The part of `check` that looks at cells: each object has one of its own, in the file, and the maps say the same.

A cell that has no object and is in use by the maps is space that is lost. The other way round is worse: the next object
will be written over the one that is there.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from silofs.errors import Damaged
from silofs.layers import catalog, schema
from silofs.layers.catalog import Value
from silofs.layers.check_containers import Report
from silofs.layers.rawcells import RawCells
from silofs.layers.reader import ReadTxn
from silofs.layers.schema import MAP_BYTES, MAP_CELLS, MAP_SHIFT

CODE: Final = "cell"
NAMED: Final = 8  # cells in one message

Numbers = npt.NDArray[np.int64]


class CellChecker:
    """Compares what objects say with the file and with the maps."""

    def __init__(self, txn: ReadTxn, report: Report) -> None:
        self._txn = txn
        self._report = report

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except Damaged as error:
            self._report(CODE, str(error))

    def check(self) -> None:
        """Records of objects against one another, the file and the maps."""
        objects, cells = self._records()
        order = np.argsort(cells, kind="stable")
        objects, cells = objects[order], cells[order]
        again = np.flatnonzero(np.diff(cells) == 0)
        for at in again.tolist():
            self._report(CODE, f"objects {objects[at]} and {objects[at + 1]} are in the same cell, {cells[at]}")
        self._check_file(cells)
        self._check_maps(objects, cells)

    def _records(self) -> tuple[Numbers, Numbers]:
        """(objects, their cells) by the records that are sound."""
        objects, cells = array("q"), array("q")
        for key, value in self._txn.scan(schema.CELL):
            with self._reporting():
                cell = schema.open_cell(key, value)
                if cell >> 62:
                    raise Damaged(f"object {schema.KEY.unpack(key)[0]} is in cell {cell}, which cannot be")
                objects.append(schema.KEY.unpack(key)[0])
                cells.append(cell)
        return np.array(objects, np.int64), np.array(cells, np.int64)

    def _check_file(self, cells: Numbers) -> None:
        with RawCells(self._txn.data_file) as file:
            beyond = len(cells) - int(np.searchsorted(cells, file.cells))
            if beyond:
                what = "is cut short" if file.exists else "is missing"
                self._report(CODE, f"{file.path} {what}: {beyond} objects should be there")

    def _check_maps(self, objects: Numbers, cells: Numbers) -> None:
        """`cells` is sorted."""
        seen = np.zeros(len(cells), np.bool_)
        for key, value in self._txn.scan(schema.CELL_MAP):
            with self._reporting():
                number = schema.KEY.unpack(key)[0]
                if number >> (62 - MAP_SHIFT):
                    raise Damaged(f"map {number} of cells is of cells that cannot be")
                first = number << MAP_SHIFT
                start, end = np.searchsorted(cells, (first, first + MAP_CELLS)).tolist()
                seen[start:end] = True  # also of a map that is damaged: a store with one is not opened
                bitmap = catalog.decode(schema.CELL_MAP, key, value, Value).data
                if len(bitmap) != MAP_BYTES:
                    raise Damaged(f"map {number} of cells has a wrong length")
                bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")
                seen[start:end] = bits[cells[start:end] - first]
                bits[cells[start:end] - first] = 0
                unused = (np.flatnonzero(bits) + first).tolist()
                if unused:
                    self._report(CODE, f"{_list(unused)} in use, and no object is there: their space is lost")
        for at in np.flatnonzero(~seen).tolist():
            self._report(CODE, f"object {objects[at]} is in cell {cells[at]}, which is free: it will be written over")


def _list(cells: list[Any]) -> str:
    named = ", ".join(map(str, cells[:NAMED]))
    more = f" and {len(cells) - NAMED} more" if len(cells) > NAMED else ""
    return f"cells {named}{more} are" if len(cells) > 1 else f"cell {named} is"
