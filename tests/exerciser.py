"""Random operations on one image file, with an oracle that is kept outside the mount.

    python -m tests.exerciser run FILE --log LOG [--mode direct|direct512|buffered|fsync] [--seconds S] [--seed N] ...
    python -m tests.exerciser verify FILE --log LOG [--after acknowledged|synced]

The file reads as zeros at first. It is cut into units (4096 bytes, or 512 in mode direct512). Every unit that is
written carries (seed, unit, sequence number) over its whole length, so that a torn, misplaced or stale unit is seen.
Issue and acknowledgement of each write are appended to LOG, one system call a line, before and after the call: the log
survives a SIGKILL of this process.

What a unit may hold: a write that no other write of it followed, that is, was issued after the first was acknowledged
and is itself acknowledged. So the last acknowledged write is legal, and one that was in flight over it, and nothing
else. After a power cut (`--after synced`) only writes that an acknowledged fsync covers can supersede.

`run` checks each of its reads against the same rule, and ends with 0; 1 and a message is an I/O error or a difference.
Times in the log are CLOCK_MONOTONIC in ns, so that a test can compare them with the moments of its kills.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import mmap
import os
import random
import struct
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

HEADER = struct.Struct("<8sQQQ")
MAGIC = b"silo-exr"
REQUEST_MAX = 1 << 20
OPEN = 1 << 62  # the acknowledgement counter of a write that has none
FULL_PAUSE_S = 0.05
PUNCH = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, fallocate(2)


@dataclass(slots=True)
class Write:
    """One write or zeroing of a run of units, with its positions in the order of events.

    `ended` is where it can no longer take effect: its acknowledgement, or the end of the run that it was lost in.
    """

    sequence: int
    zeroes: bool
    issued: int
    acknowledged: int = OPEN
    ended: int = OPEN


class Difference(AssertionError):
    """A unit holds what no legal order of the writes explains."""


def pattern(seed: int, unit: int, sequence: int, unit_bytes: int) -> bytes:
    return HEADER.pack(MAGIC, seed, unit, sequence) * (unit_bytes // HEADER.size)


@dataclass
class Oracle:
    """What each unit may hold. Not thread safe: callers hold a lock."""

    seed: int
    unit_bytes: int
    counter: int = 0
    sequence: int = 0
    histories: dict[int, list[Write]] = field(default_factory=dict)
    reads: dict[int, int] = field(default_factory=dict)  # key of a read under way -> its start

    def issue(self, first: int, count: int, *, zeroes: bool) -> Write:
        self.counter += 1
        self.sequence += 1
        write = Write(self.sequence, zeroes, self.counter)
        self.note(write, first, count)
        return write

    def note(self, write: Write, first: int, count: int) -> None:
        for unit in range(first, first + count):
            history = self.histories.setdefault(unit, [Write(0, True, 0, 0, 0)])
            history.append(write)
            if len(history) > 8:
                self.histories[unit] = self._live(history)

    def acknowledge(self, write: Write) -> None:
        self.counter += 1
        write.acknowledged = write.ended = self.counter

    def begin_read(self, key: int) -> int:
        self.counter += 1
        self.reads[key] = self.counter
        return self.counter

    def end_read(self, key: int, first: int, data: memoryview) -> None:
        """Check what a read returned that began at `begin_read(key)` and ends now."""
        started = self.reads.pop(key)
        for at in range(0, len(data), self.unit_bytes):
            self.check(first + at // self.unit_bytes, data[at : at + self.unit_bytes], started)

    def check(self, unit: int, data: memoryview, started: int = OPEN - 1, *, synced: int = OPEN) -> int:
        """The number of the write that `data` shows, read no earlier than `started`; Difference when none explains it.

        `synced` bounds what can supersede: writes acknowledged before that point in the order of events.
        """
        history = self.histories.get(unit, [Write(0, True, 0, 0, 0)])
        found = self._sequence_of(unit, data)
        for write in history:
            if found != (0 if write.zeroes else write.sequence):
                continue
            bound = min(started, synced)
            if not any(write.ended < later.issued and later.acknowledged < bound for later in history):
                return found
        known = ", ".join(f"{w.sequence}{'z' if w.zeroes else ''}[{w.issued}-{w.ended}]" for w in history)
        raise Difference(f"unit {unit} holds write {found}, read from {started} on; legal are among {known}")

    def _sequence_of(self, unit: int, data: memoryview) -> int:
        content = bytes(data)
        if not any(content):
            return 0
        magic, seed, number, sequence = HEADER.unpack_from(content)
        if (magic, seed, number) != (MAGIC, self.seed, unit):
            raise Difference(f"unit {unit} holds foreign data: {magic!r}, seed {seed}, unit {number}, write {sequence}")
        if content != pattern(seed, unit, sequence, self.unit_bytes):
            raise Difference(f"unit {unit} is torn: it starts as write {sequence} and goes on otherwise")
        return int(sequence)

    def _live(self, history: list[Write]) -> list[Write]:
        """Without the writes that were superseded before the oldest read under way began."""
        oldest = min(self.reads.values(), default=self.counter + 1)
        followed = max((w.issued for w in history if w.acknowledged < oldest), default=0)
        return [w for w in history if w.ended >= followed]


class Log:
    """Lines of events; the reader below rebuilds an oracle from them."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def line(self, *fields: object) -> None:
        os.write(self._fd, (" ".join(map(str, fields)) + "\n").encode())

    def close(self) -> None:
        os.close(self._fd)


def _lines(path: Path) -> Iterator[list[str]]:
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):  # the last one may have been cut by a kill
            yield line.split()


def completions(path: Path) -> list[int]:
    """The moments (CLOCK_MONOTONIC, ns) at which operations of a log completed, in order."""
    return sorted(int(line[-1]) for line in _lines(path) if line[0] in "ARF")


def pauses(completed: Sequence[int], kills: Sequence[int]) -> list[float]:
    """For each kill (ns), the seconds from it to the end of the longest gap between completions that followed it.

    A reply that was on its way at the kill does not end a pause, so the gap counts, not the next completion.
    """
    found = []
    for kill, until in pairwise([*kills, kills[-1] + 10**10]):
        later = [at for at in completed if kill < at < until]
        gaps = [(after - before, after) for before, after in pairwise([kill, *later])]
        if not gaps:
            raise Difference("nothing completed between a kill and the next")
        found.append((max(gaps)[1] - kill) / 1e9)
    return found


def load(log: Path) -> tuple[Oracle, int, int, int]:
    """The oracle at the end of a log, the bytes that it is about (offset, size), and the point in the order of events
    before which all that was acknowledged was synced."""
    lines = _lines(log)
    header = next(lines)
    oracle = Oracle(int(header[1]), int(header[2]))
    writes: dict[int, Write] = {}
    synced = 0
    for kind, *rest in lines:
        values = [int(text) for text in rest]
        if kind in "WZ":
            oracle.counter, oracle.sequence, first, count = values
            write = writes[oracle.sequence] = Write(oracle.sequence, kind == "Z", oracle.counter)
            for unit in range(first, first + count):
                oracle.histories.setdefault(unit, [Write(0, True, 0, 0, 0)]).append(write)
        elif kind == "A":
            oracle.counter, sequence, _ = values
            written = writes.pop(sequence)
            written.acknowledged = written.ended = oracle.counter
        elif kind == "C":
            oracle.counter = values[0]
            for write in writes.values():
                write.ended = oracle.counter
            writes.clear()
        elif kind == "F":
            synced = max(synced, values[0])
    return oracle, int(header[3]), int(header[4]), synced


def verify(image: Path, log: Path, *, after: str = "acknowledged") -> int:
    """Compare every unit of `image` with the log; returns how many units had been written. Raises Difference.

    after: what must not be lost: what was `acknowledged`, or what was `synced`. That all units together are a prefix
    of the writes is what the stories of tests/crash look at.
    """
    oracle, offset, size, synced = load(log)
    if after != "synced":
        synced = OPEN
    with image.open("rb") as file:
        file.seek(offset)
        for start in range(offset, offset + size, REQUEST_MAX):
            data = memoryview(file.read(min(REQUEST_MAX, offset + size - start)))
            if len(data) != min(REQUEST_MAX, offset + size - start):
                raise Difference(f"the file ends at {start + len(data)} and not at {offset + size}")
            for at in range(0, len(data), oracle.unit_bytes):
                unit = (start + at) // oracle.unit_bytes
                oracle.check(unit, data[at : at + oracle.unit_bytes], synced=synced)
    return len(oracle.histories)


class Run:
    """The threads that work on one file until the time or the number of operations is up."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.unit_bytes = 512 if options.mode == "direct512" else 4096
        self.size = options.size or options.file.stat().st_size - options.offset
        self.oracle = Oracle(options.seed, self.unit_bytes)
        self.lock = threading.Lock()
        if options.go_on:
            self.oracle, options.offset, self.size, _ = load(options.log)
            assert self.oracle.unit_bytes == self.unit_bytes, "a run goes on in the mode that it began in"
            os.truncate(options.log, options.log.read_bytes().rindex(b"\n") + 1)  # a kill may have cut a line
            self.log = Log(options.log)
            self.oracle.counter += 1
            self.log.line("C", self.oracle.counter)
            for history in self.oracle.histories.values():
                for write in history:
                    write.ended = min(write.ended, self.oracle.counter)
        else:
            options.log.unlink(missing_ok=True)
            self.log = Log(options.log)
            self.log.line("H", options.seed, self.unit_bytes, options.offset, self.size)
        self.done = 0
        self.failure: str | None = None
        self.ended = False
        self.deadline = time.monotonic() + options.seconds
        try:
            self.fds = [self._open(options.file)]  # the last one is in use
        except OSError as error:
            if error.errno != errno.ESTALE or not options.then:
                raise
            self.fds = [self._open(options.then)]
            options.then = None

    def work(self, number: int) -> None:
        rng = random.Random(f"{self.options.seed}/{number}/{self.oracle.sequence}")
        buffer = memoryview(mmap.mmap(-1, REQUEST_MAX))
        while self._next():
            used = self.fds[-1]
            try:
                self._operation(rng, number, buffer)
            except OSError as error:
                if error.errno == errno.ENOSPC and self.options.patient:
                    time.sleep(FULL_PAUSE_S)  # it stays in the log as never acknowledged
                elif error.errno == errno.ESTALE and self.options.then and used == self.fds[0]:
                    self._move()
                else:
                    expected = error.errno == errno.ESTALE and self.options.until_stale
                    self._end(None if expected else f"thread {number}: {error!r}")
            except Difference as difference:
                self._end(str(difference))

    def close(self) -> None:
        self.log.close()
        for fd in self.fds:
            os.close(fd)

    def _open(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | (os.O_DIRECT if self.options.mode.startswith("direct") else 0))

    def _end(self, failure: str | None) -> None:
        with self.lock:
            self.ended = True
            self.failure = self.failure or failure

    def _move(self) -> None:
        """Go on at the volume's new home; what ESTALE refused stays in the log as never acknowledged."""
        with self.lock:
            if len(self.fds) == 1:
                self.fds.append(self._open(self.options.then))
                self.log.line("M", time.monotonic_ns())

    def _next(self) -> bool:
        with self.lock:
            if self.ended or self.done >= self.options.operations or time.monotonic() > self.deadline:
                return False
            self.done += 1
            return True

    def _operation(self, rng: random.Random, number: int, buffer: memoryview) -> None:
        count = rng.choice((1, 1, 1, 1, 2, 3, 8, 16, rng.randint(1, REQUEST_MAX // self.unit_bytes)))
        count = min(count, self.size // self.unit_bytes)
        first = (self.options.offset + rng.randrange(0, self.size - count * self.unit_bytes + 1)) // self.unit_bytes
        dice = rng.random()
        if dice < self.options.writes:
            self._write(first, count, buffer)
        elif dice < self.options.writes + 0.02 and self.options.punch:
            self._punch(first, count)
        elif dice < self.options.writes + 0.04:
            self._sync()
        else:
            self._read(number, first, count, buffer)

    def _write(self, first: int, count: int, buffer: memoryview) -> None:
        with self.lock:
            write = self.oracle.issue(first, count, zeroes=False)
            self.log.line("W", write.issued, write.sequence, first, count)
        length = count * self.unit_bytes
        buffer[:length] = b"".join(
            pattern(self.oracle.seed, unit, write.sequence, self.unit_bytes) for unit in range(first, first + count)
        )
        done = os.pwritev(self.fds[-1], [buffer[:length]], first * self.unit_bytes)
        if done != length:
            raise Difference(f"a write of {length} bytes at unit {first} stored only {done}")
        self._acknowledge(write)
        if self.options.mode == "fsync":
            self._sync()

    def _punch(self, first: int, count: int) -> None:
        with self.lock:
            write = self.oracle.issue(first, count, zeroes=True)
            self.log.line("Z", write.issued, write.sequence, first, count)
        if punch_hole(self.fds[-1], first * self.unit_bytes, count * self.unit_bytes):
            self._acknowledge(write)
        else:  # not supported: it never happened, and is legal only as one in flight
            self.options.punch = False

    def _acknowledge(self, write: Write) -> None:
        with self.lock:
            self.oracle.acknowledge(write)
            self.log.line("A", write.acknowledged, write.sequence, time.monotonic_ns())

    def _sync(self) -> None:
        with self.lock:
            started = self.oracle.counter + 1
        os.fdatasync(self.fds[-1])
        with self.lock:
            self.log.line("F", started, time.monotonic_ns())

    def _read(self, number: int, first: int, count: int, buffer: memoryview) -> None:
        length = count * self.unit_bytes
        with self.lock:
            self.oracle.begin_read(number)
        done = os.preadv(self.fds[-1], [buffer[:length]], first * self.unit_bytes)
        if done != length:
            raise Difference(f"a read of {length} bytes at unit {first} returned {done}")
        with self.lock:
            self.oracle.end_read(number, first, buffer[:length])
            self.log.line("R", time.monotonic_ns())


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """fallocate(PUNCH_HOLE); False when the file system has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    if libc.fallocate(fd, PUNCH, offset, length) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EOPNOTSUPP, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code))


def run(options: argparse.Namespace) -> int:
    work = Run(options)
    threads = [threading.Thread(target=work.work, args=(number,)) for number in range(options.depth)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    work.close()
    took = time.monotonic() - started
    print(f"{work.done} operations in {took:.1f} s, {work.done / took:.0f}/s, seed {options.seed}, mode {options.mode}")
    if work.failure:
        print(f"FAILED: {work.failure}", file=sys.stderr)
        return 1
    return 0


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="random operations with an oracle")
    verbs = parser.add_subparsers(dest="verb", required=True)
    runner = verbs.add_parser("run")
    runner.add_argument("file", type=Path)
    runner.add_argument("--log", type=Path, required=True)
    runner.add_argument("--mode", choices=("direct", "direct512", "buffered", "fsync"), default="direct")
    runner.add_argument("--seconds", type=float, default=1e9)
    runner.add_argument("--operations", type=int, default=1 << 60)
    runner.add_argument("--seed", type=int, default=1)
    runner.add_argument("--depth", type=int, default=4, help="threads, one operation each")
    runner.add_argument("--size", type=int, default=0, help="bytes to use; up to the end of the file by default")
    runner.add_argument("--writes", type=float, default=0.6, help="fraction of operations that write")
    runner.add_argument("--no-punch", dest="punch", action="store_false")
    runner.add_argument("--until-stale", action="store_true", help="ESTALE is no fault, only the end")
    runner.add_argument("--patient", action="store_true", help="ENOSPC is no fault: go on with something else")
    runner.add_argument("--then", type=Path, help="where to go on when FILE answers ESTALE: the volume's new home")
    runner.add_argument("--offset", type=int, default=0, help="bytes of the file to leave alone at its start")
    runner.add_argument("--continue", dest="go_on", action="store_true", help="add to LOG, over what it says is there")
    verifier = verbs.add_parser("verify")
    verifier.add_argument("file", type=Path)
    verifier.add_argument("--log", type=Path, required=True)
    verifier.add_argument("--after", choices=("acknowledged", "synced"), default="acknowledged")
    options = parser.parse_args(arguments if arguments is None else list(arguments))
    if options.verb == "run":
        return run(options)
    try:
        units = verify(options.file, options.log, after=options.after)
    except Difference as difference:
        print(f"DIFFERENCE: {difference}", file=sys.stderr)
        return 1
    print(f"{units} written units are as the log says")
    return 0


if __name__ == "__main__":
    sys.exit(main())
