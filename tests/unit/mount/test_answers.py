from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from struct import Struct

import pytest
import trio
from pyfuse3 import FUSEError
from trio.testing import wait_all_tasks_blocked

from silofs.mount import raw
from silofs.mount.answers import Answers

BODIES = {
    raw.SETLK: Struct("=QQQQIIII").pack(7, 0xFFFF_FFFF_FFFF_FFFF, 100, (1 << 63) - 1, fcntl.F_WRLCK, 55, 0, 0),
    raw.FALLOCATE: Struct("=QQQII").pack(7, 4096, 8192, 3, 0),
    raw.LSEEK: Struct("=QQII").pack(7, 4096, os.SEEK_HOLE, 0),
    raw.COPY_FILE_RANGE: Struct("=7Q").pack(7, 1, 22, 9, 2, 3, 0),
    raw.INTERRUPT: Struct("=Q").pack(8),
}


def message(opcode: int, unique: int, body: bytes) -> bytes:
    return raw.IN_HEADER.pack(raw.IN_HEADER.size + len(body), opcode, unique, 22, 0, 0, 1, 0, 0) + body


def test_requests_are_read_as_the_kernel_writes_them() -> None:
    lock = raw.Lock(7, (1 << 64) - 1, 100, (1 << 63) - 1, fcntl.F_WRLCK, 55)
    expected = {
        raw.GETLK: (BODIES[raw.SETLK], raw.GetLock(lock)),
        raw.SETLK: (BODIES[raw.SETLK], raw.SetLock(lock, False)),
        raw.SETLKW: (BODIES[raw.SETLK], raw.SetLock(lock, True)),
        raw.FALLOCATE: (BODIES[raw.FALLOCATE], raw.Allocate(7, 4096, 8192, 3)),
        raw.LSEEK: (BODIES[raw.LSEEK], raw.Seek(7, 4096, os.SEEK_HOLE)),
        raw.COPY_FILE_RANGE: (BODIES[raw.COPY_FILE_RANGE], raw.Copy(7, 1, 9, 2, 3)),
        raw.INTERRUPT: (BODIES[raw.INTERRUPT], raw.Interrupt(8)),
    }
    for opcode, (body, request) in expected.items():
        assert raw.parse(message(opcode, 1 << 63 | 5, body)) == (1 << 63 | 5, request)
        assert raw.parse(message(opcode, 5, body + b"later fields")) == (5, request)
        for cut in range(len(body) - 8):
            assert raw.parse(message(opcode, 5, body[:cut])) is None
    assert raw.parse(message(1, 5, bytes(64))) is None and raw.parse(b"") is None


class Kernel:
    """The other end: what is answered, and a handler that tests hold up and let go."""

    def __init__(self) -> None:
        read, self.write = os.pipe2(os.O_NONBLOCK)
        self.read = read
        self.handled: list[raw.Request] = []
        self.gate = trio.Event()
        self.answers = Answers(self.write, self.handle)

    async def handle(self, request: raw.Request) -> bytes:
        self.handled.append(request)
        await self.gate.wait()
        if isinstance(request, raw.Seek):
            raise FUSEError(errno.ENXIO)
        return b"body"

    def send(self, opcode: int, unique: int, body: bytes | None = None) -> bool:
        return self.answers.take(message(opcode, unique, body or BODIES[opcode]))

    def lock_and_wait(self, unique: int) -> bool:
        return self.answers.take(message(raw.SETLKW, unique, BODIES[raw.SETLK]))

    def interrupt(self, unique: int) -> bool:
        return self.send(raw.INTERRUPT, 99, Struct("=Q").pack(unique))

    def received(self) -> list[tuple[int, int, bytes]]:
        """(unique, errno, body) of the replies so far."""
        try:
            data = os.read(self.read, 4096)
        except BlockingIOError:
            return []
        found = []
        while data:
            length, error, unique = raw.OUT_HEADER.unpack_from(data)
            found.append((unique, -error, data[raw.OUT_HEADER.size : length]))
            data = data[length:]
        return sorted(found)


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    yield kernel
    os.close(kernel.read)
    os.close(kernel.write)


async def test_each_request_is_answered_with_its_number(kernel: Kernel) -> None:
    assert not kernel.send(raw.FALLOCATE, 2)  # nobody serves
    async with kernel.answers.serving():
        assert kernel.send(raw.FALLOCATE, 2) and kernel.send(raw.LSEEK, 4)
        assert not kernel.send(1, 6, bytes(64))
        await wait_all_tasks_blocked()
        assert kernel.received() == []
        kernel.gate.set()
    assert kernel.received() == [(2, 0, b"body"), (4, errno.ENXIO, b"")]


async def test_who_waits_for_a_lock_can_be_interrupted_and_nobody_else(kernel: Kernel) -> None:
    async with kernel.answers.serving():
        assert kernel.lock_and_wait(2) and kernel.send(raw.FALLOCATE, 4)
        await wait_all_tasks_blocked()
        assert kernel.interrupt(2) and kernel.interrupt(4) and not kernel.interrupt(6)
        await wait_all_tasks_blocked()
        assert kernel.received() == [(2, errno.EINTR, b"")]
        assert not kernel.interrupt(2)  # it is libfuse's, for all that is known here
        assert kernel.lock_and_wait(8) and kernel.interrupt(8)  # before its task has begun
        await wait_all_tasks_blocked()
        assert kernel.received() == [(8, errno.EINTR, b"")]
        kernel.gate.set()
    assert kernel.received() == [(4, 0, b"body")]


async def test_at_the_end_only_those_that_wait_for_locks_are_left_unanswered(kernel: Kernel) -> None:
    async with trio.open_nursery() as nursery:
        async with kernel.answers.serving():
            assert kernel.lock_and_wait(2) and kernel.send(raw.FALLOCATE, 4)
            await wait_all_tasks_blocked()

            async def finish() -> None:
                await wait_all_tasks_blocked()
                kernel.gate.set()

            nursery.start_soon(finish)
        assert kernel.received() == [(4, 0, b"body")]
    assert not kernel.send(raw.FALLOCATE, 6)


async def test_a_request_whose_process_is_gone_is_no_fault(kernel: Kernel, caplog: pytest.LogCaptureFixture) -> None:
    kernel.gate.set()
    full = Answers(os.open("/dev/full", os.O_WRONLY), kernel.handle)
    async with full.serving():
        full.take(message(raw.FALLOCATE, 2, BODIES[raw.FALLOCATE]))
    assert "could not be answered" in caplog.text  # another error is
    os.close(full._fd)
