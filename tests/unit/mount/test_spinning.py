"""The wait for the next request: when it is asked for again and again, and when that is left."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import trio

from silofs import limits
from silofs.engine.threads import Bell
from silofs.mount import session
from silofs.mount.session import _Polled


class Clock:
    """Each look takes a microsecond; a request comes at a look, if it is to come."""

    def __init__(self, fd: int) -> None:
        self.now = self.looks = 0
        self.comes_at: int | None = None
        self._fd = fd

    def __call__(self) -> int:
        self.now += 1000
        self.looks += 1
        if self.looks == self.comes_at:
            os.write(self._fd, b"r")
        return self.now


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


class Waiter:
    def __init__(self, pipe: tuple[int, int], clock: Clock) -> None:
        self.pipe, self.clock = pipe, clock
        self.slept = 0
        self.bell = Bell()
        self.crowding = 0
        self.told: list[tuple[int, bool]] = []  # requests read since the last time; there was none more
        self.polled = _Polled(pipe[0], self._sleep, lambda: False, self.seen, self.bell, self)

    def seen(self, reads: int, empty: bool) -> bool:
        self.told.append((reads, empty))
        return False

    async def eased(self) -> None:
        """As a crowd: it never is one for longer than it is waited for."""
        await trio.sleep(1)
        self.crowding = 0

    async def _sleep(self) -> bool:
        self.slept += 1
        os.write(self.pipe[1], b"r")
        return True

    async def request(self, *, after_looks: int | None = None) -> bool:
        """Wait for a request that comes at that look at the clock, or only to a sleeper; whether it came to one."""
        self.clock.looks, self.clock.comes_at = 0, after_looks
        before = self.slept
        assert await self.polled.wait()
        os.read(self.pipe[0], 1)
        return self.slept > before


@pytest.fixture
def waiter(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> Waiter:
    clock = Clock(pipe[1])
    monkeypatch.setattr(session, "perf_counter_ns", clock)
    return Waiter(pipe, clock)


async def test_it_is_tried_after_some_waits_and_goes_on_while_it_succeeds(waiter: Waiter) -> None:
    for _ in range(limits.FUSE_SPIN_REST):
        assert await waiter.request()
        assert waiter.clock.looks == 1, "at the start of the burst, and not to spin"
    for _ in range(limits.FUSE_POLL_BURST - 1):
        assert not await waiter.request(after_looks=20)
    assert await waiter.request(after_looks=20), "a burst ends at the loop's own wait"
    assert not await waiter.request(after_looks=20)


async def test_a_burst_of_long_requests_ends_by_time(waiter: Waiter) -> None:
    """Between large writes the loop has other tasks to do: the commit, above all, that frees the ring for them."""

    async def sleeps() -> bool:
        os.write(waiter.pipe[1], b"r")
        before = waiter.slept
        assert await waiter.polled.wait()
        os.read(waiter.pipe[0], 1)
        return waiter.slept > before

    assert not await sleeps()
    waiter.clock.now += limits.FUSE_BURST_NS // 2
    assert not await sleeps()
    waiter.clock.now += limits.FUSE_BURST_NS // 2
    assert await sleeps(), "though a request was there"
    assert not await sleeps()


@pytest.mark.parametrize("another", [False, True])
async def test_after_a_long_request_it_is_told_whether_there_was_another(waiter: Waiter, another: bool) -> None:
    """Commands wait to hear that there is none, and the sleep after a burst may have no end."""
    os.write(waiter.pipe[1], b"r")
    await waiter.request()
    waiter.clock.now += limits.FUSE_BURST_NS
    if another:
        os.write(waiter.pipe[1], b"r")
    await waiter.request()
    assert waiter.told == [(1, not another)]


async def test_every_request_is_counted(waiter: Waiter) -> None:
    for number in range(2 * limits.FUSE_SPIN_REST):
        await waiter.request(after_looks=number % 2 and 2)
    assert waiter.bell.requests == 2 * limits.FUSE_SPIN_REST


async def test_one_that_was_for_nothing_is_not_repeated_soon(waiter: Waiter) -> None:
    for _ in range(limits.FUSE_SPIN_REST):
        await waiter.request()
    assert await waiter.request(after_looks=1000)
    assert waiter.clock.looks <= limits.FUSE_SPIN_NS // 1000 + 2
    for _ in range(limits.FUSE_SPIN_REST):
        assert await waiter.request(after_looks=5)
        assert waiter.clock.looks == 1, "at the start of the burst, and not to spin"
    assert not await waiter.request(after_looks=5)


async def test_it_is_left_while_the_bell_is_expected(waiter: Waiter) -> None:
    for _ in range(limits.FUSE_SPIN_REST):
        await waiter.request()
    waiter.bell.expected = 1
    os.write(waiter.pipe[1], b"r")
    assert await waiter.polled.wait()
    os.read(waiter.pipe[0], 1)
    waiter.clock.looks = 0
    os.eventfd_write(waiter.bell.fd, 1)
    waiter.bell._ended.append((lambda error: None, None))
    assert await waiter.request()
    assert waiter.clock.looks == 1, "at the start of the burst, and not to spin"


async def test_nothing_is_read_while_too_much_waits_for_room(waiter: Waiter, autojump_clock: object) -> None:
    os.write(waiter.pipe[1], b"r")
    waiter.crowding = limits.CROWD_BYTES
    before = trio.current_time()
    assert await waiter.polled.wait()
    assert trio.current_time() == before
    waiter.crowding = limits.CROWD_BYTES + 1
    assert await waiter.polled.wait()
    assert trio.current_time() > before
