"""Commit time of LMDB against free pages, without a disk of that size: `scripts/bench free`.

The file is filled with values as large as the store's objects, all zeros, and the zeros are punched out of it, so that
100 GiB take about 4 of a tmpfs. Then they are deleted in bounded transactions, as the store removes layers, and between
that commits of one object and of a whole commit's worth are timed.
"""

from __future__ import annotations

import ctypes
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import lmdb

from silofs.blocks import PAGE
from silofs.layers.schema import ENGINE_MAJOR, KEY, OBJECT_BYTES
from silofs.limits import COMMIT_BYTES, GIB, STEP_LEAVES

OBJECT_PAGES = 32
FILL = 4096  # objects in a transaction: 512 MiB
FREED = STEP_LEAVES * 512 // 31  # objects that a transaction gives up at most
PUNCH = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
LOOK = 1 << 20
ROUNDS = 20

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def measure(directory: Path, gib: int, *, at_random: bool) -> Iterator[str]:
    """Lines to print. `at_random`: half of the objects are deleted, in any order."""
    environment = lmdb.Environment(str(directory), map_size=4 * gib * GIB, max_dbs=2, lib_version=ENGINE_MAJOR)
    objects, leaves = environment.open_db(b"object"), environment.open_db(b"leaf")
    value = bytes(OBJECT_BYTES)
    file = directory / "data.mdb"
    count = gib * GIB // (OBJECT_PAGES * PAGE)
    end = 0
    for first in range(0, count, FILL):
        with environment.begin(write=True) as txn:
            for number in range(first, min(count, first + FILL)):
                txn.put(KEY.pack(number), value, db=objects, append=True)
        end = punch_zeros(file, end)
    fresh = count

    def commits(many: int) -> str:
        nonlocal fresh
        times, before = [], bytes_written()
        for _ in range(ROUNDS):
            started = time.perf_counter()
            with environment.begin(write=True) as txn:
                for _ in range(many):
                    txn.put(KEY.pack(fresh), value, db=objects, append=True)
                    fresh += 1
                for _ in range(8):
                    txn.put(KEY.pack(random.randrange(1000)), bytes(3900), db=leaves)
            times.append(time.perf_counter() - started)
        times.sort()
        written = (bytes_written() - before) // ROUNDS // 1024
        return f"{many} objects p50 {times[ROUNDS // 2] * 1e3:.1f} max {times[-1] * 1e3:.1f} ms, {written} KiB written"

    def line(free: int) -> str:
        figures = "; ".join(commits(many) for many in (1, COMMIT_BYTES // OBJECT_BYTES))
        return f"{free * OBJECT_PAGES * PAGE / GIB:.1f} GiB free: {figures}; file {file.stat().st_size / GIB:.1f} GiB"

    yield line(0)
    doomed = list(range(count))
    if at_random:
        random.Random(1).shuffle(doomed)
        del doomed[count // 2 :]
    marks = [len(doomed) // 100, len(doomed) // 10, len(doomed) // 2, len(doomed)]
    for first in range(0, len(doomed), FREED):
        with environment.begin(write=True) as txn:
            for number in doomed[first : first + FREED]:
                txn.delete(KEY.pack(number), db=objects)
        freed = min(first + FREED, len(doomed))
        if freed >= marks[0]:
            marks = [mark for mark in marks if mark > freed] or [count + 1]
            yield line(freed)
    environment.close()


def punch_zeros(file: Path, start: int) -> int:
    """Give the zero pages from `start` on back to the file system; the file's end."""
    with file.open("r+b") as opened:
        fd = opened.fileno()
        end = os.fstat(fd).st_size
        for at in range(start, end, LOOK):
            data = os.pread(fd, LOOK, at)
            run = 0
            for place in range(0, len(data) + PAGE, PAGE):
                if place < len(data) and not data[place] and not data[place : place + PAGE].strip(b"\0"):
                    run += PAGE
                elif run:
                    _fallocate(fd, PUNCH, at + place - run, run)
                    run = 0
    return end


def bytes_written() -> int:
    """By this process so far (proc(5), `wchar`)."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])
