"""Lets the disk begin with a commit's pages while LMDB is still writing the rest of them.

LMDB copies all changed pages of a transaction to the page cache, then has them written and waits for that: of a large
commit the disk would be idle during the one, and the processor during the other. So the file system is told to start
writing what is there already, every millisecond (sync_file_range(2), which promises nothing: what makes a commit
durable is LMDB's own fdatasync, before it writes the header page that leads to what is new).
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

START: Final = 2  # SYNC_FILE_RANGE_WRITE
EVERY_S: Final = 0.001
LARGE_BYTES: Final = 4 << 20  # of a commit; a smaller one is over before it matters


class Writeback:
    """A thread beside the writer's. `close` ends it."""

    def __init__(self, data_file: Path) -> None:
        self._fd = os.open(data_file, os.O_RDONLY | os.O_CLOEXEC)
        self._start = getattr(ctypes.CDLL(None), "sync_file_range", None)
        self._changed = threading.Condition()
        self._writing = self._closed = False
        self._thread: threading.Thread | None = None

    @contextmanager
    def during(self, nbytes: int) -> Iterator[None]:
        """While a transaction that has stored about so many bytes commits."""
        if nbytes < LARGE_BYTES or self._start is None:
            yield
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="silofs-writeback", daemon=True)
            self._thread.start()
        self._set(True)
        try:
            yield
        finally:
            self._set(False)

    def _set(self, writing: bool) -> None:
        with self._changed:
            self._writing = writing
            self._changed.notify()

    def _run(self) -> None:
        nothing = ctypes.c_int64(0)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._writing or self._closed)
                if self._closed:
                    return
                self._changed.wait(EVERY_S)
            assert self._start is not None
            self._start(self._fd, nothing, nothing, START)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        os.close(self._fd)
