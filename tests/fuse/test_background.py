"""The cleaner and merges on a real mount: the file stays small, removed snapshots give their space back, and a daemon
that is killed in the middle of it has lost and changed nothing."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests.fuse.mounts import Mount, wait

pytestmark = pytest.mark.fuse

PAGE = 4096
MIB = 1 << 20
SIZE = 24 * MIB


def stored(mount: Mount) -> int:
    return int(mount.ask("du")["held"])


def status(mount: Mount) -> dict[str, Any]:
    found: dict[str, Any] = mount.ask("status")["background"]
    return found


class Oracle:
    """What the volume must hold."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR)
        self.data = bytearray(SIZE)
        self.choose = random.Random(1)

    def write(self, at: int, data: bytes) -> None:
        assert os.pwrite(self.fd, data, at) == len(data)
        self.data[at : at + len(data)] = data

    def fill(self) -> None:
        for at in range(0, SIZE, MIB):
            self.write(at, self.choose.randbytes(MIB))
        os.fsync(self.fd)

    def overwrite(self, pages: int) -> None:
        for _ in range(pages):
            self.write(self.choose.randrange(SIZE // PAGE) * PAGE, self.choose.randbytes(PAGE))

    def check(self) -> None:
        for at in range(0, SIZE, MIB):
            assert os.pread(self.fd, MIB, at) == self.data[at : at + MIB], at


def test_a_file_that_is_overwritten_for_ever_stays_small(tmp_path: Path) -> None:
    with Mount(tmp_path) as mount:
        mount.silofs("create", "vm", "--size", str(SIZE))
        oracle = Oracle(mount.path / "vm.img")
        oracle.fill()
        for _ in range(7):
            oracle.overwrite(SIZE // PAGE)
            os.fsync(oracle.fd)
        wait(lambda: not status(mount)["clean"]["backlog_pages"], "the cleaner to keep up")
        assert status(mount)["clean"]["moved_pages"]
        oracle.check()
        os.close(oracle.fd)
        file = (mount.store / "data" / "data.mdb").stat()
        # 1.85 times the live data and a commit's worth; commits of the whole ring, and what they free, come on top.
        assert file.st_size < 2 * SIZE + 6 * 16 * MIB
        mount.silofs("check")


def test_a_removed_snapshot_gives_its_space_back(tmp_path: Path) -> None:
    with Mount(tmp_path) as mount:
        mount.silofs("create", "vm", "--size", str(SIZE))
        oracle = Oracle(mount.path / "vm.img")
        oracle.fill()
        mount.silofs("snapshot", "vm@a")
        oracle.fill()
        mount.silofs("snapshot", "vm@b")
        kept = bytes(oracle.data)
        oracle.overwrite(500)
        os.fsync(oracle.fd)
        assert stored(mount) >= 2 * SIZE
        with open(mount.path / ".snapshots" / "vm@b.img", "rb") as shown:
            mount.silofs("rm", "vm@a", "--yes")
            assert shown.read() == kept, "who has it open keeps its layers from being merged"
        wait(lambda: stored(mount) < SIZE + 501 * PAGE, "what only the snapshot held", timeout_s=60)
        assert (mount.path / ".snapshots" / "vm@b.img").read_bytes() == kept
        oracle.check()
        os.close(oracle.fd)
        assert mount.ask("info", "vm")["chain_depth"] == 2


@pytest.mark.crash
@pytest.mark.parametrize(
    "place", ["rewrite.before_commit@2", "rewrite.durable@3", "merge.begin@1", "merge.end@1"]
)
def test_killed_in_the_middle(tmp_path: Path, place: str) -> None:
    name, _, count = place.partition("@")
    fired = tmp_path / "fired"
    fired.mkdir()
    env = {"SILOFS_FAIL": f"{name}:kill@{count}", "SILOFS_FAIL_DIR": str(fired)}
    with Mount(tmp_path, env=env) as mount:
        mount.silofs("create", "vm", "--size", str(SIZE))
        oracle = Oracle(mount.path / "vm.img")
        oracle.fill()
        mount.silofs("snapshot", "vm@a")
        oracle.overwrite(3000)
        mount.silofs("snapshot", "vm@b")
        kept = bytes(oracle.data)
        mount.silofs("rm", "vm@a", "--yes", check=False)
        oracle.overwrite(SIZE // PAGE)
        wait((fired / name).exists, f"the daemon to die at {name}")
        oracle.overwrite(500)
        wait(lambda: not status(mount)["merge"]["under_way"] and stored(mount) < 2 * SIZE + 501 * PAGE, "the merge")
        oracle.check()
        os.close(oracle.fd)
        assert (mount.path / ".snapshots" / "vm@b.img").read_bytes() == kept
        mount.silofs("check", "--read-data")
