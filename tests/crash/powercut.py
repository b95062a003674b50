"""Power cuts without a power switch: every write to a disk is recorded, and the disk rebuilt as a cut may have left it.

The disk is a loop device over a file that `tests/crash/recorder.py` serves; ext4 with the store lies on it. A cut after
entry N of the log keeps what was flushed by then, and of the writes since the last flush a random half, in pieces of
4 KiB: a disk with a volatile cache may do no worse.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.crash.recorder import ENTRY, FLUSH
from tests.harness import ROOT, until

PIECE = 4096


@dataclass(frozen=True)
class Entry:
    """A write, or a flush of length 0; `data` is where its content lies in the log."""

    moment_ns: int
    offset: int
    length: int
    flush: bool
    data: int


class Disk:
    """A recorded disk, mounted on `directory/disk`. A context manager; `cut` works after leaving it."""

    def __init__(self, directory: Path, size_mib: int = 512) -> None:
        self.path, self.log = directory / "disk", directory / "writes"
        self._directory, self._base, self._served = directory, directory / "base", directory / "served"
        for made in (self.path, self._served):
            made.mkdir(parents=True)
        with self._base.open("wb") as file:
            file.truncate(size_mib << 20)
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", self._base], check=True)

    def __enter__(self) -> Disk:
        command = [sys.executable, "-m", "tests.crash.recorder", self._base, self.log, self._served]
        self._recorder = subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=ROOT)
        try:
            until((self._served / "disk").exists, "the recorder serves its file")
            self._loop = attach(self._served / "disk", "--direct-io=on")
            subprocess.run(["mount", self._loop, self.path], check=True)
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

    def entries(self) -> list[Entry]:
        """All that was recorded so far, in order."""
        found = []
        position, size = 0, self.log.stat().st_size
        with self.log.open("rb") as file:
            while position < size:
                file.seek(position)
                moment, offset, length, kind = ENTRY.unpack(file.read(ENTRY.size))
                found.append(Entry(moment, offset, length, kind == FLUSH, position + ENTRY.size))
                position += ENTRY.size + length
        return found

    @contextmanager
    def cut(self, count: int, rng: random.Random) -> Iterator[Path]:
        """The disk after a power cut that came with `count` entries in the log, mounted; yields the mountpoint."""
        image, mountpoint = self._directory / "cut.image", self._directory / "cut"
        mountpoint.mkdir(exist_ok=True)
        subprocess.run(["cp", "--sparse=always", self._base, image], check=True)
        self._replay(image, self.entries()[:count], rng)
        loop = attach(image)
        try:
            subprocess.run(["mount", "-t", "ext4", loop, mountpoint], check=True)
            try:
                yield mountpoint
            finally:
                subprocess.run(["umount", mountpoint], check=True)
        finally:
            subprocess.run(["losetup", "--detach", loop], check=True)
            image.unlink()

    def _replay(self, image: Path, done: list[Entry], rng: random.Random) -> None:
        flushed = max((at for at, entry in enumerate(done) if entry.flush), default=-1)
        with image.open("r+b") as target, self.log.open("rb") as source:
            for at, entry in enumerate(done):
                for start in range(0, entry.length, PIECE):
                    if at < flushed or rng.random() < 0.5:
                        content = os.pread(source.fileno(), min(PIECE, entry.length - start), entry.data + start)
                        os.pwrite(target.fileno(), content, entry.offset + start)


def attach(file: Path, *options: str) -> str:
    """A loop device over `file`."""
    command = ["losetup", "--find", "--show", *options, file]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
