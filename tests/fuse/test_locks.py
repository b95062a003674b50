"""Locks of open files, as QEMU takes them on its images (F_OFD_SETLK, fcntl(2))."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fuse.mounts import Mount, wait
from tests.fuse.test_files import fails

pytestmark = pytest.mark.fuse
FLOCK = struct.Struct("hhqqi4x")
GET, SET, WAIT = 36, 37, 38  # F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW
READ, WRITE, UNLOCK = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK

LOCKER = """
import fcntl, os, signal, struct, sys
def stop(*_):
    raise InterruptedError(4, "alarm")  # else Python calls fcntl(2) again after EINTR
signal.signal(signal.SIGALRM, stop)
fd = os.open(sys.argv[1], os.O_RDWR)
print("ready", flush=True)
try:
    fcntl.fcntl(fd, int(sys.argv[2]), struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 100, 1, 0))
    print("locked", flush=True)
except OSError as error:
    print(error.errno, flush=True)
sys.stdin.read()
"""


def lock(fd: int, kind: int, start: int, length: int, command: int = SET) -> tuple[int, int, int, int, int]:
    """(type, whence, start, length, pid) as the call leaves it."""
    flock = fcntl.fcntl(fd, command, FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    found: tuple[int, int, int, int, int] = FLOCK.unpack(flock)
    return found


@pytest.fixture
def opened(shared: Mount, request: pytest.FixtureRequest) -> Iterator[Callable[[], int]]:
    path = shared.create(request.node.name.replace("[", "-").replace("]", ""), 1 << 20)
    with opener(path) as make:
        yield make


@contextmanager
def opener(path: Path) -> Iterator[Callable[[], int]]:
    """Opens the same file anew each time it is called."""
    fds: list[int] = []

    def make() -> int:
        fds.append(os.open(path, os.O_RDWR))
        return fds[-1]

    yield make
    for fd in fds:
        try:
            os.close(fd)
        except OSError as error:
            assert error.errno == errno.EBADF  # the test has closed it


@contextmanager
def locker(path: Path, command: int) -> Iterator[subprocess.Popen[str]]:
    """Another process that locks byte 100 for writing and then lives on."""
    child = subprocess.Popen(
        [sys.executable, "-c", LOCKER, path, str(command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.kill()
        child.communicate()


def name_of(fd: int) -> Path:
    return Path(f"/proc/self/fd/{fd}").readlink()


def said(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def test_locks_are_a_capability(shared: Mount) -> None:
    assert "locks" in shared.ask("status")["capabilities"]


def test_ranges_of_two_open_files_conflict_where_they_overlap(opened: Callable[[], int]) -> None:
    one, two = opened(), opened()
    lock(one, WRITE, 100, 2)
    lock(one, READ, 200, 2)
    fails(errno.EAGAIN, lock, two, WRITE, 101, 1)
    fails(errno.EAGAIN, lock, two, READ, 0, 0)  # to the end
    fails(errno.EAGAIN, lock, two, WRITE, 201, 1)
    lock(two, READ, 200, 5)
    lock(two, WRITE, 102, 98)
    lock(one, WRITE, 100, 1)  # its own
    assert lock(two, WRITE, 0, 150, GET)[0:4] == (WRITE, os.SEEK_SET, 100, 2)
    assert lock(one, READ, 200, 1, GET)[0] == UNLOCK
    lock(one, UNLOCK, 101, 1)
    lock(two, WRITE, 101, 1)
    fails(errno.EAGAIN, lock, two, WRITE, 100, 1)


def test_the_locks_of_a_process_are_told_with_its_pid(shared: Mount, opened: Callable[[], int]) -> None:
    one = opened()
    path = name_of(one)
    with locker(path, fcntl.F_SETLK) as child:
        assert said(child) == "locked"
        assert lock(one, WRITE, 0, 0, fcntl.F_GETLK)[2:] == (100, 1, child.pid)
        fails(errno.EAGAIN, lock, one, READ, 0, 0)


def test_locks_go_when_their_file_is_closed(opened: Callable[[], int]) -> None:
    one, two = opened(), opened()
    lock(one, WRITE, 0, 0)
    copy = os.dup(one)
    os.close(one)
    fails(errno.EAGAIN, lock, two, READ, 5, 1)
    os.close(copy)
    wait(lambda: lock(two, WRITE, 0, 0, GET)[0] == UNLOCK, "the RELEASE")
    lock(two, WRITE, 0, 0)


def test_locks_go_with_a_process_that_is_killed(opened: Callable[[], int]) -> None:
    one = opened()
    with locker(name_of(one), SET) as child:
        assert said(child) == "locked"
        fails(errno.EAGAIN, lock, one, WRITE, 100, 1)
        child.kill()
        wait(lambda: lock(one, WRITE, 0, 0, GET)[0] == UNLOCK, "the RELEASE")


def test_who_waits_gets_the_lock_when_it_is_free(opened: Callable[[], int]) -> None:
    one, two = opened(), opened()
    lock(one, WRITE, 0, 10)
    waiter = threading.Thread(target=lock, args=(two, WRITE, 5, 1, WAIT))
    waiter.start()
    lock(one, UNLOCK, 0, 5)
    waiter.join(0.05)
    assert waiter.is_alive()
    lock(one, UNLOCK, 5, 1)
    waiter.join(10)
    assert not waiter.is_alive()
    fails(errno.EAGAIN, lock, one, READ, 5, 1)


def test_a_signal_ends_the_waiting(shared: Mount, opened: Callable[[], int]) -> None:
    one = opened()
    path = name_of(one)
    lock(one, WRITE, 0, 0)
    with locker(path, WAIT) as child, locker(path, fcntl.F_SETLKW) as killed:
        wait(lambda: is_waiting(child.pid) and is_waiting(killed.pid), "both wait")
        killed.kill()
        killed.wait(10)
        os.kill(child.pid, signal.SIGALRM)
        assert said(child) == str(errno.EINTR)
        lock(one, UNLOCK, 0, 0)
        assert lock(one, WRITE, 0, 0, GET)[0] == UNLOCK  # nobody got it meanwhile
    assert shared.ask("status")["handler_bugs"] == 0


def is_waiting(pid: int) -> bool:
    """In fcntl(2), by the number of the system call that it is in (proc(5))."""
    return Path(f"/proc/{pid}/syscall").read_text().split()[0] == "72"


def test_locks_outlive_the_daemon_and_so_does_the_waiting(mount: Mount) -> None:
    with opener(mount.create("vm1", 1 << 20)) as opened:
        one, two, three = opened(), opened(), opened()
        lock(one, WRITE, 100, 1)
        lock(two, READ, 200, 1)
        waiter = threading.Thread(target=lock, args=(three, WRITE, 100, 1, WAIT))
        waiter.start()
        mount.wait_served(not_by=mount.kill_daemon())
        fails(errno.EAGAIN, lock, two, WRITE, 100, 1)
        fails(errno.EAGAIN, lock, one, WRITE, 200, 1)
        began = time.monotonic()
        mount.silofs("restart")
        mount.wait_served(not_by=0)
        assert time.monotonic() - began < 8  # who waits for a lock does not hold up a drain
        fails(errno.EAGAIN, lock, two, WRITE, 100, 1)
        assert waiter.is_alive()
        lock(one, UNLOCK, 100, 1)
        waiter.join(10)
        assert not waiter.is_alive()
        fails(errno.EAGAIN, lock, one, WRITE, 100, 1)


class Rivals:
    """Threads that lock ranges of one file, each through a file of its own, and look whether they are alone in them."""

    def __init__(self, path: Path, count: int) -> None:
        self._path = path
        self._stopped = threading.Event()
        self._known = threading.Lock()
        self._holders: dict[int, dict[int, int]] = {byte: {} for byte in range(7)}
        self.done = 0
        self.faults: list[str] = []
        self.threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self.threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in self.threads), "somebody waits for a lock that is free"

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        fd = os.open(self._path, os.O_RDWR)
        while not self._stopped.is_set() and not self.faults:
            start, kind = rng.randrange(6), rng.choice((WRITE, WRITE, READ))
            length = rng.choice((1, 1, 2))
            try:
                lock(fd, kind, start, length, rng.choice((SET, WAIT)))
            except BlockingIOError:
                continue
            except OSError as error:
                self.faults.append(str(error))
                break
            self._enter(number, range(start, start + length), kind)
            time.sleep(rng.random() * 0.003)
            self._leave(number, range(start, start + length))
            if rng.random() < 0.1:
                os.close(fd)
                fd = os.open(self._path, os.O_RDWR)
            else:
                lock(fd, UNLOCK, start, length)
            self.done += 1
        os.close(fd)

    def _enter(self, number: int, area: range, kind: int) -> None:
        with self._known:
            for byte in area:
                for other, its in self._holders[byte].items():
                    if WRITE in (kind, its):
                        self.faults.append(f"byte {byte} is locked by {other} and {number}")
                self._holders[byte][number] = kind

    def _leave(self, number: int, area: range) -> None:
        with self._known:
            for byte in area:
                del self._holders[byte][number]


def test_no_two_have_a_lock_that_excludes_the_other_whatever_is_killed(mount: Mount) -> None:
    rivals = Rivals(mount.create("vm1", 1 << 20), 6)
    try:
        for _ in range(5):
            goal = rivals.done + 100
            wait(lambda goal=goal: rivals.faults or rivals.done > goal, "locks are taken")  # type: ignore[misc]
            mount.wait_served(not_by=mount.kill_daemon())
    finally:
        rivals.stop()
    assert not rivals.faults, rivals.faults


@pytest.mark.qemu
def test_a_second_user_of_a_running_image_is_refused(opened: Callable[[], int]) -> None:
    one = opened()
    path = name_of(one)
    command = ["qemu-io", "-f", "raw", "-c", "write 0 4096", path]
    machine = ["-machine", "pc", "-S", "-nodefaults", "-display", "none"]
    drive = f"file={path},if=virtio,format=raw,cache=none"
    with subprocess.Popen(["qemu-system-x86_64", *machine, "-drive", drive], stdin=subprocess.DEVNULL) as held:
        try:
            wait(lambda: lock(one, WRITE, 201, 1, GET)[0] == READ, "it shares its disk with no other writer")
            second = subprocess.run(command, capture_output=True, text=True, check=False)
            assert second.returncode != 0 and 'Failed to get "write" lock' in second.stdout + second.stderr
        finally:
            held.kill()
    wait(lambda: subprocess.run(command, capture_output=True, check=False).returncode == 0, "its locks are gone")
