"""A store that is filled, half emptied, and then overwritten at random for long stays as large and as quick as it was.

Counts only: the bytes that a commit writes, the length of LMDB's free list, what the files take. Wall time is for the
benchmarks.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from silofs.blocks import PAGE
from silofs.layers.clean import Clean
from silofs.layers.freelist import free_pages
from silofs.layers.policies import drain
from silofs.layers.rewrite import Policy, Reap
from tests.storerig import Rig

MIB_PAGES = 256
SIZE = 96 * MIB_PAGES  # pages, in two volumes
COMMIT = 4 * MIB_PAGES
ROUNDS = 90
CONTENT = random.Random(1).randbytes(COMMIT * PAGE)


def put(rig: Rig, vm: bytes, pages: list[int]) -> None:
    for at, page in enumerate(pages):
        rig.write(vm, page * PAGE, CONTENT[at * PAGE : (at + 1) * PAGE])
    rig.commit()


def bytes_written() -> int:
    """By this process, so far, whatever the file system (proc(5), `wchar`)."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


@pytest.mark.parametrize("part", ["random", "runs"])
def test_the_file_and_what_a_commit_writes_stay_flat(tmp_path: Path, part: str) -> None:
    rig = Rig(tmp_path / "store")
    choose = random.Random(2)
    vms = [rig.store.write(lambda txn, name=name: txn.create_volume(name, SIZE // 2 * PAGE)).uuid for name in "ab"]
    for vm in vms:
        for at in range(0, SIZE // 2, COMMIT):
            put(rig, vm, list(range(at, at + COMMIT)))
    rig.store.write(lambda txn: txn.delete_volume(vms[0]))
    live = SIZE // 2
    turns: list[Policy] = [Reap(), Clean(rig.store.usage, slack=2 * MIB_PAGES)]
    drain(rig.store, turns)
    sizes, free, written = [], [], []
    for _ in range(ROUNDS):
        if part == "random":
            pages = sorted(choose.sample(range(live), COMMIT))
        else:
            starts = choose.sample(range(live // 16), COMMIT // 16)
            pages = sorted(start * 16 + at for start in starts for at in range(16))
        before = bytes_written()
        put(rig, vms[1], pages)
        written.append((bytes_written() - before) // PAGE)
        for turn in turns:
            rig.store.step(turn).result()
        sizes.append(sum((rig.path / "data" / name).stat().st_blocks * 512 for name in ("data.mdb", "cells")) // PAGE)
        free.append(len(free_pages(rig.path / "data" / "data.mdb", 1 << 62)))
    # The half that was deleted is used again before the files grow; by then they are as large as they will be, but for
    # some objects in LMDB, of small steps of the cleaner.
    assert sizes[-1] <= 2.4 * live, sizes
    # LMDB has little in it, and a free list of some hundred pages may still grow to that.
    few = live // 8
    for name, row, spread in (
        ("files", sizes, 1.05),
        ("free", [max(few, each) for each in free], 1.5),
        ("written", written, 1.15),
    ):
        middle, late = row[ROUNDS // 3 : ROUNDS * 2 // 3], row[ROUNDS * 2 // 3 :]
        assert sum(late) / len(late) <= spread * sum(middle) / len(middle), (name, row)
    assert rig.findings(read_data=False) == []
    rig.close()
