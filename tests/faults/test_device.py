"""What lies below the store fails: no space, I/O errors, flipped bits, a medium that cannot be read."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.inject import injected
from tests.harness import Mount

pytestmark = [pytest.mark.fuse, pytest.mark.crash]
MIB, PAGE = 1 << 20, 4096


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 320 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=320m", "silofs-test", directory], check=True)
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True)


def block(number: int) -> bytes:
    return number.to_bytes(8, "little") + random.Random(number).randbytes(MIB - 8)


def fill(fd: int) -> int:
    """Write MiB after MiB until there is no space; how many were acknowledged."""
    for number in range(1024):
        try:
            done = os.pwrite(fd, block(number), number * MIB)
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
            return number
        assert done == MIB
    raise AssertionError("the store is never full")


def test_a_full_store_says_so_loses_nothing_and_can_be_emptied(small: Path) -> None:
    with Mount(small) as mount:
        mount.silofs("create", "kept", "--size", "1M")
        mount.image("kept").write_bytes(block(0))
        mount.silofs("create", "vm1", "--size", "1G")
        fd = os.open(mount.image("vm1"), os.O_RDWR)
        written = fill(fd)
        assert written > 20
        os.fsync(fd)
        mount.kill_daemon()
        for number in range(written):
            assert os.pread(fd, MIB, number * MIB) == block(number), number
        os.close(fd)
        mount.silofs("rm", "vm1", "--yes")
        mount.silofs("create", "vm2", "--size", "1G")
        fd = os.open(mount.image("vm2"), os.O_RDWR)
        assert fill(fd) > written // 2
        os.fsync(fd)
        os.close(fd)
        assert mount.silofs_json("check", "--read-data")["damaged"] == 0
        assert mount.image("kept").read_bytes() == block(0)


SYNCS = "fdatasync,fsync"
WRITES = "pwrite64,writev,pwritev,pwritev2,fdatasync"


@pytest.mark.parametrize(
    ("calls", "fault"),
    [(SYNCS, "error=EIO:when=1"), (WRITES, "error=EIO:when=2"), (WRITES, "error=ENOSPC:when=3"), (WRITES, "error=EIO")],
)
def test_no_fsync_succeeds_falsely(tmp_path: Path, calls: str, fault: str) -> None:
    """What an fsync acknowledged after, or during, an I/O error is there after the power is gone."""
    with Mount(tmp_path) as mount:
        mount.silofs("create", "vm1", "--size", "64M")
        fd = os.open(mount.image("vm1"), os.O_RDWR)
        durable = -1
        os.pwrite(fd, block(0), 0)
        os.fsync(fd)
        with injected(mount, calls, fault):
            for number in range(1, 6):
                try:
                    os.pwrite(fd, block(number), number * MIB)
                    os.fsync(fd)
                    durable = number
                except OSError as error:
                    assert error.errno in (errno.EIO, errno.ENOSPC, errno.EROFS), error
        if "when" not in fault:
            assert durable < 1, "every write and every sync failed, and an fsync says that data is durable"
        if durable > 0:
            os.close(fd)
            mount.kill_host()
            mount.start()
            fd = os.open(mount.image("vm1"), os.O_RDWR)
        for number in range(durable + 1):
            assert os.pread(fd, MIB, number * MIB) == block(number), number
        os.close(fd)
        assert mount.silofs_json("check", "--read-data")["damaged"] == 0
        mount.silofs("restart")  # a store that failed twice is read-only until then
        with mount.image("vm1").open("r+b", buffering=0) as again:
            os.pwrite(again.fileno(), block(9), 9 * MIB)
            os.fsync(again.fileno())


def test_a_flipped_bit_costs_one_page_and_is_told(tmp_path: Path) -> None:
    with Mount(tmp_path) as mount:
        mount.silofs("create", "vm1", "--size", "8M")
        mount.image("vm1").write_bytes(b"".join(block(number) for number in range(8)))
        mount.stop()
        data = mount.store / "data" / "data.mdb"
        at = data.read_bytes().index(block(3)[:64])
        with data.open("r+b") as file:
            os.pwrite(file.fileno(), bytes([block(3)[100] ^ 4]), at + 100)
        mount.start()
        with mount.image("vm1").open("rb", buffering=0) as image:
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(image.fileno(), PAGE, 3 * MIB)
            assert os.pread(image.fileno(), MIB - PAGE, 3 * MIB + PAGE) == block(3)[PAGE:]
            assert os.pread(image.fileno(), MIB, 2 * MIB) == block(2)
        assert "damaged data of vm1" in mount.log()
        found = mount.run("check", "--read-data")
        assert found.returncode == 4 and "checksum" in found.stdout
        with mount.image("vm1").open("r+b", buffering=0) as image:
            os.pwrite(image.fileno(), block(3)[:PAGE], 3 * MIB)
            assert os.pread(image.fileno(), MIB, 3 * MIB) == block(3)
        assert "Traceback" not in mount.log()
