"""Makes what was written to a file durable on a thread, while whoever wrote it does something else.

What a disk takes quickly it may still have to put away when it is told to (a flush): on disks that were measured that
took longer than the transfer, and for many small flushes together twice as long as for a large one. So the disk is told
for large pieces, as soon as all bytes of one are written, and waited for at the end of the transaction.
"""

from __future__ import annotations

import os
import threading


class Syncer:
    """Of one descriptor. `close` ends the thread, which is started when it is first needed."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._changed = threading.Condition()
        self._written = self._wanted = self._synced = 0  # counts of `written`
        self._error: OSError | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def written(self) -> int:
        """Something more was written; a mark for `begin` and `wait`. Any thread."""
        with self._changed:
            self._written += 1
            return self._written

    @property
    def busy(self) -> bool:
        return self._wanted > self._synced

    def begin(self, mark: int) -> None:
        """Go about making durable what was written up to the mark."""
        with self._changed:
            assert mark <= self._written, "a mark of this file's"
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="silofs-syncer", daemon=True)
                thread.start()
                self._thread = thread  # one only: the kernel says an error once, to whoever asks first
            self._wanted = max(self._wanted, mark)
            self._changed.notify_all()

    def wait(self, mark: int | None = None) -> None:
        """Until all that was written (up to the mark) is durable. OSError when some of what was written since the last

        call is not, whether before the mark or after it.
        """
        mark = self._written if mark is None else mark
        if self._synced < mark:
            self.begin(mark)
        with self._changed:
            self._changed.wait_for(lambda: self._synced >= mark)
            error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted > self._synced or self._closed)
                if self._wanted <= self._synced:
                    return
                upto = self._written
            error = None
            try:
                os.fdatasync(self._fd)
            except OSError as failure:
                error = failure  # said once by the kernel, and so kept
            with self._changed:
                self._synced, self._error = upto, self._error or error
                self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
