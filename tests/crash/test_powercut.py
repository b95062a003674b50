"""Power cuts at random moments: what was synced is there, the rest is a prefix, and the store is whole (G1 and G2)."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.crash.powercut import Disk
from tests.exerciser import Difference, verify
from tests.harness import ROOT, Failed, Mount

pytestmark = [pytest.mark.fuse, pytest.mark.crash]


# What a store that forgot to sync would do. LMDB writes its meta page through a descriptor opened O_DSYNC, which stays.
FORGETFUL = """
int fsync(int fd) { return 0; }
int fdatasync(int fd) { return 0; }
"""


class Recording:
    """Four seconds of one exerciser thread on a volume of a store on a recorded disk, with a snapshot in the middle."""

    def __init__(self, directory: Path, mode: str, environment: dict[str, str] | None = None) -> None:
        self.log, self._exported = directory / "log", directory / "exported"
        self.disk = Disk(directory / "power")
        with self.disk, Mount(self.disk.path, environment=environment) as mount:
            mount.silofs("create", "vm1", "--size", "24M")
            self.first = len(self.disk.entries())
            image, module = mount.image("vm1"), "tests.exerciser"
            command = [sys.executable, "-m", module, "run", image, "--log", self.log, "--mode", mode, "--depth", "1"]
            work = subprocess.Popen([*command, "--no-punch", "--seconds", "4"], cwd=ROOT)
            try:
                time.sleep(2.0)
                mount.silofs("snapshot", "vm1@middle")
                self.middle = len(self.disk.entries())
                assert work.wait(30) == 0
            finally:
                work.kill()
                work.wait()
            self.entries = self.disk.entries()

    def check_cut(self, rng: random.Random) -> None:
        """Cut the power at a random moment and look at what is left. Raises Difference or Failed."""
        count = rng.randint(self.first, len(self.entries))
        with self.disk.cut(count, rng) as mountpoint:
            host = Mount(mountpoint)
            host.silofs("check", "--read-data")
            host.silofs("export", "vm1", str(self._exported), "--yes")
            synced_before = self.entries[count - 1].moment_ns
            verify(self._exported, self.log, after="synced", before_ns=synced_before, in_order=True)
            if count >= self.middle:
                assert [snapshot["name"] for snapshot in host.silofs_json("info", "vm1")["snapshots"]] == ["middle"]
                host.silofs("export", "vm1@middle", str(self._exported), "--yes")
                verify(self._exported, self.log, after="synced", before_ns=0, in_order=True)


@pytest.mark.parametrize("mode", ["direct", "fsync"])
def test_synced_writes_survive_and_the_rest_is_a_prefix(
    tmp_path: Path, mode: str, cuts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(mode)
    recording = Recording(tmp_path, mode)
    for _ in range(cuts):
        recording.check_cut(rng)
    with capsys.disabled():
        written = len(recording.entries) - recording.first
        print(f"\n{mode}: {cuts} power cuts among {written} writes and flushes of the disk, nothing synced was lost")


def test_a_store_that_does_not_sync_is_noticed(tmp_path: Path) -> None:
    """The negative control: the same test fails soon when fdatasync(2) does nothing."""
    library = tmp_path / "forgetful.so"
    compiler = ["gcc", "-shared", "-fPIC", "-x", "c", "-o", library, "-"]
    subprocess.run(compiler, input=FORGETFUL, text=True, check=True)
    recording = Recording(tmp_path, "fsync", {"LD_PRELOAD": str(library)})
    rng = random.Random(1)
    with pytest.raises((Difference, Failed)):
        for _ in range(12):
            recording.check_cut(rng)
