"""Places of the store that the medium cannot give: looked at no more, so that a daemon dies of each only once.

A read of the map that the medium does not answer is a SIGBUS. The daemon that dies of it has noted what it was looking
at (notes.py); its successor reads that with plain reads (rawtree.py), and what cannot be read goes into the quarantine:
a range of keys of a table, that of one object as a rule. Whoever asks for such a key gets Damaged, EIO at the mount;
all else goes on. A page of the file of cells is needed for the one object that lies there. A page that the list of free
pages needs, or the tree of all tables, leaves nothing that could go on: the store is not opened then, and says why.

`STORE/quarantine.json` has it, beside the store rather than in it: it must be written when the store cannot be.
Whenever it is read every page in it is tried again, and one that can be read is taken out; what it holds is verified by
its checksum, as ever. A page that was freed meanwhile and is written anew goes in the same way.

| killed | left |
|---|---|
| before the file has its name | the quarantine as it was; the next death of the same place teaches the same |
| after | the place is known |
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from silofs.errors import Damaged, StoreBroken
from silofs.layers import schema
from silofs.layers.notes import Left, Notes
from silofs.layers.rawcells import RawCells
from silofs.layers.rawtree import FREE, MAIN, RawTree, Unreadable
from silofs.limits import QUARANTINE_MAX

log = logging.getLogger(__name__)

FILE: Final = "quarantine.json"
_NAMES: Final = {table.number: table.name for table in schema.TABLES}


class Quarantine:
    """What is known of one store. Falsy, as a rule."""

    def __init__(self, places: Iterable[Unreadable] = ()) -> None:
        self._places: dict[str, list[Unreadable]] = {}
        for place in places:
            self._places.setdefault(place.table, []).append(place)

    @classmethod
    def load(cls, store: Path, data_file: Path) -> Quarantine:
        """As the file says, without what can be read again."""
        path = store / FILE
        try:
            raw = json.loads(path.read_text())
            kept = [_place(row) for row in raw]
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, TypeError) as error:
            log.error("%s cannot be read, and what was in it is found anew: %s", path, error)
            return cls()
        with RawTree(data_file) as tree, RawCells(data_file) as cells:
            still = [each for each in kept if (cells if each.in_cells else tree).page(each.page) is None]
        if len(still) < len(kept):
            log.warning("%d pages of %s can be read again", len(kept) - len(still), data_file.parent)
            _save(store, still)
        return cls(still)

    def __len__(self) -> int:
        return sum(map(len, self._places.values()))

    def __iter__(self) -> Iterator[Unreadable]:
        for places in self._places.values():
            yield from places

    def refuse(self, table: schema.Table, key: bytes) -> None:
        """Raises Damaged if a look-up of the key would touch what cannot be read."""
        for place in self._places.get(table.name, ()):
            if place.low <= key and (place.high is None or key < place.high):
                raise Damaged(describe(place))

    def refuse_scan(self, table: schema.Table, *, prefix: bytes = b"", start: bytes = b"", values: bool = True) -> None:
        """The same for all keys that begin with `prefix`, from `start` on; without their `values`."""
        low = max(prefix, start)
        for place in self._places.get(table.name, ()):
            if place.in_cells:
                continue  # who goes through the records goes through LMDB's pages only
            reached = place.high is None or place.high > low
            if reached and place.low[: len(prefix)] <= prefix and (values or not _is_value(place)):
                raise Damaged(describe(place))

    def has_root(self, table: schema.Table) -> bool:
        """Whether the root of the table's tree is among it, so that nothing at all can be asked of the table."""
        return any(not place.low and place.high is None for place in self._places.get(table.name, ()))

    def refuse_all(self) -> None:
        """StoreBroken if nothing can be done with the store."""
        for name in (MAIN, FREE):
            for place in self._places.get(name, ()):
                raise StoreBroken(describe(place), hint="restore the store from a copy; silofs check says what is left")


def describe(place: Unreadable) -> str:
    """One line for people."""
    what = {MAIN: "which leads to all tables", FREE: "which every change needs"}.get(place.table)
    if what is None and _is_value(place):
        what = f"with record {place.low.hex()} of table {place.table}"
    file = "file of cells" if place.in_cells else "data file"
    return f"page {place.page} of the {file}, {what or f'of table {place.table}'}, cannot be read"


def learn(store: Path, data_file: Path, notes: Notes) -> list[str]:
    """What a process died of, by its notes, goes into the quarantine; the places that were not known before, a line

    each.
    """
    known = list(Quarantine.load(store, data_file))
    left = list(notes.left())
    notes.clear()
    while True:
        with RawTree(data_file) as tree, RawCells(data_file) as cells:
            new = _found(tree, cells, left, set(known))
            state = tree.state
        with RawTree(data_file) as tree:
            if tree.state == state:
                break  # else somebody has committed meanwhile, and what was walked may be pages of nothing
    found = sorted(new, key=lambda place: (place.in_cells, place.page))
    if found:
        _save(store, [*known, *found][:QUARANTINE_MAX])
    return [describe(place) for place in found]


def _found(tree: RawTree, cells: RawCells, left: Iterable[Left], known: set[Unreadable]) -> set[Unreadable]:
    """What is not known yet."""
    new = {place for each in left for place in _looked_at(tree, cells, each)} - known
    if not new and any(each.writer for each in left):
        # A change touches more than the way to its key: neighbours that are merged, and the list of free pages.
        names = {FREE, *(_NAMES.get(each.table, MAIN) for each in left if each.writer)}
        new = {place for name in names for place in tree.all_of(name)} - known
    return new


def _looked_at(tree: RawTree, cells: RawCells, left: Left) -> Iterator[Unreadable]:
    name = _NAMES.get(left.table, MAIN)
    if left.scan or name == MAIN:
        yield from tree.all_of(name)
        yield from tree.after(name, left.key)
        if name == MAIN:
            yield from tree.all_of(schema.META.name)
    else:
        yield from tree.on_the_way(name, left.key)
        if name in (schema.OBJECT.name, schema.CELL.name):
            yield from _in_cell(tree, cells, left.key)


def _in_cell(tree: RawTree, cells: RawCells, key: bytes) -> Iterator[Unreadable]:
    """What cannot be read of the cell that an object has, if it has one."""
    try:
        cell = schema.open_cell(key, tree.get(schema.CELL.name, key) or b"")
    except Damaged:
        return
    for page in cells.unreadable(cell):
        yield Unreadable(schema.CELL.name, key, key + b"\0", page, in_cells=True)


def _save(store: Path, places: Iterable[Unreadable]) -> None:
    """Whole or not at all. A disk that takes nothing more is said in the log: then the same is learnt once more."""
    rows = [
        (each.table, each.low.hex(), None if each.high is None else each.high.hex(), each.page, each.in_cells)
        for each in places
    ]
    path, new = store / FILE, store / f"{FILE}.new"
    try:
        if rows:
            with new.open("w") as file:
                json.dump(rows, file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.error("%s cannot be written: %s", path, error)
        new.unlink(missing_ok=True)


def _is_value(place: Unreadable) -> bool:
    """Of one key, whose value has pages of its own."""
    return place.high == place.low + b"\0"


def _place(row: Any) -> Unreadable:
    """Of the file's. ValueError, TypeError. Before there were cells a row did not say in which file the page is."""
    table, low, high, page, *rest = row
    (in_cells,) = rest or (False,)
    return Unreadable(table, bytes.fromhex(low), _key(high), int(page), bool(in_cells))


def _key(text: str | None) -> bytes | None:
    return None if text is None else bytes.fromhex(text)
