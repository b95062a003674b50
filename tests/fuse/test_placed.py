"""Writes whose bytes the kernel puts into the write log itself, and those that take the other way."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuse.mounts import Mount, wait

pytestmark = pytest.mark.fuse
MIB = 1 << 20


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[Mount]:
    with Mount(tmp_path, daemon="tests.fuse.odd_daemon") as mount:
        yield mount


def placed(fd: int, data: bytes, offset: int) -> bool:
    """Whether a write went through on a mount where those that are copied fail."""
    try:
        return os.pwrite(fd, data, offset) == len(data)
    except OSError as error:
        assert error.errno == errno.EIO
        return False


def test_writes_of_every_length_take_the_short_way(odd: Mount) -> None:
    fd = os.open(odd.create("vm1", 4 * MIB), os.O_RDWR)
    (odd.store / "no-copies").touch()
    odd.silofs("restart")  # the daemon that serves now saw the flag when it started, or the one after it
    odd.silofs("restart")
    wait(lambda: placed(fd, b"x", 0), "the ring is mapped")
    expected = bytearray(4 * MIB)
    for offset, length in ((0, 4096), (4096, MIB), (5, 1), (MIB + 77, 100_000), (3 * MIB, MIB), (4 * MIB - 1, 1)):
        data = random.Random(offset).randbytes(length)
        wait(lambda data=data, offset=offset: placed(fd, data, offset), "a task of pyfuse3's that has its buffer")
        expected[offset : offset + length] = data
    assert os.pread(fd, MIB + 8192, 0) == expected[: MIB + 8192]
    os.fsync(fd)
    assert b"".join(os.pread(fd, MIB, at) for at in range(0, 4 * MIB, MIB)) == expected
    # A write that must be durable before its reply waits for the disk, which the short way cannot.
    with pytest.raises(OSError):
        os.pwritev(fd, [b"y" * 4096], 0, os.RWF_DSYNC)
    os.close(fd)


def test_laps_of_the_ring_under_kills(tmp_path: Path) -> None:
    """More than three laps of mixed lengths, so that both ways, the end of the ring and a full one occur."""
    with Mount(tmp_path) as mount:
        fd = os.open(mount.create("vm1", 16 * MIB), os.O_RDWR)
        expected, dice = bytearray(16 * MIB), random.Random(7)
        written = 0
        while written < 160 * MIB:
            length = dice.choice((1, 512, 4096, 65536, MIB - 1, MIB))
            offset = dice.randrange(16 * MIB - length)
            data = dice.randbytes(length)
            assert os.pwrite(fd, data, offset) == length
            expected[offset : offset + length] = data
            written += length
            if dice.random() < 0.01:
                mount.kill_daemon()
        assert b"".join(os.pread(fd, MIB, at) for at in range(0, 16 * MIB, MIB)) == expected
        os.close(fd)
        assert mount.silofs("check", "--read-data").returncode == 0


def test_a_client_with_hundreds_of_large_writes_does_not_fill_memory(tmp_path: Path) -> None:
    """Each one that was read and waits for room in the ring is in memory; what was not read waits in the kernel."""
    threads, each = 192, 2
    with Mount(tmp_path) as mount:
        fd = os.open(mount.create("vm1", threads * each * MIB), os.O_RDWR)
        pid = mount.status()["daemon_pid"]
        before, most = anonymous(pid), 0

        def write(number: int) -> None:
            for at in range(number * each, number * each + each):
                assert os.pwrite(fd, at.to_bytes(8, "little") * (MIB // 8), at * MIB) == MIB

        writers = [threading.Thread(target=write, args=(number,)) for number in range(threads)]
        for writer in writers:
            writer.start()
        while any(writer.is_alive() for writer in writers):
            most = max(most, anonymous(pid))
            writers[-1].join(0.002)
        assert most - before < threads * each * MIB // 2, "each is there twice for a moment, and malloc keeps some"
        os.fsync(fd)
        for at in range(threads * each):
            assert os.pread(fd, MIB, at * MIB) == at.to_bytes(8, "little") * (MIB // 8)
        os.close(fd)


def anonymous(pid: int) -> int:
    """Bytes of memory that a process has for itself."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) << 10
