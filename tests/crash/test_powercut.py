"""Power cuts at random moments: what was synced is there, the rest is a prefix, and the store is whole (G1 and G2)."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.crash.powercut import Disk
from tests.exerciser import verify
from tests.harness import ROOT, Mount

pytestmark = [pytest.mark.fuse, pytest.mark.crash]


@pytest.mark.parametrize("mode", ["direct", "fsync"])
def test_synced_writes_survive_and_the_rest_is_a_prefix(
    tmp_path: Path, mode: str, cuts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(mode)
    log, exported = tmp_path / "log", tmp_path / "exported"
    disk = Disk(tmp_path / "power")
    with disk, Mount(disk.path) as mount:
        mount.silofs("create", "vm1", "--size", "24M")
        first = len(disk.entries())
        command = [sys.executable, "-m", "tests.exerciser", "run", mount.image("vm1"), "--log", log, "--mode", mode]
        work = subprocess.Popen([*command, "--depth", "1", "--no-punch", "--seconds", "4"], cwd=ROOT)
        try:
            time.sleep(2.0)
            mount.silofs("snapshot", "vm1@middle")
            middle = len(disk.entries())
            assert work.wait(30) == 0
        finally:
            work.kill()
            work.wait()
        entries = disk.entries()
    for _ in range(cuts):
        count = rng.randint(first, len(entries))
        with disk.cut(count, rng) as mountpoint:
            host = Mount(mountpoint)
            host.silofs("check", "--read-data")
            host.silofs("export", "vm1", str(exported), "--yes")
            verify(exported, log, after="synced", before_ns=entries[count - 1].moment_ns, in_order=True)
            if count >= middle:
                assert [snapshot["name"] for snapshot in host.silofs_json("info", "vm1")["snapshots"]] == ["middle"]
                host.silofs("export", "vm1@middle", str(exported), "--yes")
                verify(exported, log, after="synced", before_ns=0, in_order=True)
    with capsys.disabled():
        written = len(entries) - first
        print(f"\n{mode}: {cuts} power cuts among {written} writes and flushes of the disk, nothing synced was lost")
