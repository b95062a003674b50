"""What users do with volumes, through the shipped command on a real mount, with daemons killed meanwhile."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Mount

pytestmark = pytest.mark.fuse

PAGE = 4096
MIB = 1 << 20


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    with Mount(tmp_path) as mounted:
        yield mounted


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def number_in(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[:8], "little")


def test_a_group_of_snapshots_keeps_the_order_of_writes(mount: Mount) -> None:
    """One writer counts up in vm1, then in vm2, each write acknowledged before the next: no set is ahead in vm2."""
    for name in ("vm1", "vm2"):
        mount.silofs("create", name, "--size", "1M")
    stop = threading.Event()

    def count() -> None:
        with opened(mount.image("vm1")) as first, opened(mount.image("vm2")) as second:
            number = 0
            while not stop.is_set():
                number += 1
                for fd in (first, second):
                    os.pwrite(fd, number.to_bytes(8, "little") * (PAGE // 8), 0)

    writer = threading.Thread(target=count)
    writer.start()
    try:
        lsns = []
        for at in range(8):
            if at == 4:
                mount.kill_daemon()
            lsns.append(mount.silofs_json("snapshot", f"vm2@s{at}", f"vm1@s{at}")["lsn"])
    finally:
        stop.set()
        writer.join()
    assert lsns == sorted(lsns)
    seen = []
    for at in range(8):
        first, second = (number_in(mount.mountpoint / ".snapshots" / f"{name}@s{at}.img") for name in ("vm1", "vm2"))
        assert second <= first <= second + 1
        seen.append(first)
    assert seen == sorted(seen)
    assert seen[-1] > seen[0]


def test_a_diff_includes_what_is_only_acknowledged(mount: Mount) -> None:
    mount.silofs("create", "vm1", "--size", "1G")
    with opened(mount.image("vm1")) as fd:
        os.pwrite(fd, b"a" * 3 * PAGE, 0)
        mount.silofs("snapshot", "vm1@a")
        os.pwrite(fd, b"b" * 100, PAGE)
        os.pwrite(fd, b"c" * PAGE, 500 * MIB)
        found = mount.silofs_json("diff", "vm1@a")
        mount.kill_daemon()
        assert mount.silofs_json("diff", "vm1@a", "vm1") == found
    assert found["extents"] == [
        {"offset": PAGE, "length": PAGE, "kind": "data"},
        {"offset": 500 * MIB, "length": PAGE, "kind": "data"},
    ]
    assert mount.silofs_json("check", "--read-data")["damaged"] == 0
