"""Opening, locking, growing, filling up and breaking: a store that is not right is refused, and left as it is."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

import lmdb
import pytest

from silofs.blocks import PAGE
from silofs.errors import BadFormat, Damaged, Exists, NoStore, StoreBroken, StoreFull, StoreLocked, Unsupported
from silofs.layers import catalog, schema
from silofs.layers.environment import Environment
from silofs.layers.format import Format
from silofs.layers.held import COMMIT_COST
from silofs.layers.store import Store
from silofs.layers.transaction import WriteTxn
from silofs.limits import GIB, MIB, SPACE_FLOOR_BYTES
from tests.storerig import Rig, page_bytes


def contents(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(path.rglob("data.mdb"))}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    rig = Rig(path)
    vm = rig.store.write(lambda txn: txn.create_volume("vm", GIB)).uuid
    rig.put(vm, range(40))
    rig.close()
    return path


def test_create_refuses_what_is_there(made: Path) -> None:
    before = contents(made)
    with pytest.raises(Exists):
        Store.create(made)
    assert contents(made) == before


def test_no_store(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(NoStore):
            Store.open(path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_create_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    (tmp_path / "data.new").mkdir()
    (tmp_path / "data.new" / "data.mdb").write_bytes(b"half")
    with pytest.raises(NoStore):
        Store.open(tmp_path)
    Store.create(tmp_path)
    Store.open(tmp_path).close()


@pytest.mark.parametrize("what", ["data/data.mdb", "data"])
def test_a_missing_data_file_is_not_made_again(made: Path, what: str) -> None:
    target = made / what
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(BadFormat):
        Store.open(made)
    with pytest.raises(Exists):
        Store.create(made)
    assert not (made / "data" / "data.mdb").exists()


@pytest.mark.parametrize("length", [0, 100, PAGE, 5 * PAGE, -PAGE, -1])
def test_a_shortened_file_is_refused(made: Path, length: int) -> None:
    file = made / "data" / "data.mdb"
    os.truncate(file, length if length >= 0 else file.stat().st_size + length)
    before = contents(made)
    with pytest.raises(BadFormat):
        Store.open(made)
    assert contents(made) == before


@pytest.mark.parametrize("length", [None, 0, 8 * schema.CELL_BYTES - 1])
def test_a_file_of_cells_that_is_not_whole_is_refused(made: Path, length: int | None) -> None:
    rig = Rig(made)
    vm = rig.store.reader().volume_by_name("vm").uuid
    rig.put(vm, range(31 * 8))
    rig.close()
    cells, kept = made / "data" / "cells", made / "kept"
    cells.rename(kept)
    if length is not None:
        cells.write_bytes(kept.open("rb").read(length))
    before = (made / "data" / "data.mdb").read_bytes()
    with pytest.raises(BadFormat, match="is missing" if length is None else "is cut short") as refused:
        Store.open(made)
    assert "check --repair" in (refused.value.hint or "") and cells.exists() == (length is not None)
    assert (made / "data" / "data.mdb").read_bytes() == before
    kept.replace(cells)
    with closing(Rig(made)) as whole:  # while the error, and so the attempt's frames, are still there
        assert whole.findings() == []


def test_other_files_are_refused(made: Path) -> None:
    file = made / "data" / "data.mdb"
    file.write_bytes(os.urandom(10 * PAGE))
    with pytest.raises(BadFormat):
        Store.open(made)
    file.unlink()
    lmdb.Environment(str(made / "data"), lib_version=1).close()
    with pytest.raises(BadFormat):
        Store.open(made)
    shutil.rmtree(made / "data")
    lmdb.Environment(str(made / "data"), lib_version=0).close()
    with pytest.raises(BadFormat):
        Store.open(made)


def test_an_unknown_version_is_refused_untouched(made: Path) -> None:
    environment = Environment(made / "data")
    with environment.begin(write=True) as txn:
        key = schema.META_FORMAT
        found = Format(schema.FORMAT_VERSION + 1, schema.ENGINE, b"s" * 16)
        txn.put(key, catalog.encode(schema.META, key, found), db=environment.tables[schema.META])
    environment.close()
    before = contents(made)
    with pytest.raises(BadFormat, match=f"format {schema.FORMAT_VERSION + 1}"):
        Store.open(made)
    assert contents(made) == before


def test_a_header_of_the_past_is_refused(made: Path) -> None:
    """LMDB keeps two headers and believes the one with the higher number, whatever else it says."""
    file = made / "data" / "data.mdb"
    data = bytearray(file.read_bytes())
    numbers = [int.from_bytes(data[at + 144 : at + 152], "little") for at in (0, PAGE)]
    older = 0 if numbers[0] < numbers[1] else PAGE
    data[older + 144 : older + 152] = (max(numbers) + 1).to_bytes(8, "little")
    file.write_bytes(data)
    with pytest.raises(Damaged):
        Store.open(made)
    data[older + 144 : older + 152] = (max(numbers) + 3).to_bytes(8, "little")
    file.write_bytes(data)
    with pytest.raises(BadFormat):
        Store.open(made)


def test_file_systems_of_the_network_are_refused(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "30 1 0:53 / / rw,relatime shared:1 - nfs4 host:/srv rw\n"
    (tmp_path / "mountinfo").write_text(line)
    monkeypatch.setattr("silofs.layers.filesystem.MOUNTS", tmp_path / "mountinfo")
    with pytest.raises(Unsupported):
        Store.open(made)
    with pytest.raises(Unsupported):
        Store.create(tmp_path / "new")
    (tmp_path / "mountinfo").write_text(line.replace("nfs4", "fuse.silofs"))
    Store.open(made).close()


def test_the_lock(made: Path) -> None:
    with Store.open(made), pytest.raises(StoreLocked):
        Store.open(made)
    Store.open(made).close()


def test_a_lock_that_is_held_for_it(made: Path) -> None:
    lock_fd = os.open(made / "lock", os.O_RDWR)
    fcntl.flock(lock_fd, fcntl.LOCK_EX)
    Store.open(made, lock_fd=lock_fd).close()
    with pytest.raises(StoreLocked):
        Store.open(made)
    os.close(lock_fd)
    Store.open(made).close()


def test_a_full_map_grows_and_the_function_runs_again(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "store", map_bytes=2 * MIB)
    vm = rig.store.write(lambda txn: txn.create_volume("vm", GIB)).uuid
    stop = threading.Event()

    def read() -> None:
        with rig.store.reader() as txn:
            while not stop.wait(0.01):
                txn.renew()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        rig.put_inline(vm, range(2000))
    finally:
        stop.set()
        reader.join()
    assert rig.store.statistics()["map_bytes"] > 2 * MIB
    assert rig.read("vm")[1999 * PAGE : 2000 * PAGE] == page_bytes(1999)
    assert rig.findings() == []
    rig.close()


def test_a_map_that_cannot_grow_is_a_full_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("silofs.layers.writer.GROW_WAIT_S", 0.05)
    rig = Rig(tmp_path / "store", map_bytes=2 * MIB)
    vm = rig.store.write(lambda txn: txn.create_volume("vm", GIB)).uuid
    with rig.store.reader() as txn:
        with pytest.raises(StoreFull):
            rig.put_inline(vm, range(1000))
        assert txn.volume(vm).data_pages == 0
    rig.put_inline(vm, range(1000))
    rig.close()


def test_admission_by_accounting(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where space cannot be held: what deletion frees inside the file can be written to again, the disk as full."""
    monkeypatch.setattr("silofs.layers.held.holds_space", lambda directory: False)
    with Store.open(made) as store:
        held = store.held
        assert held.top_up(64 * MIB) and held.claim(64 * MIB)
        held.let_go(64 * MIB)
        assert not held.top_up(1 << 60) and not held.claim(1 << 60)
        monkeypatch.setattr("silofs.layers.held.free_bytes", lambda path: SPACE_FLOOR_BYTES + COMMIT_COST)
        assert not held.top_up(40 * PAGE) and not held.claim(40 * PAGE)
        store.write(lambda txn: txn.delete_volume(txn.volume_by_name("vm").uuid))
        assert held.top_up(8 * PAGE) and held.claim(8 * PAGE)
        assert held.statistics().held_bytes == 0


class Failing(Environment):
    """An environment in which transactions fail as LMDB lets them fail after a bad write."""

    error: lmdb.Error | None = None

    def begin(self, *, write: bool = False):  # type: ignore[no-untyped-def]
        if write and self.error is not None:
            raise self.error
        return super().begin(write=write)


def test_after_an_error_of_lmdb_nothing_is_written_until_it_is_reopened(made: Path) -> None:
    store = Store.open(made)
    environment = store._environment
    environment.__class__ = Failing
    environment.error = lmdb.DiskError("mdb_txn_commit: Input/output error")  # type: ignore[attr-defined]
    with pytest.raises(StoreBroken):
        store.write(lambda txn: txn.create_volume("a", GIB))
    environment.error = None  # type: ignore[attr-defined]
    assert store.broken
    with pytest.raises(StoreBroken):
        store.write(lambda txn: txn.create_volume("a", GIB))
    reader = store.reader()
    assert [volume.name for volume in reader.volumes()] == ["vm"]
    with pytest.raises(StoreBroken):
        store.reopen()
    reader.close()
    store.reopen()
    assert not store.broken
    store.write(lambda txn: txn.create_volume("a", GIB))
    store.close()


def test_a_full_disk_is_told_from_a_broken_one(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("silofs.layers.writer.FULL_BYTES", 1 << 62)
    store = Store.open(made)
    store._environment.__class__ = Failing
    store._environment.error = lmdb.DiskError("mdb_txn_commit: Input/output error")  # type: ignore[attr-defined]
    with pytest.raises(StoreFull):
        store.write(lambda txn: txn.create_volume("a", GIB))
    store._environment.error = None  # type: ignore[attr-defined]
    store.write(lambda txn: txn.create_volume("a", GIB))
    store.close()


def test_functions_run_in_order_on_one_thread(made: Path) -> None:
    with Store.open(made) as store:
        order: list[tuple[int, int]] = []

        def note(number: int) -> None:
            order.append((number, threading.get_ident()))

        futures: list[Future[None]] = [store.submit(lambda txn, n=n: note(n)) for n in range(20)]  # type: ignore[misc]
        for future in futures:
            future.result()
        assert [number for number, _ in order] == list(range(20))
        assert len({thread for _, thread in order}) == 1


def test_a_transaction_belongs_to_its_function(made: Path) -> None:
    with Store.open(made) as store:
        kept: list[WriteTxn] = []
        store.write(kept.append)
        with pytest.raises(Damaged):
            kept[0].volumes()
        with pytest.raises(AssertionError):
            kept[0].renew()


def test_opening_commits(rig: Rig) -> None:
    """A store that was opened has proved that it can write: the first thing that it does is a durable commit."""
    with rig.store.reader() as txn:
        opens, before = txn.state.opens, txn.txn_id
    rig.reopen()
    with rig.store.reader() as txn:
        assert txn.state.opens == opens + 1
        assert txn.txn_id > before
