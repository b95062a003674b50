"""What LMDB says of its free pages, read from outside: nothing refers to them, and nobody may need them any more."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from silofs.blocks import PAGE
from silofs.layers.freelist import free_pages, in_runs
from silofs.limits import GIB
from tests.storerig import Rig, page_bytes

ANY = 1 << 62


def test_free_pages_hold_nothing_that_is_stored(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "store")
    data = rig.path / "data" / "data.mdb"
    vm = rig.store.write(lambda txn: txn.create_volume("vm", GIB)).uuid
    other = rig.store.write(lambda txn: txn.create_volume("other", GIB)).uuid
    rig.put_inline(vm, range(1519))
    rig.put(other, range(300))
    rig.store.write(lambda txn: txn.delete_volume(vm))
    before = free_pages(data, ANY)
    rig.store.write(lambda txn: txn.set_attr(other, uid=1))
    free = free_pages(data, ANY)
    assert in_runs(before, 32) < 32 * 1519 // 31 <= in_runs(free, 32) + 64, "one more transaction, and it may be used"
    assert len(free) * PAGE <= rig.store.room() and len(np.unique(free)) == len(free)
    rig.close()
    with data.open("r+b") as file:
        for number in free.tolist():
            file.seek(number * PAGE)
            file.write(b"\xff" * PAGE)
    rig = Rig(rig.path)
    assert rig.findings() == []
    assert rig.read("other")[: 300 * PAGE] == b"".join(page_bytes(page) for page in range(300))
    rig.close()


def test_what_a_reader_still_sees_is_not_free(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "store")
    vm = rig.store.write(lambda txn: txn.create_volume("vm", GIB)).uuid
    rig.put_inline(vm, range(500))
    with rig.store.reader() as txn:
        rig.store.write(lambda txn: txn.delete_volume(vm))
        rig.store.write(lambda txn: txn.create_volume("a", GIB))
        oldest = rig.store._environment.oldest_reader()
        assert oldest == txn.txn_id
        assert in_runs(free_pages(rig.path / "data" / "data.mdb", oldest), 32) == 0
    assert in_runs(free_pages(rig.path / "data" / "data.mdb", ANY), 32)
    rig.close()


def test_runs() -> None:
    pages = np.array([3, *range(10, 45), *range(100, 164), 200], np.uint64)
    assert in_runs(pages, 32) == 32 + 64
    assert in_runs(np.zeros(0, np.uint64), 32) == 0


def test_a_file_that_is_none_has_no_free_pages(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"\x5a" * 4 * PAGE)
    assert len(free_pages(tmp_path / "data.mdb", ANY)) == 0
