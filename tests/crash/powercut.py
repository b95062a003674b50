"""Power cuts without a power switch: every write to a disk is recorded, and the disk rebuilt as a cut may have left it.

The disk is a loop device over a file that `tests/crash/recorder.py` serves; ext4 with the store lies on it. A cut after
entry N of the log keeps what was flushed by then, and of the writes since the last flush a random half, in pieces of
one or eight sectors: a disk with a volatile cache may do no worse.
"""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.crash.recorder import ENTRY, FLUSH
from tests.harness import ROOT, until

PIECES = (512, 4096)  # what a disk writes whole
BLOCK = 4096
CUT = "cut"  # where a state is mounted
DISK_MIB = 512


@dataclass(frozen=True)
class Entry:
    """A write, or a flush of length 0; `data` is where its content lies in the log."""

    moment_ns: int
    offset: int
    length: int
    flush: bool
    data: int


class Disk:
    """A recorded disk, mounted on `directory/disk`. A context manager; `Replay` works while and after it runs."""

    def __init__(self, directory: Path, size_mib: int = DISK_MIB) -> None:
        self.directory, self.path = directory, directory / "disk"
        self._base, self._served = directory / "base", directory / "served"
        for made in (self.path, self._served):
            made.mkdir(parents=True)
        with self._base.open("wb") as file:
            file.truncate(size_mib << 20)
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", self._base], check=True)

    def __enter__(self) -> Disk:
        log = self.directory / "writes"
        command = [sys.executable, "-m", "tests.crash.recorder", self._base, log, self._served]
        self._recorder = subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=ROOT)
        try:
            until((self._served / "disk").exists, "the recorder serves its file")
            attach = ["losetup", "--find", "--show", "--direct-io=on", self._served / "disk"]
            self._loop = subprocess.run(attach, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
            subprocess.run(["mount", "-o", "noinit_itable", self._loop, self.path], check=True)
        except BaseException:
            self._recorder.terminate()
            self._recorder.wait(30)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", self.path], check=True)
        subprocess.run(["losetup", "--detach", self._loop], check=True)
        until(
            lambda: subprocess.run(["umount", self._served], capture_output=True, check=False).returncode == 0, "umount"
        )
        self._recorder.wait(30)


def entries(directory: Path) -> list[Entry]:
    """All that was recorded so far on the disk of that directory, in order."""
    log = directory / "writes"
    found = []
    position, size = 0, log.stat().st_size
    with log.open("rb") as file:
        while position < size:
            file.seek(position)
            moment, offset, length, kind = ENTRY.unpack(file.read(ENTRY.size))
            found.append(Entry(moment, offset, length, kind == FLUSH, position + ENTRY.size))
            position += ENTRY.size + length
    return found


class Replay:
    """The disk of a directory as power cuts may have left it; cuts come in rising order."""

    def __init__(self, directory: Path) -> None:
        self.entries = entries(directory)
        self._directory = directory
        self._log = (directory / "writes").open("rb")
        self._data = mmap.mmap(self._log.fileno(), 0, prot=mmap.PROT_READ)
        base = np.fromfile(directory / "base", np.uint8)
        self._disk = base  # as of the last flush
        self._used = (base.reshape(-1, BLOCK) != 0).any(axis=1)
        self._flushed = 0  # entries that the disk has

    @contextmanager
    def cut(self, count: int, rng: random.Random) -> Iterator[Path]:
        """The disk after a power cut that came with `count` entries in the log, mounted; yields the mountpoint."""
        image, mountpoint = self._directory / "cut.image", self._directory / CUT
        mountpoint.mkdir(exist_ok=True)
        self._advance(count)
        command = ["mount", "-t", "ext4", "-o", "loop,noinit_itable", image, mountpoint]
        try:
            # ext4 does not promise to survive when one of its own blocks is torn: then they come whole.
            for size in (rng.choice(PIECES), BLOCK):
                self._write(image, self._survivors(count, rng, size))
                if subprocess.run(command, capture_output=size < BLOCK, check=size == BLOCK).returncode == 0:
                    break
            try:
                yield mountpoint
            finally:
                subprocess.run(["umount", mountpoint], check=True)
        finally:
            image.unlink()

    def _advance(self, count: int) -> None:
        """Bring the disk to the last flush before `count`."""
        flush = max((at for at in range(self._flushed, count) if self.entries[at].flush), default=self._flushed)
        for entry in self.entries[self._flushed : flush]:
            self._put(self._disk, entry.offset, self._data[entry.data : entry.data + entry.length])
        self._flushed = flush

    def _survivors(self, count: int, rng: random.Random, size: int) -> list[tuple[int, bytes]]:
        """What reached the disk of the writes since that flush: half of the pieces of that size."""
        kept = []
        for entry in self.entries[self._flushed : count]:
            for start in range(0, entry.length, size):
                if rng.random() < 0.5:
                    at = entry.data + start
                    kept.append((entry.offset + start, self._data[at : at + min(size, entry.length - start)]))
        return kept

    def _put(self, disk: np.ndarray[tuple[int], np.dtype[np.uint8]], offset: int, data: bytes) -> None:
        disk[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        first, last = offset // BLOCK, -(-(offset + len(data)) // BLOCK)
        self._used[first:last] |= (disk[first * BLOCK : last * BLOCK].reshape(-1, BLOCK) != 0).any(axis=1)

    def _write(self, image: Path, survivors: list[tuple[int, bytes]]) -> None:
        """The image file: the used blocks of the disk, and the survivors over them."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], self._used, [False]]).astype(np.int8)))
        with image.open("wb") as file:
            file.truncate(len(self._disk))
            for first, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                os.pwrite(file.fileno(), self._disk[first * BLOCK : end * BLOCK].data, first * BLOCK)
            for offset, data in survivors:
                os.pwrite(file.fileno(), data, offset)
