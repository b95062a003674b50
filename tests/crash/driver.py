"""Tells a story (story.py) on a real mount: writers with their own ideas of durability, and verbs in between."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic_ns

import numpy as np

from tests.crash.content import UNIT, Numbers, fill, numbers, print_of
from tests.crash.story import Story, Volume
from tests.exerciser import punch_hole
from tests.faults.inject import injected
from tests.harness import Mount, until

REQUEST = 1024  # units of a large write: 512 KiB. One of 1 MiB may come in two parts, as its buffer lies
PAGE_UNITS = 8
SYNC_EVERY = 0.3  # of the writes; a guest with a journal of its own does no less


class Writer:
    """A thread that writes, discards and syncs one volume, until `stop`; `paused` keeps it still."""

    def __init__(self, path: Path, volume: Volume, seed: str, count: Counter) -> None:
        self.path, self.volume = path, volume
        self.done = 0
        self._rng, self._count = random.Random(seed), count
        self._open()
        # Nothing has been written yet, so this changes nothing.
        self._punches = punch_hole(self._fd, 0, UNIT)
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def progress(self, writes: int) -> None:
        """Wait until so many more operations are done."""
        goal = self.done + writes
        until(lambda: self._error or self.done >= goal, f"{writes} more operations on {self.path}", timeout=120)
        if self._error:
            raise self._error

    @contextmanager
    def paused(self) -> Iterator[None]:
        with self._lock:
            yield

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Paused, and the volume not open."""
        with self._lock:
            self._close()
            try:
                yield
            finally:
                self._open()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), f"a writer of {self.path} hangs"
        self._close()
        if self._error:
            raise self._error

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_RDWR)
        self._synchronous = os.open(self.path, os.O_RDWR | os.O_DSYNC)

    def _close(self) -> None:
        os.close(self._fd)
        os.close(self._synchronous)

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                with self._lock:
                    self._operation()
                self.done += 1
        except Exception as error:
            self._error = error

    def _operation(self) -> None:
        dice = self._rng.random()
        total = len(self.volume.picture)
        count = min(total, self._rng.choice((1, 8, 8, 8, 16, 64, 256)))
        first = self._rng.randrange(total - count + 1)
        if self._rng.random() < 0.7:
            first -= first % 8
        if dice < 0.08 and self._punches:
            self._punch(first, count)
        else:
            self._write(first, count, synchronous=dice < 0.2)
        if self._rng.random() < SYNC_EVERY:
            index = self.volume.newest
            os.fdatasync(self._fd)
            self.volume.synced(index)

    def _write(self, first: int, count: int, *, synchronous: bool) -> None:
        number = self._count.next()
        self.volume.write(first, count, number)
        index = self.volume.newest
        # Half of the synchronous ones say so themselves, on a file that was opened for others.
        own = synchronous and number % 2
        fd = self._synchronous if synchronous and not own else self._fd
        written = os.pwritev(fd, [fill(first, count, number)], first * UNIT, os.RWF_DSYNC if own else 0)
        assert written == count * UNIT
        if synchronous:
            self.volume.synced(index)

    def _punch(self, first: int, count: int) -> None:
        """Parts of pages at its ends are zeroed by records of their own, before the whole pages."""
        start, stop = -(-first // PAGE_UNITS) * PAGE_UNITS, (first + count) // PAGE_UNITS * PAGE_UNITS
        if first < start < stop:
            self.volume.write(first, start - first, 0)
        if start < stop < first + count:
            self.volume.write(stop, first + count - stop, 0)
        self.volume.write(first, count, 0)
        assert punch_hole(self._fd, first * UNIT, count * UNIT)


class Counter:
    """Numbers of writes, for all threads."""

    def __init__(self) -> None:
        self._lock, self._last = threading.Lock(), 0

    def next(self) -> int:
        with self._lock:
            self._last += 1
            return self._last


class Driver:
    """Verbs on a mount that are noted in the story, and the writers of its volumes."""

    def __init__(self, mount: Mount, story: Story, seed: str) -> None:
        self.mount, self.story, self.seed = mount, story, seed
        self.count = Counter()
        self.writers: dict[str, Writer] = {}

    def work(self, operations: int) -> None:
        """Let every writer do so many operations."""
        for writer in self.writers.values():
            writer.progress(operations)

    def stop(self) -> None:
        """End all writers; raises what one of them met."""
        writers, self.writers = self.writers, {}
        for writer in writers.values():
            writer.stop()

    def create(self, name: str, units: int) -> None:
        """A volume with a writer."""
        issued = monotonic_ns()
        self.mount.silofs("create", name, "--size", str(units * UNIT))
        self._made(name, np.zeros(units, np.uint64), issued)
        volume = self.story.volumes[name]
        self.writers[name] = Writer(self.mount.image(name), volume, f"{self.seed}/{name}", self.count)

    def imported(self, name: str, units: int, source: Path) -> None:
        """A volume from an image with holes that is made here, at `source`."""
        picture = np.zeros(units, np.uint64)
        with source.open("wb") as file:
            for first in range(0, units, 1024):
                count, number = min(600, units - first), self.count.next()
                picture[first : first + count] = number
                file.seek(first * UNIT)
                file.write(fill(first, count, number))
            file.truncate(units * UNIT)
        issued = monotonic_ns()
        self.mount.silofs("import", str(source), name)
        self._made(name, picture, issued)

    def snapshot(self, volume: str, name: str) -> None:
        with self.writers[volume].paused():
            issued = monotonic_ns()
            self.mount.silofs("snapshot", f"{volume}@{name}")
            self.story.snapshots[f"{volume}@{name}"] = self.story.volumes[volume].picture.copy()
            self._together(issued, volume)

    def clone(self, volume: str, new: str) -> None:
        """A clone of the volume as it is now."""
        with self.writers[volume].paused():
            issued = monotonic_ns()
            self.mount.silofs("clone", volume, new)
            self.story.volumes[new] = Volume(self.story.volumes[volume].picture, monotonic_ns())
            self._together(issued, volume)

    def resize(self, volume: str, units: int) -> None:
        with self.writers[volume].paused():
            issued = monotonic_ns()
            self.story.volumes[volume].resized(units)
            self.mount.silofs("resize", volume, str(units * UNIT), "--yes")
            self._together(issued, volume)

    def extend(self, volume: str, count: int) -> None:
        """A write behind the end: a cut may leave the volume longer and its new part zeros."""
        writer, at, number = self.writers[volume], self.story.volumes[volume], self.count.next()
        with writer.paused(), writer.path.open("r+b", buffering=0) as file:
            first = len(at.picture)
            at.resized(first + count)
            at.write(first, count, number)
            assert os.pwrite(file.fileno(), fill(first, count, number), first * UNIT) == count * UNIT

    def overwrite(self, volume: str, first: int, count: int) -> None:
        """Many units, in requests as large as they get: the commit that takes them stores their objects in cells."""
        writer, at = self.writers[volume], self.story.volumes[volume]
        with writer.paused(), writer.path.open("r+b", buffering=0) as file:
            for begin in range(first, first + count, REQUEST):
                some, number = min(REQUEST, first + count - begin), self.count.next()
                at.write(begin, some, number)
                assert os.pwrite(file.fileno(), fill(begin, some, number), begin * UNIT) == some * UNIT

    def rollback(self, volume: str, name: str) -> None:
        with self.writers[volume].closed():
            issued = monotonic_ns()
            self.story.volumes[volume].become(self.story.snapshots[f"{volume}@{name}"])
            self.mount.silofs("rollback", f"{volume}@{name}", "--yes")
            self._together(issued, volume)

    def rename(self, old: str, new: str) -> None:
        """Of a volume that has no writer."""
        issued = monotonic_ns()
        self.mount.silofs("rename", old, new)
        self.story.volumes[new] = self.story.volumes.pop(old)
        self.story.chapter(issued)

    def freeze(self, volume: str) -> None:
        """And thaw: what was acknowledged before is durable."""
        with self.writers[volume].paused():
            self.mount.silofs("freeze", volume, "--timeout", "60s")
            at = self.story.volumes[volume]
            at.synced(at.newest)
            self.mount.silofs("thaw", volume)

    def share(self, source: str, target: str, first: int, count: int) -> None:
        """copy_file_range(2) of units to the same place of another volume."""
        ours, theirs = self.writers[source], self.writers[target]
        with ours.paused(), theirs.paused():
            picture = self.story.volumes[target].picture.copy()
            picture[first : first + count] = self.story.volumes[source].picture[first : first + count]
            self.story.volumes[target].become(picture)
            with ours.path.open("rb", buffering=0) as old, theirs.path.open("r+b", buffering=0) as new:
                done = 0
                while done < count * UNIT:
                    at = first * UNIT + done
                    done += os.copy_file_range(old.fileno(), new.fileno(), count * UNIT - done, at, at)

    def fail_journal(self, operations: int) -> None:
        """The journal cannot be written any more while so much is done; it is retired, and a new one made later."""
        files = [path for path in (self.mount.store / "journal").iterdir() if not path.suffix]
        with injected(self.mount, "pwritev,pwritev2,pwrite64", "error=EIO", files):
            self.work(operations)

    def rm(self, target: str) -> None:
        """A volume that has no writer, or a snapshot ("volume@name")."""
        issued = monotonic_ns()
        self.mount.silofs("rm", target, "--yes")
        for name in [name for name in self.story.snapshots if name == target or name.startswith(f"{target}@")]:
            del self.story.snapshots[name]
        self.story.volumes.pop(target, None)
        self.story.chapter(issued)

    def kill_host(self) -> None:
        """Holder and daemon die, and with them the write log; the disk stays. The story goes on from what was kept."""
        with ExitStack() as held:
            for writer in self.writers.values():
                held.enter_context(writer.closed())
            self.mount.kill_host()
            self.mount.start()
            moment = monotonic_ns()
            for name, volume in self.story.volumes.items():
                picture = self._read(name)
                found, oldest = print_of(picture), volume.history.oldest(moment)
                assert volume.history.allows(found, oldest), f"{name} lost what was durable: {found} since {oldest}"
                volume.become(picture)
                volume.synced(volume.newest)

    def verify(self) -> None:
        """Compare all volumes with the story, through the mount."""
        for name, volume in self.story.volumes.items():
            assert print_of(self._read(name)) == volume.print, f"{name} is not as the story says"

    def _read(self, name: str) -> Numbers:
        return numbers(self.mount.image(name).read_bytes())

    def _made(self, name: str, picture: Numbers, issued: int) -> None:
        self.story.volumes[name] = Volume(picture, monotonic_ns())
        self.story.chapter(issued)

    def _together(self, issued: int, volume: str) -> None:
        """The verb has made the volume durable as it is now."""
        at = self.story.volumes[volume]
        at.synced(at.newest)
        self.story.chapter(issued, together={volume: at.newest})
