"""copy_file_range(2) through a mount shares pages: the programs that use it, and what it costs."""

from __future__ import annotations

import os
import random
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from silofs.layers.environment import Environment
from silofs.layers.reader import ReadTxn
from silofs.layers.schema import CELL, CONTAINER, OBJECT, PAGES
from silofs.layers.store import Store
from tests.fuse.mounts import Mount

pytestmark = pytest.mark.fuse
MIB = 1 << 20


def used(mount: Mount) -> int:
    """Bytes that stored pages take, by the newest commit."""
    with closing(Environment(mount.store / "data")) as environment, closing(ReadTxn(environment)) as txn:
        large = sum(1 for table in (OBJECT, CELL, CONTAINER) for _ in txn.scan_keys(table))
        return large * 128 * 1024 + sum(1 for _ in txn.scan_keys(PAGES)) * 4096


def copy_all(source: Path, target: Path) -> int:
    """As cp of newer coreutils does it; the number of calls."""
    calls = at = 0
    with source.open("rb") as one, target.open("r+b") as two:
        while done := os.copy_file_range(one.fileno(), two.fileno(), 1 << 30):
            at, calls = at + done, calls + 1
        os.fsync(two.fileno())
    assert at == source.stat().st_size
    return calls


def test_copies_take_no_space(tmp_path: Path) -> None:
    content = random.Random(3).randbytes(40 * MIB) + bytes(20 * MIB) + random.Random(4).randbytes(4 * MIB + 512)
    with Mount(tmp_path) as mount:
        source = mount.create("source", len(content))
        source.write_bytes(content)
        with source.open("rb") as file:
            os.fsync(file.fileno())
        mount.silofs("snapshot", "source@kept")
        before = used(mount)
        assert before > 44 * MIB
        one = mount.create("one", 4096)
        copy_all(source, one)
        assert one.read_bytes() == content
        assert one.stat().st_blocks * 512 < 45 * MIB
        assert used(mount) < before * 1.1
        two = mount.create("two", len(content))
        convert = ["qemu-img", "convert", "-C", "-n", "-f", "raw", "-O", "raw", source, two]
        subprocess.run(convert, check=True)
        assert two.read_bytes() == content
        assert used(mount) < before * 1.12
        again = mount.create("again", len(content))
        assert copy_all(two, again) <= 3
        with again.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"x" * 8192, 30 * MIB + 4096)
        assert source.read_bytes() == two.read_bytes() == content
        mount.kill_daemon()
        assert again.read_bytes() == content[: 30 * MIB + 4096] + b"x" * 8192 + content[30 * MIB + 12288 :]
        assert mount.ask("check", "--read-data")["findings"] == []
    with Store.open(mount.store) as store, store.reader() as txn:
        assert txn.volume_by_name("one").data_pages == txn.volume_by_name("source").data_pages


def test_odd_ranges_are_copied_by_somebody(tmp_path: Path) -> None:
    """What cannot be shared the kernel copies; programs do not notice."""
    content = random.Random(5).randbytes(MIB)
    with Mount(tmp_path) as mount:
        source, target = mount.create("a", MIB), mount.create("b", MIB)
        source.write_bytes(content)
        with source.open("rb") as one, target.open("r+b", buffering=0) as two:
            at = 0
            while at < 500_000:
                at += os.copy_file_range(one.fileno(), two.fileno(), 500_000 - at, 1000 + at, 77 + at)
            assert os.pread(two.fileno(), 500_000, 77) == content[1000:501_000]
            at = 0
            while at < 100_000:
                at += os.copy_file_range(one.fileno(), two.fileno(), 100_000 - at, 4096 + 10 + at, 10 + at)
            assert os.pread(two.fileno(), 100_000, 10) == content[4106:104_106]
        assert mount.ask("check", "--read-data")["findings"] == []
