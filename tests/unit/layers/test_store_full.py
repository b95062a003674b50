"""A file system that is really full: an error that says so, nothing half done, and a way out."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from silofs.blocks import PAGE
from silofs.errors import StoreFull
from silofs.limits import GIB
from tests.storerig import Rig, page_bytes


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    if os.geteuid():
        pytest.skip("mounting a small file system needs root")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "silofs-test", tmp_path], check=False)
    if made.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_file_system(small: Path) -> None:
    rig = Rig(small / "store")
    vm = rig.store.write(lambda txn: txn.create_volume("vm", GIB)).uuid
    other = rig.store.write(lambda txn: txn.create_volume("other", GIB)).uuid
    rig.put(other, range(100))
    with pytest.raises(StoreFull):
        rig.store.admit(1)
    committed = 0
    with pytest.raises(StoreFull):
        for start in range(0, 10_000, 100):
            rig.put(vm, range(start, start + 100))
            committed = start + 100
    assert committed
    assert not rig.store.broken
    assert rig.read("vm")[: committed * PAGE] == b"".join(page_bytes(page) for page in range(committed))
    assert rig.findings() == []
    full = rig.store.room()
    rig.store.write(lambda txn: txn.delete_volume(vm))
    rig.store.write(lambda txn: txn.set_attr(other, uid=1))
    with rig.store.reader() as txn:
        assert txn.room() == rig.store.room() > full, "what was deleted can be written again, and df says so"
    rig.put(other, range(committed // 2), seed=1)
    assert rig.findings() == []
    rig.reopen()
    assert rig.read("other")[:PAGE] == page_bytes(0, 1)
    rig.close()
