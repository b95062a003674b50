"""The daemon's FUSE session: pyfuse3 on a descriptor that the holder owns.

pyfuse3 is made for a daemon that mounts. Here it is given a SEQPACKET socket as its "mount" (`/dev/fd/N`, which libfuse
takes for a /dev/fuse that somebody opened), reads the kernel's INIT request from it and answers into it: phase one. The
holder checks or forwards the answer. Then the real descriptor is put in the socket's place with dup2, and the loop runs
again: phase two, requests.

Two things are replaced in pyfuse3's loop, both by attributes of its module. It waits in epoll for every single request,
which costs more than serving one; `_Polled` asks the descriptor first, and for a moment again and again: a client that
waits for each answer has its next request there before a sleeping thread would be awake (docs/decisions/spinning.md).
And every wait is where a drain is noticed.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import select
import sys
from collections.abc import Awaitable, Callable
from time import perf_counter_ns
from typing import Protocol

import pyfuse3
import trio
from pyfuse3 import FUSEError

from silofs import limits
from silofs.engine.threads import Bell
from silofs.mount import kernel, raw
from silofs.mount.answers import Answers

log = logging.getLogger(__name__)

Seen = Callable[[int, bool], bool]


class Crowd(Protocol):
    """Writes that were read and wait for room. `eased` returns when they are no more than CROWD_BYTES."""

    crowding: int

    async def eased(self) -> None: ...


BELL_WAIT_MS = 1  # a write of the journal that takes longer is waited for in epoll
BELL_COSTS = 8  # requests of a burst that waiting for one in place counts as
SWITCH_INTERVAL_S = 0.0002  # CPython's 5 ms would let one busy thread stretch a 3 us look-up to 200 us


class Hooks(pyfuse3.Operations):
    """Operations that know when INIT was answered."""

    def __init__(self) -> None:
        super().__init__()
        self.initialised = trio.Event()

    def init(self) -> None:
        """libfuse has read INIT, and answers it before any other task of this thread runs."""
        self.initialised.set()

    async def answer(self, request: raw.Request) -> bytes:
        """The body of the reply to a request that pyfuse3 does not know. Raises FUSEError and nothing else."""
        raise FUSEError(errno.ENOSYS)


class Session:
    """One session of this process (libfuse and pyfuse3 have no more). `session_fd` is the inherited socket."""

    def __init__(self, operations: Hooks, session_fd: int, options: set[str]) -> None:
        self._operations = operations
        self._fd = session_fd
        self._options = options
        self._draining = False
        self._can_resend = False
        self._answers = Answers(session_fd, operations.answer)

    async def initialise(self) -> None:
        """Phase one: answer the INIT request that is in the socket."""
        pyfuse3.init(self._operations, f"/dev/fd/{self._fd}", self._options)
        done = trio.Event()

        async def phase() -> None:
            await pyfuse3.main(min_tasks=1, max_tasks=1)
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(phase)
            await self._operations.initialised.wait()
            while not done.is_set():  # its one reader goes on to wait for a second request
                trio.lowlevel.notify_closing(self._fd)
                await trio.lowlevel.checkpoint()

    def attach(self, fuse: int, *, can_resend: bool, seen: Seen, bell: Bell, crowd: Crowd) -> None:
        """Put the mount's descriptor in the place of the socket; `fuse` is closed. can_resend: the kernel does.

        seen: told how many requests were read, and that there was none more, until it says that it has heard enough.
        crowd: requests that were read and wait; there is an end to how many more are read.
        """
        self._can_resend = can_resend
        os.dup2(fuse, self._fd, inheritable=False)
        os.close(fuse)
        os.set_blocking(self._fd, False)
        own = getattr(pyfuse3, "_wait_fuse_readable", None)
        if own is not None:
            # Another pyfuse3 may not have it; then its own loop runs, slower and just as right.
            polled = _Polled(self._fd, own, self._is_draining, seen, bell, crowd)
            bell.wait = polled.wait_for_bell
            pyfuse3._wait_fuse_readable = polled.wait  # type: ignore[attr-defined]
        else:
            seen(0, True)

    async def serve(self) -> bool:
        """Phase two: take requests until the mount is gone (True) or `drain` was called (False)."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        gc.collect()
        gc.freeze()  # what the imports left behind need not be walked again
        ended = False
        while not ended:
            try:
                async with self._answers.serving():
                    await pyfuse3.main(min_tasks=1, max_tasks=limits.FUSE_MAX_TASKS)
                ended = True
            except* BlockingIOError:
                # A process was killed between our poll and libfuse's read, and its request withdrawn. pyfuse3 ends all
                # its tasks over that; what they had read and not answered comes once more.
                log.info("a request was withdrawn while it was read")
                if self._can_resend:
                    kernel.resend(self._fd)
        return not self._draining

    def drain(self) -> None:
        """Read no further request; `serve` returns when those that were read are answered."""
        self._draining = True
        pyfuse3.terminate()

    def _is_draining(self) -> bool:
        return self._draining


class _Polled:
    """pyfuse3's wait for the next request, asking the descriptor before epoll.

    At most FUSE_POLL_BURST requests in a row, or FUSE_BURST_NS of them, are taken that way, so that other tasks get the
    loop: a commit that is due while large writes follow each other, above all. pyfuse3 reads right after `wait`
    returned, with no await in between: the descriptor that was readable here is readable there. That is also why it is
    asked again after epoll said so, since another task may have read in the meantime, and a read of nothing would end
    the loop.
    """

    __slots__ = (
        "_bell",
        "_crowd",
        "_draining",
        "_fd",
        "_own",
        "_poll",
        "_poll_both",
        "_rest",
        "_seen",
        "_taken",
        "_until",
    )

    def __init__(
        self,
        fd: int,
        own: Callable[[], Awaitable[bool]],
        draining: Callable[[], bool],
        seen: Seen | None,
        bell: Bell,
        crowd: Crowd,
    ) -> None:
        self._fd = fd
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        self._poll = poller.poll
        self._bell = bell
        self._crowd = crowd
        both = select.poll()
        both.register(fd, select.POLLIN)
        both.register(bell.fd, select.POLLIN)
        self._poll_both = both.poll
        self._own = own
        self._draining = draining
        self._seen = seen
        self._taken = 0
        self._until = 0  # the burst's end, by perf_counter_ns
        self._rest = limits.FUSE_SPIN_REST  # waits before it is worth another try to spin

    async def wait(self) -> bool:
        """True when a request (or the end of the mount) can be read, False to end this task."""
        if self._crowd.crowding > limits.CROWD_BYTES:
            await self._crowd.eased()
        if self._draining():
            return False
        taken, now = self._taken + 1, perf_counter_ns()
        if taken == 1:
            self._until = now + limits.FUSE_BURST_NS
        going_on = taken < limits.FUSE_POLL_BURST and now < self._until
        if going_on and (self._poll(0) or self._spin()):
            self._taken = taken
            self._bell.requests += 1
            return True
        # Also after a burst: the sleep may be long, and somebody waits to hear that there is none.
        if self._seen is not None and self._seen(self._taken, going_on or not self._poll(0)):
            self._seen = None
        self._taken = 0
        if self._bell.expected and await self._wait_both():
            self._bell.requests += 1
            return True
        while await self._own():
            if self._draining():
                return False
            if self._poll(0):
                self._bell.requests += 1
                return True
        return False

    def _spin(self) -> bool:
        """Whether a request came within a moment. What else the loop has to do waits as long, BURST times at most."""
        if self._rest:
            self._rest -= 1
            return False
        if self._bell.expected:
            return False
        until = perf_counter_ns() + limits.FUSE_SPIN_NS
        while perf_counter_ns() < until:
            if self._poll(0):  # lets go of Python's lock each time
                return True
        self._rest = limits.FUSE_SPIN_REST
        return False

    async def _wait_both(self) -> bool:
        """Wait for a request or the bell without epoll, while the bell is expected: an fsync's reply is made at once.

        Everything else of the loop has its turn first, and again after BELL_WAIT_MS. True when a request is there.
        """
        await trio.lowlevel.checkpoint()
        bell = self._bell
        while bell.expected and not self._draining():
            ready = self._poll_both(BELL_WAIT_MS)
            if not ready:
                return False
            if len(ready) == 1 and ready[0][0] == self._fd:
                return True
            bell.answer()
            await trio.lowlevel.checkpoint()
        return bool(self._poll(0)) and not self._draining()

    def wait_for_bell(self) -> bool:
        """Wait in place, BELL_WAIT_MS at most; whether the bell rang before a request came.

        Counts as many requests, so that the other tasks of the loop do not wait for long.
        """
        self._taken += BELL_COSTS
        ready = self._poll_both(BELL_WAIT_MS)
        if len(ready) != 1 or ready[0][0] == self._fd:
            return False
        self._bell.answer()
        return True
