"""A story: what was done to a store and when it was acknowledged, and so what a power cut at any moment may leave.

Writers (a thread for each volume) and verbs (one at a time) note the moments, CLOCK_MONOTONIC in ns, between which
each operation took effect. Of a volume every picture that it ever had is kept as a print (content.py), and from which
moment on which picture was durable. After a cut at `moment` a volume may show any picture from the newest durable one
on: what was acknowledged as durable is there, the rest is a prefix. The catalog may be what the last acknowledged verb
made of it, or the one that was under way.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic_ns

import numpy as np

from tests.crash.content import Numbers, hashes

FAR = 1 << 62


@dataclass
class History:
    """The pictures of one volume, oldest first; `durable` is (moment, index of the picture) in rising order."""

    prints: list[str]
    durable: list[tuple[int, int]]

    def oldest(self, moment: int) -> int:
        """The index of the newest picture that was durable before `moment`."""
        at = bisect_left(self.durable, (moment, -1))
        return self.durable[at - 1][1] if at else 0

    def allows(self, found: str, oldest: int) -> bool:
        return found in self.prints[oldest:]


@dataclass
class Chapter:
    """The catalog as a verb made it: names of volumes, prints of snapshots ("volume@name"), and which pictures of
    volumes are durable together with it."""

    issued: int
    acknowledged: int
    volumes: list[str]
    snapshots: dict[str, str]
    together: dict[str, int] = field(default_factory=dict)


class Volume:
    """What a volume holds now, and its history. One thread at a time works on it."""

    def __init__(self, picture: Numbers, moment: int) -> None:
        self.picture = picture.copy()
        self._hash = hashes(0, self.picture)
        self.history = History([self.print], [(moment, 0)])

    @property
    def print(self) -> str:
        return f"{len(self.picture)}:{self._hash:016x}"

    @property
    def newest(self) -> int:
        return len(self.history.prints) - 1

    def write(self, first: int, count: int, number: int) -> None:
        """A write of `number`, 0 for zeros. It is noted before it is issued: a cut may leave it."""
        place = self.picture[first : first + count]
        self._hash ^= hashes(first, place)
        place[:] = number
        self._hash ^= hashes(first, place)
        self.history.prints.append(self.print)

    def become(self, picture: Numbers) -> None:
        """Another picture altogether: a rollback, a resize."""
        self.picture = picture.copy()
        self._hash = hashes(0, self.picture)
        self.history.prints.append(self.print)

    def resized(self, units: int) -> None:
        kept = self.picture[:units]
        self.become(np.concatenate([kept, np.zeros(units - len(kept), np.uint64)]))

    def synced(self, index: int) -> None:
        """Picture `index` was acknowledged as durable just now."""
        self.history.durable.append((monotonic_ns(), index))


class Story:
    """Volumes and snapshots as they should be, and the chapters so far."""

    def __init__(self) -> None:
        self.volumes: dict[str, Volume] = {}
        self.snapshots: dict[str, Numbers] = {}
        self.chapters: list[Chapter] = []
        self._told: dict[str, History] = {}

    def chapter(self, issued: int, *, together: dict[str, int] | None = None) -> None:
        """A verb that was issued then has been acknowledged; the dictionaries show what it did."""
        prints = {name: Volume(picture, 0).print for name, picture in self.snapshots.items()}
        self.chapters.append(Chapter(issued, monotonic_ns(), sorted(self.volumes), prints, together or {}))
        self._told |= {name: volume.history for name, volume in self.volumes.items()}

    def given(self, since: int, volumes: dict[str, str], snapshots: dict[str, str]) -> None:
        """One chapter only: what was there at `since` and stays."""
        self.chapters.append(Chapter(since, since, sorted(volumes), snapshots))
        self._told = {name: History([each], [(since, 0)]) for name, each in volumes.items()}

    def save(self, path: Path) -> None:
        histories = {name: asdict(history) for name, history in self._told.items()}
        path.write_text(json.dumps({"chapters": [asdict(each) for each in self.chapters], "histories": histories}))


@dataclass
class Expected:
    """A story that was saved, as an examiner of states needs it."""

    chapters: list[Chapter]
    histories: dict[str, History]

    @classmethod
    def load(cls, path: Path) -> Expected:
        told = json.loads(path.read_text())
        histories = {
            name: History(each["prints"], [(at, index) for at, index in each["durable"]])
            for name, each in told["histories"].items()
        }
        return cls([Chapter(**each) for each in told["chapters"]], histories)

    def problems(self, moment: int, volumes: dict[str, str], snapshots: dict[str, str]) -> list[str]:
        """What is wrong with prints of volumes and snapshots found after a cut at `moment`; empty if all is legal."""
        acknowledged = [number for number, each in enumerate(self.chapters) if each.acknowledged < moment]
        last = acknowledged[-1] if acknowledged else 0
        legal = [self.chapters[last]]
        if last + 1 < len(self.chapters) and self.chapters[last + 1].issued < moment:
            legal.append(self.chapters[last + 1])
        chapter = next((c for c in legal if (c.volumes, c.snapshots) == (sorted(volumes), snapshots)), None)
        if chapter is None:
            wanted = " or ".join(f"{c.volumes} and {c.snapshots}" for c in legal)
            return [f"the catalog has {sorted(volumes)} and {snapshots}, not {wanted}"]
        wrong = []
        for name, found in volumes.items():
            history = self.histories[name]
            oldest = max(history.oldest(moment), chapter.together.get(name, 0))
            if not history.allows(found, oldest):
                known = history.prints.index(found) if found in history.prints else "no picture of it"
                newest = len(history.prints) - 1
                wrong.append(f"{name} shows {known} ({found}), not one of {oldest} to {newest}")
        return wrong
