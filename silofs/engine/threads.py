"""The one place where the engine leaves the event loop. Tests replace it by calls in place."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import trio

from silofs.limits import READ_THREADS

T = TypeVar("T")

Then = Callable[[BaseException | None], None]
"""Called on the loop when a job has ended, with what it raised."""


class Bell:
    """By which a thread calls the loop, sooner than by trio's own way: whoever polls for requests can poll `fd` too.

    `expected`: how many jobs are under way, so whether it is worth polling. `wait`: set by who polls; it waits a moment
    for the bell and for requests, answers the first, and says whether it rang before a request came. `requests`: how
    many have come so far, as counted by who polls.
    """

    def __init__(self) -> None:
        self.wait: Callable[[], bool] = lambda: False
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.expected = 0
        self.requests = 0
        self._ended: deque[tuple[Then, BaseException | None]] = deque()

    def ring(self, then: Then, error: BaseException | None) -> None:
        """From any thread."""
        self._ended.append((then, error))
        os.eventfd_write(self.fd, 1)

    def answer(self) -> None:
        """On the loop, when `fd` is readable, and perhaps when it is not any more."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return
        while self._ended:
            then, error = self._ended.popleft()
            self.expected -= 1
            then(error)

    async def run(self) -> None:
        """Answer it where nobody polls."""
        while True:
            await trio.lowlevel.wait_readable(self.fd)
            self.answer()

    def __del__(self) -> None:
        os.close(self.fd)


class Threads:
    """Runs what may touch the disk. Its limiter is its own: trio's default one is shared with everybody."""

    def __init__(self, threads: int = READ_THREADS) -> None:
        self._limiter = trio.CapacityLimiter(threads)
        self.bell = Bell()
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Then] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def run(self, job: Callable[[], T]) -> T:
        """The job's result, from a thread. A cancellation waits for the job: it may hold a transaction."""
        return await trio.to_thread.run_sync(job, limiter=self._limiter)

    async def wait(self, future: Future[T]) -> T:
        """A future's result. Cheaper than a thread that waits; a cancellation does not stop what it stands for."""
        if not future.done():
            done = trio.Event()
            token = trio.lowlevel.current_trio_token()

            def wake(_: Future[T]) -> None:
                try:
                    token.run_sync_soon(done.set)
                except trio.RunFinishedError:
                    pass  # the loop ended while the writer worked; the log has it all

            future.add_done_callback(wake)
            await done.wait()
        return future.result()

    def start(self, job: Callable[[], None], then: Then) -> None:
        """Begin a job for which a client waits and nothing else: on a thread of its own, which rings the bell."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="silofs-urgent", daemon=True)
            self._thread.start()
        self.bell.expected += 1
        self._jobs.put((job, then))

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, then = item
            try:
                job()
            except BaseException as error:
                self.bell.ring(then, error)
            else:
                self.bell.ring(then, None)

    def close(self) -> None:
        """End the thread. What was begun is finished; nobody is told any more."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def statistics(self) -> dict[str, int]:
        return {"borrowed": int(self._limiter.borrowed_tokens), "total": int(self._limiter.total_tokens)}
