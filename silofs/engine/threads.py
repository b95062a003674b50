"""The one place where the engine leaves the event loop. Tests replace it by calls in place."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import trio

from silofs.limits import READ_THREADS

T = TypeVar("T")


class Threads:
    """Runs what may touch the disk. Its limiter is its own: trio's default one is shared with everybody."""

    def __init__(self, threads: int = READ_THREADS) -> None:
        self._limiter = trio.CapacityLimiter(threads)

    async def run(self, job: Callable[[], T]) -> T:
        """The job's result, from a thread. A cancellation waits for the job: it may hold a transaction."""
        return await trio.to_thread.run_sync(job, limiter=self._limiter)

    async def wait(self, future: Future[T], *, urgent: bool = False) -> T:
        """A future's result. Cheaper than a thread that waits; a cancellation does not stop what it stands for.

        `urgent`: some client waits for nothing else.
        """
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

    def statistics(self) -> dict[str, int]:
        return {"borrowed": int(self._limiter.borrowed_tokens), "total": int(self._limiter.total_tokens)}
