"""The directory of a store: what lies where in it, that there is a store, and who has it.

    STORE/lock        flock, held as long as anyone uses the store; says that this is one
    STORE/data/       the LMDB environment, and beside it the file of cells (silofs/layers/cells.py)
    STORE/journal/    what was synced since the last commit (silofs/layers/journal.py)
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final

import lmdb

from silofs.errors import BadFormat, NoStore, StoreError, StoreLocked
from silofs.layers import catalog, schema
from silofs.layers.catalog import State
from silofs.layers.environment import DATA_FILE, Environment
from silofs.layers.filesystem import refuse_network
from silofs.layers.format import Format

LOCK_FILE: Final = "lock"
DATA_DIRECTORY: Final = "data"
NEW_DIRECTORY: Final = "data.new"
MARK: Final = "silofs store "


def expect(path: Path) -> None:
    """Raises NoStore, BadFormat or Unsupported where there is no store that could be opened."""
    mark, data = path / LOCK_FILE, path / DATA_DIRECTORY
    if not mark.exists() and not data.exists():
        raise NoStore(f"there is no store in {path}")
    if not (data / DATA_FILE).exists():
        if mark.exists() and not mark.stat().st_size and not data.exists():
            raise NoStore(f"there is no store in {path}")
        raise BadFormat(f"{data / DATA_FILE} is missing; the store around it is not", hint="restore it from a copy")
    refuse_network(data)


def take_lock(path: Path) -> int:
    """A descriptor that holds the store's lock."""
    lock_fd = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock_fd)
        raise StoreLocked(f"the store in {path} is in use") from error
    return lock_fd


def make_environment(path: Path, uuid: bytes) -> None:
    """The environment of an empty store."""
    environment = Environment(path, create=True)
    try:
        with environment.begin(write=True) as txn:
            table = environment.tables[schema.META]
            key = schema.META_FORMAT
            found = Format(schema.FORMAT_VERSION, schema.ENGINE, uuid)
            txn.put(key, catalog.encode(schema.META, key, found), db=table)
            key = schema.META_STATE
            txn.put(key, catalog.encode(schema.META, key, State(txn=txn.id())), db=table)
    except lmdb.Error as error:
        raise StoreError(f"the store in {path.parent} cannot be made: {error}", hint="is its disk full?") from error
    finally:
        environment.close()
