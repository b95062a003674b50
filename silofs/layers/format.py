"""Which version of the format a store has, and how an older one becomes this one.

An upgrade is one LMDB transaction, which makes the tables that came later and names the new version: a crash leaves a
store of the old version, which is upgraded at the next opening, or one of the new. No record is rewritten, because
fields are only ever appended, with defaults. Who only looks at a store (the child of a check) is given one that was
opened before, and so upgraded.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import lmdb
import msgspec

from silofs import failpoints
from silofs.errors import BadFormat, Damaged, StoreError, StoreFull
from silofs.layers import catalog, schema
from silofs.layers.catalog import Record, State
from silofs.layers.environment import DATA_FILE, Environment

log = logging.getLogger(__name__)

OLDEST: Final = 1
"""The oldest version that is upgraded: every released one."""


class Format(Record, frozen=True, array_like=True):
    """The first record of a store, and the only one that every version can read."""

    version: int
    engine: str
    store: bytes  # uuid


def read_format(data: Path) -> Format:
    """The format record, read without being able to change anything. BadFormat when the version is not known here."""
    try:
        environment = lmdb.Environment(
            str(data), readonly=True, lock=False, max_dbs=1, lib_version=schema.ENGINE_MAJOR, readahead=False
        )
    except lmdb.Error as error:
        raise BadFormat(f"{data / DATA_FILE} cannot be opened: {error}") from error
    try:
        with environment.begin() as txn:
            table = environment.open_db(schema.META.name.encode(), txn=txn, create=False)
            value = txn.get(schema.META_FORMAT, db=table)
    except lmdb.Error as error:
        raise BadFormat(f"{data / DATA_FILE} is not a store of silofs: {error}") from error
    finally:
        environment.close()
    if value is None:
        raise BadFormat(f"{data / DATA_FILE} is not a store of silofs")
    version = msgspec.msgpack.decode(schema.open_record(schema.META, schema.META_FORMAT, value))[0]
    if not OLDEST <= version <= schema.FORMAT_VERSION:
        hint = "use the silofs that made it, or a newer one" if version > schema.FORMAT_VERSION else None
        known = f"this silofs knows {OLDEST} to {schema.FORMAT_VERSION}"
        raise BadFormat(f"the store in {data.parent} has format {version}; {known}", hint=hint)
    return catalog.decode(schema.META, schema.META_FORMAT, value, Format)


def upgrade(data: Path, found: Format) -> None:
    """Make a store of an older version one of this version. Damaged, and nothing is changed, when its state is not

    the one last written: what comes after would look as if it were. StoreFull.
    """
    environment = Environment(data, version=found.version)
    try:
        with environment.begin(write=True) as txn:
            meta = environment.tables[schema.META]
            value = txn.get(schema.META_STATE, db=meta)
            state = catalog.decode(schema.META, schema.META_STATE, value or b"", State)
            if state.txn != txn.id() - 1:
                raise Damaged(f"the store's state is of transaction {state.txn}, the file of {txn.id() - 1}")
            for table in schema.TABLES:
                if table.since > found.version:
                    environment.add_table(table, txn)
            failpoints.hit("upgrade.tables")
            for key, record in (
                (schema.META_FORMAT, msgspec.structs.replace(found, version=schema.FORMAT_VERSION)),
                (schema.META_STATE, msgspec.structs.replace(state, txn=txn.id())),
            ):
                txn.put(key, catalog.encode(schema.META, key, record), db=meta)
            failpoints.hit("upgrade.before_commit")
        failpoints.hit("upgrade.after_commit")
    except lmdb.DiskError as error:
        raise StoreFull(f"no room to upgrade the store in {data.parent}: {error}") from error
    except lmdb.Error as error:
        raise StoreError(f"the store in {data.parent} cannot be upgraded: {error}") from error
    finally:
        environment.close()
    log.info("the store in %s had format %d and has %d now", data.parent, found.version, schema.FORMAT_VERSION)
