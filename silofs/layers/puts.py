"""Keys and catalog records of a write transaction, with the counts and sums that prove them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lmdb
import msgspec

from silofs.errors import Damaged
from silofs.layers import catalog, schema
from silofs.layers.catalog import Record, State
from silofs.layers.environment import Environment
from silofs.layers.reader import ReadTxn
from silofs.layers.schema import Buffer, Table


class Puts(ReadTxn):
    """A write transaction. Views from it die with its next change: copy what is kept."""

    def __init__(self, environment: Environment, txn: lmdb.Transaction[memoryview]) -> None:
        super().__init__(environment, txn)
        self.keys_changed = 0  # puts and deletes so far
        self.put_bytes = 0  # by puts
        self._counters = self._counters_before = super().state

    def renew(self) -> None:
        raise AssertionError("a write transaction is one function call")

    @property
    def changed(self) -> bool:
        """Whether there is anything to commit."""
        return bool(self.keys_changed) or self._counters is not self._counters_before

    # Keys

    def _put(self, table: Table, key: bytes, value: Buffer, *, append: bool = False) -> None:
        """`append`: behind all others of the table. Damaged when some are higher: LMDB leaves such a record out."""
        self._look_up(table, key)
        self.keys_changed += 1
        self.put_bytes += len(value)
        stored = self._txn.put(key, value, append=append, db=self._environment.tables[table])
        if not stored:
            raise _not_the_end(table)

    def _append(self, table: Table, records: Sequence[tuple[bytes, bytes]]) -> None:
        """Store records whose keys ascend and are higher than all others of the table; Damaged when they are not."""
        if not records:
            return
        self._look_up(table, records[0][0])  # all go to the tree's last page, or to new ones
        self.keys_changed += len(records)
        self.put_bytes += sum(len(value) for _, value in records)
        with self._txn.cursor(db=self._environment.tables[table]) as cursor:
            _, stored = cursor.putmulti(records, append=True)
        if stored != len(records):
            raise _not_the_end(table)

    def _delete(self, table: Table, key: bytes) -> bool:
        self._look_up(table, key)
        self.keys_changed += 1
        return self._txn.delete(key, db=self._environment.tables[table])

    # Catalog records

    @property
    def state(self) -> State:
        return self._counters

    def count(self, **changes: Any) -> None:
        """Change the store's counters."""
        self._counters = msgspec.structs.replace(self._counters, **changes)

    def _rows(self, table: Table, change: int) -> None:
        rows = dict(self._counters.rows)
        rows[table.name] = rows.get(table.name, 0) + change
        self.count(rows=rows)
        self._counted.discard(table.name)

    def take_ids(self, count: int) -> int:
        """The first of so many ids for objects, above all that were given out."""
        first = self._environment.ahead.take_ids(count, self._counters.next_object)
        assert first + count - 1 <= schema.OBJECT_ID_MAX
        self.count(next_object=first + count)
        return first

    def put_record(self, table: Table, key: bytes, record: Record) -> None:
        """Store a catalog record, new or in place of its older self."""
        value = catalog.encode(table, key, record)
        older = self.fetch(table, key)
        change = schema.stored_sum(value)
        if older is None:
            self._rows(table, 1)
        else:
            change ^= schema.stored_sum(older)
        self.count(catalog=self._counters.catalog ^ change)
        self._put(table, key, value)

    def delete_record(self, table: Table, key: bytes) -> bool:
        """Remove a catalog record; False when there was none."""
        older = self.fetch(table, key)
        if older is None:
            return False
        self.count(catalog=self._counters.catalog ^ schema.stored_sum(older))
        self._rows(table, -1)
        return self._delete(table, key)


def _not_the_end(table: Table) -> Damaged:
    return Damaged(f"table {table.name} has records behind the last id that was given out")
