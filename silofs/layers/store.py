"""A store on disk: made, opened under its lock, read in snapshots, changed by one writer thread. Synchronous."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar
from uuid import uuid4
from weakref import WeakSet

import lmdb

from silofs.errors import Damaged, Exists, SiloError, StoreBroken
from silofs.layers import schema
from silofs.layers.ahead import Ahead, Run
from silofs.layers.catalog_reader import CatalogReader, verify_catalog
from silofs.layers.cell_changes import free_cells
from silofs.layers.commit import CommitResult, Committed, apply_all
from silofs.layers.directory import (
    DATA_DIRECTORY,
    LOCK_FILE,
    MARK,
    NEW_DIRECTORY,
    expect,
    make_environment,
    take_lock,
)
from silofs.layers.environment import DATA_FILE, Environment, check_file, drop_cache
from silofs.layers.filesystem import free_bytes, refuse_network, sync_directory, write_in_place
from silofs.layers.format import read_format, upgrade
from silofs.layers.gate import Gate
from silofs.layers.held import Held, worst_case
from silofs.layers.notes import Notes
from silofs.layers.pending import Pending
from silofs.layers.quarantine import Quarantine, describe, learn
from silofs.layers.reader import ReadTxn
from silofs.layers.replay import recover_journal
from silofs.layers.rewrite import Budget, Policy, Stepped, take
from silofs.layers.schema import CELL_BYTES
from silofs.layers.transaction import WriteTxn
from silofs.layers.usage import Usage
from silofs.layers.writer import Writer

__all__ = ["CommitResult", "Committed", "Store"]

T = TypeVar("T")


class Store:
    """One open store. `submit` and `reader` may be called from any thread."""

    def __init__(self, path: Path, environment: Environment, uuid: bytes, lock_fd: int) -> None:
        self.path = path
        self.uuid = uuid
        self._environment = environment
        self._lock_fd = lock_fd
        self._readers: WeakSet[_Reader] = WeakSet()
        self._gate = Gate()
        self.usage = Usage()
        self._closed = False
        self._start_writer()

    # Making and opening

    @staticmethod
    def create(path: Path) -> None:
        """Make an empty store in a new or empty directory. A failure on the way leaves none.

        Exists, Unsupported (on a network file system), StoreError, OSError.
        """
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        mark, data, new = path / LOCK_FILE, path / DATA_DIRECTORY, path / NEW_DIRECTORY
        if data.exists() or (mark.exists() and mark.stat().st_size):
            raise Exists(f"there is a store in {path} already", hint="name another --store, or use this one")
        refuse_network(path)
        write_in_place(path)
        lock_fd = take_lock(path)
        try:
            if new.exists():
                shutil.rmtree(new)  # of an attempt that was interrupted
            new.mkdir(mode=0o700)
            uuid = uuid4().bytes
            make_environment(new, uuid)
            new.rename(data)
            for directory in (path, path.parent):
                sync_directory(directory)
            os.write(lock_fd, f"{MARK}{uuid.hex()}\n".encode())
            os.fsync(lock_fd)
        finally:
            os.close(lock_fd)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        lock_fd: int | None = None,
        map_bytes: int | None = None,
        verify: bool = True,
        replay: bool = True,
        notes: Notes | None = None,
    ) -> Store:
        """Open a store. `lock_fd`: a description that already holds the lock, to be kept open by its owner.

        NoStore, StoreLocked, BadFormat (unknown version, or a file of it is cut short or gone), Unsupported (on a
        network file system). Nothing is made here, but a store of an older version becomes one of this version.
        Damaged when the catalog is not the one last written; `verify=False` opens it all the same, for `check`.
        StoreBroken when the medium cannot give a page without which nothing can be done.
        The journal is replayed first (BadFormat, StoreError or Damaged when that cannot be; nothing is changed);
        `replay=False` only for who has the write log itself, and replays that, or brings back what can be read.
        `notes`: where to say what is looked at, for a successor.
        """
        data = path / DATA_DIRECTORY
        expect(path)
        own_fd = take_lock(path) if lock_fd is None else -1
        try:
            check_file(data / DATA_FILE)
            Quarantine.load(path, data / DATA_FILE).refuse_all()
            notes = notes or Notes()
            notes.writer.go_through(0)
            found = read_format(data)
            if found.version < schema.FORMAT_VERSION:
                upgrade(data, found)
            environment = Environment(data, map_bytes=map_bytes, notes=notes)
            if verify:
                try:
                    with ReadTxn(environment) as txn:
                        verify_catalog(txn)
                        _know_objects(environment, txn)
                except BaseException:
                    environment.close()  # a map is not to stay as long as the error does
                    raise
        except BaseException:
            if own_fd >= 0:
                os.close(own_fd)
            raise
        store = cls(path, environment, found.store, own_fd)
        if replay and verify:
            try:
                recover_journal(store)
            except BaseException:
                store.close()
                raise
        return store

    @staticmethod
    def lock(path: Path) -> int:
        """A descriptor that holds the store's lock, for `open`. NoStore, BadFormat, Unsupported, StoreLocked."""
        expect(path)
        return take_lock(path)

    def _start_writer(self) -> None:
        self.usage.clear()
        self._writer = Writer(self._environment, self._gate, self.usage)
        self.write(lambda txn: txn.count(opens=txn.state.opens + 1))

    def close(self) -> None:
        """Finish what was submitted; end every reader; let go of the lock. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._writer.stop()
        for reader in list(self._readers):
            reader.close()
        self._environment.close()
        self.held.give_back()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Changing

    def submit(self, function: Callable[[WriteTxn], T], *, nbytes: int = 0) -> Future[T]:
        """Run a function in one durable transaction. It may run again (the map was full): no side effects in it.

        `nbytes`: of pages that it stores, in bulk. Their space is claimed first, on the writer's thread, so that it
        does not use what acknowledged writes hold; StoreFull when there is none.
        """
        if self._closed:
            raise StoreBroken("the store is closed")
        return self._writer.submit(function, cost=worst_case(nbytes) if nbytes else 0)

    def write(self, function: Callable[[WriteTxn], T]) -> T:
        return self.submit(function).result()

    def commit(
        self, pending: Sequence[Pending], ring: memoryview, then: Callable[[WriteTxn], T] | None = None
    ) -> Future[CommitResult[T]]:
        """Apply what is pending, then `then`, in one transaction. `ring` is where the positions point into.

        The future fails as a whole, and then nothing was applied, or (StoreBroken) that is not known: commit the same
        again after `reopen`; what was applied is skipped.
        """

        damaged: dict[bytes, Damaged] = {}

        def run(txn: WriteTxn) -> CommitResult[T]:
            result: CommitResult[T] = apply_all(txn, pending, ring, damaged)
            if then is not None:
                result.value = then(txn)
            for uuid, committed in result.volumes.items():
                committed.record = txn.volume(uuid) if txn.has_volume(uuid) else None
            result.chilled = txn.chilled
            result.txn_id = txn.txn_id
            return result

        return self.submit(run)

    @property
    def writes_ahead(self) -> bool:
        """Whether something is being written ahead, or synced."""
        return self._environment.ahead.busy

    def write_ahead(self, ring: memoryview, runs: list[Run]) -> Future[Ahead | None]:
        """Put whole pages, which lie in `ring`, on their way to the disk before their commit.

        Nothing refers to them until a `commit` of a Pending that has the future in its `ahead`.
        """
        return self._environment.ahead.put(ring, runs)

    def step(self, policy: Policy) -> Future[Stepped]:
        """One step of a policy, in a transaction of its own."""
        return self.submit(lambda txn: take(policy, txn, Budget.times(max(1.0, policy.hurry()))))

    @property
    def held(self) -> Held:
        """The ledger of the space that acknowledged writes will need."""
        return self._environment.held

    def count_room(self) -> Future[None]:
        """Find room inside the file, when `held` cannot allocate behind it: a commit, after which it is looked for."""
        return self.submit(lambda txn: txn.count(opens=txn.state.opens))

    def room(self) -> int:
        """Bytes that writes may still take, less than 0 when the reserve is touched."""
        return self.held.room(self._writer.unused_bytes)

    # Reading

    def reader(self) -> ReadTxn:
        """The store as it is now, until `renew`."""
        reader = _Reader(self._environment, self._gate)
        self._readers.add(reader)
        return reader

    def take_notes(self, notes: Notes) -> None:
        """Say there what is looked at, from now on."""
        self._environment.notes = notes

    @staticmethod
    def learn(path: Path, notes: Notes) -> list[str]:
        """Put into quarantine what a process died of, by its notes; what was not known before, a line each. Before
        `open`."""
        return learn(path, path / DATA_DIRECTORY / DATA_FILE, notes)

    def quarantined(self) -> list[str]:
        """What the medium cannot give, a line each."""
        return [describe(place) for place in self._environment.bad or ()]

    def look_again(self) -> None:
        """Take out of the quarantine what can be read again. May wait for the medium."""
        self._environment.look_again()

    # After an error

    @property
    def broken(self) -> bool:
        """Whether LMDB failed, so that nothing is written until `reopen`."""
        return self._writer.broken is not None

    @property
    def commits(self) -> int:
        """Transactions that have changed something since the store was opened."""
        return self._writer.commits

    def reopen(self) -> None:
        """After an error of LMDB: open the file anew, look at what reached the disk, and commit twice.

        Every reader must be closed before. StoreBroken when it fails again: then the store stays as it is, read-only.
        """
        if self._gate.inside:
            raise StoreBroken("the store cannot be reopened while it is read")
        self._writer.stop()
        self._environment.close()
        try:
            data = self.path / DATA_DIRECTORY
            drop_cache(data / DATA_FILE)
            check_file(data / DATA_FILE)
            read_format(data)
            self._environment = Environment(data, held=self.held, notes=self._environment.notes)
            with ReadTxn(self._environment) as txn:
                verify_catalog(txn)
                _know_objects(self._environment, txn)
            self._start_writer()  # commits once
            self.write(lambda txn: txn.count(opens=txn.state.opens))
        except (lmdb.Error, OSError, SiloError) as error:
            raise StoreBroken(f"the store cannot be reopened: {error}") from error

    def _free_cells_bytes(self) -> int:
        """Blocks of cells that nothing is in; as much as the file has, when no more is known after a start."""
        cells, free = self._environment.cells, self._environment.free_cells
        return 0 if free is None else min(free.solid * CELL_BYTES, cells.stored_bytes)

    def statistics(self) -> dict[str, int]:
        """Figures for status and metrics; bytes, pages and counts."""
        info = self._environment.lmdb.info()
        with self.reader() as txn:
            rows = txn.state.rows
        return {
            "file_bytes": (self._environment.path / DATA_FILE).stat().st_size,
            "used_bytes": (info["last_pgno"] + 1) * 4096,
            "cells_bytes": self._environment.cells.stored_bytes,
            "free_cells_bytes": self._free_cells_bytes(),
            "map_bytes": self._environment.map_bytes,
            "unused_bytes": self._writer.unused_bytes,
            "free_bytes": free_bytes(self._environment.path),
            "commits": self._writer.commits,
            "commit_us": int(self._writer.commit_seconds * 1e6),
            "warm_leaves": len(self._writer.warm),
            "readers": self._gate.inside,
            "volumes": rows.get(schema.VOLUME.name, 0),
            "layers": rows.get(schema.LAYER.name, 0),
            "snapshots": rows.get(schema.SNAPSHOT.name, 0),
            "doomed_layers": rows.get(schema.DOOMED.name, 0),
        }


class _Reader(ReadTxn):
    """A reader that goes through the store's gate."""

    def __init__(self, environment: Environment, gate: Gate) -> None:
        self._gate = gate
        self._open = False
        gate.enter()
        try:
            super().__init__(environment)
        except BaseException:
            gate.leave()
            raise
        self._open = True

    def renew(self) -> None:
        self._txn.abort()
        self._gate.leave()
        self._gate.enter()
        self._begin(self._environment.begin())

    def close(self) -> None:
        if self._open:
            self._open = False
            super().close()
            self._gate.leave()

    def __del__(self) -> None:
        self.close()


def _know_objects(environment: Environment, txn: CatalogReader) -> None:
    """Which cells are free, and from which id on no object has one; with that, cells can be written to."""
    environment.free_cells = free_cells(txn, environment)
    environment.ahead.take_ids(0, txn.state.next_object)
