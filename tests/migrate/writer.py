"""A writer that follows its volume, and the oracle of what must be in it.

It runs in the test's process (the mounts are other processes') and writes numbered pages. A write that failed or was
in flight may or may not have happened; one that was acknowledged must have, until it is overwritten.
"""

from __future__ import annotations

import errno
import os
import random
import struct
import threading
import time
from pathlib import Path

PAGE = 4096
SWITCH_S = 30.0
_HEAD = struct.Struct("<QQ")


def page_of(sequence: int, number: int) -> bytes:
    return _HEAD.pack(sequence, number) + bytes([sequence & 0xFF or 1]) * (PAGE - _HEAD.size)


class Writer(threading.Thread):
    """Writes pages of `images[0]` until it is cut off (ESTALE), then of the next image, until `stop`."""

    def __init__(self, images: list[Path], pages: int, *, pause: float = 0.0) -> None:
        super().__init__(daemon=True)
        self.images = images
        self.pages = pages
        self.pause = pause
        self.legal: dict[int, set[int]] = {}  # page -> sequence numbers that it may hold; 0: never written
        self.acknowledged = 0
        self.stale: list[int] = []  # acknowledged writes when each image was left
        self.failure: BaseException | None = None
        self._stopping = threading.Event()
        self._random = random.Random(7)
        self._sequence = 0

    def run(self) -> None:
        try:
            for image in self.images:
                if self._stopping.is_set():
                    return
                self._write_to(image)
        except BaseException as error:
            self.failure = error

    def stop(self) -> None:
        self._stopping.set()
        self.join(SWITCH_S)
        assert not self.is_alive(), "the writer hangs"
        if self.failure is not None:
            raise self.failure

    def _write_to(self, image: Path) -> None:
        fd = self._open(image)
        try:
            while not self._stopping.is_set():
                number = self._random.randrange(self.pages)
                self._sequence += 1
                before = self.legal.get(number, {0})
                self.legal[number] = before | {self._sequence}
                try:
                    os.pwrite(fd, page_of(self._sequence, number), number * PAGE)
                except OSError as error:
                    self.legal[number] = before  # refused: it never was
                    if error.errno == errno.ESTALE:
                        self.stale.append(self.acknowledged)
                        return
                    if error.errno == errno.EBUSY:
                        continue
                    raise
                self.legal[number] = {self._sequence}
                self.acknowledged += 1
                if self.pause:
                    time.sleep(self.pause)
        finally:
            os.close(fd)

    def _open(self, image: Path) -> int:
        deadline = time.monotonic() + SWITCH_S
        while True:
            try:
                return os.open(image, os.O_RDWR)
            except OSError:
                if time.monotonic() > deadline:
                    raise

    def check(self, image: Path) -> None:
        """Every page of the image holds what it may hold."""
        with image.open("rb", buffering=0) as file:
            for number, legal in self.legal.items():
                data = os.pread(file.fileno(), PAGE, number * PAGE)
                sequence = _HEAD.unpack_from(data)[0]
                assert sequence in legal, f"page {number} holds write {sequence}, and may hold {sorted(legal)}"
                if sequence:
                    assert data == page_of(sequence, number), f"page {number} is torn"
