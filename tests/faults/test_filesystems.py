"""File systems under a store that fill: writes are refused, and go on once there is room."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.fuse import hasty_holder
from tests.fuse.mounts import Mount, wait
from tests.smallfs import fill, make_room, small

pytestmark = pytest.mark.fuse
MIB = 1 << 20


def written(fd: int, data: bytes, offset: int) -> bool:
    try:
        return os.pwrite(fd, data, offset) == len(data)
    except OSError as error:
        assert error.errno == errno.ENOSPC
        return False


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_a_disk_that_others_fill(kind: str, tmp_path: Path) -> None:
    with small(kind, 640, tmp_path) as disk:
        store = tmp_path / "a-store"
        store.symlink_to(disk / "store")
        (disk / "store").mkdir(mode=0o700)
        with Mount(tmp_path) as mount:
            fd = os.open(mount.create("vm1", 512 * MIB), os.O_RDWR)
            expected: dict[int, bytes] = {}
            for at in range(0, 64 * MIB, MIB):
                expected[at] = random.Random(at).randbytes(MIB)
                assert written(fd, expected[at], at)
            os.fsync(fd)
            fill(disk)
            for at in range(0, 512 * MIB, MIB):
                data = random.Random(at + 1).randbytes(MIB)
                if not written(fd, data, at):
                    break
                expected[at] = data
            else:
                pytest.fail("more was written than there is room for")
            about = mount.ask("status")
            assert about["state"] == "serving" and about["deaths"] == 0
            # A daemon that starts now can make nothing at all there, on XFS not even a socket.
            fill(disk)
            os.kill(about["daemon_pid"], signal.SIGKILL)
            if kind == "xfs":
                assert os.pread(fd, MIB, 0) == expected[0]
                assert mount.ask("status")["deaths"] == 1 and "vm1" in mount.silofs("ls").stdout
            else:  # no space can be held there: what was acknowledged may wait in the log until there is some
                wait(lambda: mount.status()["state"] != "starting", "it serves, or holds the requests")
            make_room(disk)
            assert os.pread(fd, MIB, 0) == expected[0]
            wait(lambda: written(fd, expected[0], 0), "a write after room was made")
            os.fsync(fd)
            for at, data in expected.items():
                assert os.pread(fd, MIB, at) == data
            os.close(fd)
        assert mount.silofs("check", "--read-data").returncode == 0


def block(at: int, seed: int) -> bytes:
    return random.Random(at << 4 | seed).randbytes(MIB)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
def test_a_disk_that_its_volumes_fill(kind: str, tmp_path: Path) -> None:
    """Most of what they hold lies in cells: those of a removed volume give their blocks back, for others."""
    with small(kind, 896, tmp_path) as disk:
        store = tmp_path / "a-store"
        store.symlink_to(disk / "store")
        (disk / "store").mkdir(mode=0o700)
        with Mount(tmp_path) as mount:
            gone = os.open(mount.create("gone", 128 * MIB), os.O_RDWR)
            for at in range(0, 128 * MIB, MIB):
                assert written(gone, block(at, 1), at)
            os.fsync(gone)
            os.close(gone)
            fd = os.open(mount.create("vm1", 1024 * MIB), os.O_RDWR)
            acknowledged: dict[int, int] = {}
            for at in range(0, 1024 * MIB, MIB):
                if not written(fd, block(at, 2), at):
                    break
                acknowledged[at] = 2
            else:
                pytest.fail("more was written than there is room for")
            assert len(acknowledged) > 200
            for at in range(0, 64 * MIB, 4 * MIB):  # in place of what is there; whether there is room for that or not
                if written(fd, block(at, 3), at):
                    acknowledged[at] = 3
            cells = disk / "store" / "data" / "cells"
            full = cells.stat().st_blocks * 512
            assert full > 128 * MIB, "the last of it is left to LMDB"
            for at, seed in acknowledged.items():
                assert os.pread(fd, MIB, at) == block(at, seed)
            about = mount.ask("status")
            assert about["state"] == "serving" and about["deaths"] == 0
            mount.silofs("rm", "gone", "--yes")
            first = max(acknowledged) + MIB
            wait(lambda: written(fd, block(first, 4), first), "a write after a volume was removed", timeout_s=60)
            acknowledged[first] = 4
            for at in range(first + MIB, first + 60 * MIB, MIB):
                wait(lambda at=at: written(fd, block(at, 4), at), "the space of that volume")
                acknowledged[at] = 4
            os.fsync(fd)
            for at, seed in acknowledged.items():
                assert os.pread(fd, MIB, at) == block(at, seed)
            os.close(fd)
        assert mount.silofs("check", "--read-data").returncode == 0


def test_a_frozen_file_system_is_waited_for(tmp_path: Path) -> None:
    """As a backup of the host freezes it: nobody is killed for waiting, however long it takes, and nothing is lost."""
    with small("ext4", 640, tmp_path) as disk, ExitStack() as stack:
        store = tmp_path / "a-store"
        store.symlink_to(disk / "store")
        (disk / "store").mkdir(mode=0o700)
        odd = Mount(tmp_path, daemon="tests.fuse.odd_daemon", holder="tests.fuse.hasty_holder")
        mount = stack.enter_context(odd)
        image = mount.create("vm1", 64 * MIB)
        daemon = mount.status()["daemon_pid"]
        done, stop = [0], threading.Event()

        def client() -> None:
            with image.open("r+b", buffering=0) as file:
                while not stop.is_set():
                    os.pwrite(file.fileno(), block(done[0], 5)[:4096], done[0] % 1024 * 4096)
                    os.fdatasync(file.fileno())
                    done[0] += 1

        def other() -> None:
            # The first may have nothing to ask for while a thread of the daemon's has its fsync.
            while not stop.is_set():
                list(mount.path.iterdir())

        threads = [threading.Thread(target=work) for work in (client, other)]
        for thread in threads:
            thread.start()
            stack.callback(thread.join)
        stack.callback(stop.set)
        wait(lambda: done[0] > 20, "it writes")
        (store / "touched").touch()  # from now on the daemon's loop itself waits for the disk
        with frozen(disk):
            wait(lambda: waits_for_the_disk(daemon), "the daemon waits")
            before, until = done[0], time.monotonic() + 2 * hasty_holder.PONG_S
            wait(lambda: time.monotonic() > until, "the holder has no more patience")
            assert done[0] <= before + 1
        (store / "touched").unlink()
        wait(lambda: done[0] > before + 20, "it goes on")
        stop.set()
        for thread in threads:
            thread.join()
        about = mount.ask("status")
        assert (about["deaths"], about["daemon_pid"]) == (0, daemon)
        with image.open("rb") as file:
            for number in range(max(0, done[0] - 1000), done[0]):
                assert os.pread(file.fileno(), 4096, number % 1024 * 4096) == block(number, 5)[:4096]


@contextmanager
def frozen(disk: Path) -> Iterator[None]:
    subprocess.run(["fsfreeze", "--freeze", str(disk)], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", str(disk)], check=True)


def waits_for_the_disk(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "D"
