"""Looks at a store after many power cuts, and at each compares it with the story that was told on it.

    python -m tests.crash.explore DIRECTORY [--cuts N] [--seed N] [--part I/N]

DIRECTORY is what test_powercut.py or scripts/soak recorded: the disk's writes, `story.json`, and `marks`, the moments
at which failpoints were passed. Half of the cuts are put just behind marks, all names in turn, the rest anywhere. The
last line of stdout is JSON: cuts, the names of the steps that were cut, and problems.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from silofs import offline
from silofs.errors import NoStore, SiloError
from silofs.layers.check import check
from silofs.layers.reader import ReadTxn
from silofs.layers.store import Store
from tests.crash.content import UNIT, Torn, numbers, print_of
from tests.crash.powercut import CUT, Entry, Replay
from tests.crash.story import Expected
from tests.harness import ROOT
from tests.storerig import read_layer

PROBLEMS_MAX = 5
READ_MAX = 8 << 20  # of a volume


@dataclass(frozen=True)
class Explored:
    """How many states were looked at, which steps they lie behind, and what was wrong with them."""

    cuts: int
    steps: list[str]
    problems: list[str]


def explore(directory: Path, *, cuts: int, seed: int = 1) -> Explored:
    """Run the explorer in a process of its own, and clean up after it however it ends."""
    command = [sys.executable, "-m", "tests.crash.explore", str(directory), "--cuts", str(cuts), "--seed", str(seed)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    finally:
        if (directory / CUT).is_mount():
            subprocess.run(["umount", "--lazy", directory / CUT], check=False)
    last = done.stdout.strip().splitlines()[-1:]
    if done.returncode or not last:
        said = f"{done.stdout[-2000:]}{done.stderr[-3000:]}"
        return Explored(0, [], [f"the explorer ended with {done.returncode}, as a daemon would have: {said}"])
    return Explored(**json.loads(last[0]))


def places(entries: list[Entry], marks: Path, cuts: int, rng: random.Random, first: int) -> list[tuple[int, str]]:
    """Where to cut (so many entries are in the log), and the name of the step that was reached last, if any."""
    moments = [entry.moment_ns for entry in entries]
    passed: dict[str, list[int]] = defaultdict(list)
    if marks.exists():
        for line in marks.read_text().splitlines():
            name, moment = line.split()
            passed[name].append(bisect_right(moments, int(moment)))
    chosen: list[tuple[int, str]] = []
    names = sorted(passed)
    for number in range(cuts // 2 if names else 0):
        name = names[number % len(names)]
        at = rng.choice(passed[name]) + rng.choice((0, 0, 1, 2))
        chosen.append((max(first, min(len(entries), at)), name))
    while len(chosen) < cuts:
        chosen.append((rng.randint(first, len(entries)), ""))
    return sorted(chosen)


def examine(mountpoint: Path, expected: Expected, moment: int) -> list[str]:
    """What is wrong with the store after a cut at `moment`: opened as any command would, checked, read."""
    try:
        store = offline.open_store(mountpoint / "store")
    except NoStore:
        made = expected.chapters[0].acknowledged < moment
        return ["there is no store any more"] if made else []
    except SiloError as error:
        return [f"the store does not open: {error}"]
    with store:
        try:
            wrong = _compare(store, expected, moment)
            with store.reader() as txn:
                wrong += [f"check: {finding.code}: {finding.message}" for finding in check(txn, read_data=True)]
            if not wrong:
                store.write(lambda txn: txn.create_volume("after-the-cut", 1 << 20))
        except SiloError as error:
            return [f"{type(error).__name__}: {error}"]
    return wrong


def _compare(store: Store, expected: Expected, moment: int) -> list[str]:
    volumes, snapshots = shown(store)
    return expected.problems(moment, volumes, snapshots)


def shown(store: Store) -> tuple[dict[str, str], dict[str, str]]:
    """Prints of what volumes and snapshots ("volume@name") hold."""
    with store.reader() as txn:
        volumes = {each.name: _print(txn, each.head, each.size) for each in txn.volumes()}
        snapshots = {
            f"{volume.name}@{each.name}": _print(txn, each.layer, each.size)
            for volume in txn.volumes()
            for each in txn.snapshots(volume.uuid)
        }
    return volumes, snapshots


def _print(txn: ReadTxn, layer: int, size: int) -> str:
    """What no story wrote has a print as well: then it is compared with what was there before."""
    data = read_layer(txn, layer, min(size, READ_MAX))
    try:
        return print_of(numbers(data[: len(data) // UNIT * UNIT]))
    except Torn as torn:
        return f"{torn}; {size}:{hashlib.blake2b(data, digest_size=8).hexdigest()}"


def main() -> int:
    parser = argparse.ArgumentParser(description="look at a store after power cuts")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--cuts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    expected = Expected.load(options.directory / "story.json")
    replay = Replay(options.directory)
    made = bisect_right([entry.moment_ns for entry in replay.entries], expected.chapters[0].issued)
    chosen = places(replay.entries, options.directory / "marks", options.cuts, rng, made)
    problems: list[str] = []
    steps = set()
    for at, step in chosen:
        moment = replay.entries[at - 1].moment_ns
        # For whoever wonders what a state looked like that ended this process.
        print(f"cut at entry {at} of {len(replay.entries)} {step}", flush=True)
        with replay.cut(at, rng) as mountpoint:
            found = examine(mountpoint, expected, moment)
        steps.add(step)
        problems += [f"cut at entry {at} ({step or 'anywhere'}, seed {options.seed}): {text}" for text in found]
        if len(problems) >= PROBLEMS_MAX:
            break
    print(json.dumps({"cuts": len(chosen), "steps": sorted(steps - {""}), "problems": problems[:PROBLEMS_MAX]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
