"""Stories without a daemon: what background work does to a store, and an upgrade, recorded as `telling` does.

    python -m tests.crash.upkeep DIRECTORY background|upgrade

DIRECTORY/disk is the recorded disk, in which a store is made, or for an upgrade lies; `story.json` goes to DIRECTORY.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic_ns

import numpy as np

from silofs import offline
from silofs.layers.store import Store
from tests.crash.content import UNIT, fill
from tests.crash.powercut import Disk
from tests.crash.story import Story, Volume
from tests.harness import ROOT
from tests.storerig import Rig, hurry

UNITS = 8 << 10  # of a volume
GOLDEN = ROOT / "tests" / "golden" / "store-v1.tar.xz"


def record(directory: Path, what: str) -> None:
    """Tell one of the stories on a new disk, in a process of its own."""
    with Disk(directory) as disk:
        if what == "upgrade":
            shutil.unpack_archive(GOLDEN, disk.path)
            os.sync()
        environment = {**os.environ, "SILOFS_FAIL": "*:mark", "SILOFS_FAIL_DIR": str(directory)}
        command = [sys.executable, "-m", "tests.crash.upkeep", str(directory), what]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)


class Keeper:
    """Writes to a store that nobody serves, has verbs done, and lets the policies work, with a story of it all."""

    def __init__(self, path: Path) -> None:
        self.story = Story()
        issued = monotonic_ns()
        Store.create(path)
        self.story.chapter(issued)
        self.rig = Rig(path)
        self._rng, self._number = random.Random(3), 0

    def create(self, name: str) -> None:
        volume = np.zeros(UNITS, np.uint64)
        self._verb("create", {"name": name, "size": UNITS * UNIT}, lambda: self._add(name, volume))

    def overwrite(self, name: str, writes: int) -> None:
        """Random writes, and a commit that makes them durable together."""
        volume = self.story.volumes[name]
        with self.rig.store.reader() as txn:
            uuid = txn.volume_by_name(name).uuid
        for _ in range(writes):
            count = self._rng.choice((8, 8, 16, 1, 128))
            first = self._rng.randrange(UNITS - count) // 8 * 8
            self._number += 1
            volume.write(first, count, self._number)
            self.rig.write(uuid, first * UNIT, fill(first, count, self._number))
        self.rig.commit()
        volume.synced(volume.newest)

    def snapshot(self, name: str, snapshot: str) -> None:
        picture = self.story.volumes[name].picture.copy()
        then = {f"{name}@{snapshot}": picture}
        self._verb("snapshot", {"volume": name, "snapshot": snapshot}, lambda: self.story.snapshots.update(then))

    def rm_snapshot(self, name: str, snapshot: str) -> None:
        arguments = {"volume": name, "snapshot": snapshot}
        self._verb("rm", arguments, lambda: self.story.snapshots.pop(f"{name}@{snapshot}"))

    def rm(self, name: str) -> None:
        self._verb("rm", {"volume": name, "snapshot": None}, lambda: self.story.volumes.pop(name))

    def imported(self, name: str) -> None:
        """Always the same image: the second one is there already."""
        picture = np.zeros(UNITS, np.uint64)
        picture[: UNITS // 2] = 1 << 40
        picture[-1000:] = 2 << 40
        fd = os.memfd_create("image")
        os.pwrite(fd, fill(0, UNITS // 2, 1 << 40), 0)
        os.pwrite(fd, fill(UNITS - 1000, 1000, 2 << 40), (UNITS - 1000) * UNIT)
        self._verb("import", {"name": name}, lambda: self._add(name, picture), fds=(fd,))
        os.close(fd)

    def background(self) -> None:
        hurry(self.rig.store)

    def _add(self, name: str, picture: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
        self.story.volumes[name] = Volume(picture, monotonic_ns())

    def _verb(
        self, verb: str, arguments: dict[str, object], then: Callable[[], object], fds: tuple[int, ...] = ()
    ) -> None:
        issued = monotonic_ns()
        offline.run(self.rig.store, verb, arguments, fds=fds)
        then()
        self.story.chapter(issued)


def background(directory: Path) -> Story:
    keeper = Keeper(directory / "disk" / "store")
    keeper.create("a")
    keeper.overwrite("a", 300)
    keeper.imported("i0")
    for number in range(5):
        keeper.snapshot("a", f"s{number}")
        keeper.overwrite("a", 60)
    keeper.imported("i1")
    keeper.background()
    for number in (1, 3, 2):
        keeper.rm_snapshot("a", f"s{number}")
        keeper.background()
        keeper.overwrite("a", 100)
    keeper.overwrite("i1", 200)
    keeper.background()
    keeper.rm("i0")
    keeper.background()
    keeper.rm("i1")
    keeper.background()
    keeper.rig.close()
    return keeper.story


def upgrade(directory: Path) -> Story:
    """Nothing that the store of an older version holds may change, whenever the power goes."""
    from tests.crash.explore import shown

    path, copy = directory / "disk" / "store", directory / "copy"
    subprocess.run(["cp", "-a", path, copy], check=True)
    story = Story()
    with offline.open_store(copy) as store:
        volumes, snapshots = shown(store)
    issued = monotonic_ns()
    offline.open_store(path).close()
    story.given(issued, volumes, snapshots)
    return story


def main(directory: Path, what: str) -> None:
    story = {"background": background, "upgrade": upgrade}[what](directory)
    story.save(directory / "story.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
