"""File systems under a store that another program fills: writes are refused, and go on once there is room."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

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
            make_room(disk)
            wait(lambda: written(fd, expected[0], 0), "a write after room was made")
            os.fsync(fd)
            for at, data in expected.items():
                assert os.pread(fd, MIB, at) == data
            os.close(fd)
        assert mount.silofs("check", "--read-data").returncode == 0
