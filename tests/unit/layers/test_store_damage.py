"""A damaged data file or file of cells: an error or a refusal to open, never other data than was written.

Each trial spoils a copy of one store and reads all of it in a child process, since LMDB itself may end the process
on a spoilt tree. A child that dies has returned no wrong data.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from silofs.blocks import LEAF_PAGES, PAGE
from silofs.errors import SiloError
from silofs.layers import schema
from silofs.layers.check import check
from silofs.layers.environment import last_page
from silofs.layers.store import Store
from tests.storerig import Rig, page_bytes

SAME, REFUSED, DIFFERENT, BUG = 0, 10, 20, 30
TRIALS = 50
PAGES = 3 * LEAF_PAGES
SCRATCH = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path("/tmp")

CELLS = 9
CELL_PAGES = schema.CELL_BYTES // PAGE
IN_CELLS = range(500, 500 + CELLS * schema.OBJECT_PAGES)  # their objects are in cells

Content = dict[str, dict[int, bytes]]
Kind = Callable[[random.Random, int], Callable[[bytearray], None]]


@pytest.fixture(scope="module")
def spoilable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Content]:
    """A store with a past (overwritten leaves leave old pages in the file), and what is in it; some of it in cells."""
    path = tmp_path_factory.mktemp("damage") / "store"
    rig = Rig(path)
    chance = random.Random(5)
    content: Content = {"vm": {}}
    vm = rig.store.write(lambda txn: txn.create_volume("vm", PAGES * PAGE)).uuid
    for turn in range(12):
        for page in chance.sample(range(PAGES), 60):
            content["vm"][page] = page_bytes(page, turn)
            rig.write(vm, page * PAGE, content["vm"][page])
        rig.commit()
        if turn == 5:
            rig.store.write(lambda txn: txn.clone(txn.take_snapshot(vm, "half").layer, "clone"))
            content["clone"] = dict(content["vm"])
            content["vm"].update((page, page_bytes(page, 99)) for page in IN_CELLS)
            rig.put(vm, IN_CELLS, 99)
    with rig.store.reader() as txn:
        assert [schema.open_cell(key, value) for key, value in txn.scan(schema.CELL)] == list(range(CELLS))
    rig.close()
    return path, content


def read_everything(path: Path, content: Content, thorough: bool) -> int:
    """SAME, or REFUSED when something could not be read; DIFFERENT when other data was returned, or none for some."""
    refused = False
    try:
        with Store.open(path) as store, store.reader() as txn:
            for name, pages in content.items():
                try:
                    volume = txn.volume_by_name(name)
                except SiloError as error:
                    if error.code == "no_such_volume":
                        return DIFFERENT
                    refused = True
                    continue
                for leaf in range(PAGES // LEAF_PAGES):
                    try:
                        refs = txn.resolve(volume.head, leaf).tolist()
                    except SiloError:
                        refused = True
                        continue
                    for page, ref in enumerate(refs, leaf * LEAF_PAGES):
                        try:
                            found = bytes(txn.page(ref))
                        except SiloError:
                            refused = True
                            continue
                        if found != pages.get(page, bytes(PAGE)):
                            return DIFFERENT
            if thorough:
                found_wrong = check(txn, read_data=True)
                assert found_wrong or not refused, "what cannot be read is found by a check"
    except SiloError:
        return REFUSED
    return REFUSED if refused else SAME


def trial(
    path: Path, content: Content, name: str, length: int, spoil: Callable[[bytearray], None], copy: Path, thorough: bool
) -> int:
    """`spoil` gets the first `length` bytes of that file of a copy."""
    subprocess.run(["cp", "-r", "--sparse=always", path, copy], check=True)  # the file of cells has a large hole
    try:
        with (copy / "data" / name).open("r+b") as file:
            data = bytearray(os.pread(file.fileno(), length, 0))
            spoil(data)
            os.pwrite(file.fileno(), data, 0)
        child = os.fork()
        if not child:
            status = BUG
            try:
                logging.disable()
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                status = read_everything(copy, content, thorough)
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    finally:
        shutil.rmtree(copy)


def flip(chance: random.Random, pages: int) -> Callable[[bytearray], None]:
    def spoil(data: bytearray) -> None:
        data[chance.randrange(pages * PAGE)] ^= 1 << chance.randrange(8)

    return spoil


def zero(chance: random.Random, pages: int) -> Callable[[bytearray], None]:
    def spoil(data: bytearray) -> None:
        at = chance.randrange(pages) * PAGE
        data[at : at + PAGE] = bytes(PAGE)

    return spoil


def swap(chance: random.Random, pages: int) -> Callable[[bytearray], None]:
    def spoil(data: bytearray) -> None:
        # Tree pages only: two pages of objects would rarely be of interest.
        trees = [page for page in range(pages) if data[page * PAGE + 10] & 3 and not data[page * PAGE + 11]]
        exchange(data, *chance.sample(trees, 2))

    return spoil


def exchange(data: bytearray, *pages: int) -> None:
    first, second = (slice(page * PAGE, (page + 1) * PAGE) for page in pages)
    data[first], data[second] = data[second], data[first]


def swap_any(chance: random.Random, pages: int) -> Callable[[bytearray], None]:
    return lambda data: exchange(data, *chance.sample(range(pages), 2))


def shift(chance: random.Random, pages: int) -> Callable[[bytearray], None]:
    """What was written to a cell is in the next one: another object there, whole and sound."""

    def spoil(data: bytearray) -> None:
        at = chance.randrange(pages // CELL_PAGES - 1) * schema.CELL_BYTES
        data[at + schema.CELL_BYTES : at + 2 * schema.CELL_BYTES] = data[at : at + schema.CELL_BYTES]

    return spoil


@pytest.mark.parametrize("kind", [flip, zero, swap])
def test_damage_is_never_other_data(kind: Kind, spoilable: tuple[Path, Content]) -> None:
    try_out(kind, spoilable, "data.mdb", last_page(spoilable[0] / "data" / "data.mdb") + 1, TRIALS)


@pytest.mark.parametrize("kind", [flip, zero, swap_any, shift])
def test_damage_of_cells_is_never_other_data(kind: Kind, spoilable: tuple[Path, Content]) -> None:
    seen = try_out(kind, spoilable, "cells", CELLS * CELL_PAGES, TRIALS // 3)
    assert set(seen) <= {SAME, REFUSED}, "nothing in that file ends a process"


def try_out(kind: Kind, spoilable: tuple[Path, Content], name: str, pages: int, trials: int) -> Counter[int]:
    path, content = spoilable
    chance = random.Random(7)
    seen: Counter[int] = Counter()
    for number in range(trials):
        copy = SCRATCH / f"silofs-damage-{os.getpid()}-{number}"
        spoil = kind(chance, pages)
        seen[trial(path, content, name, pages * PAGE, spoil, copy, thorough=number % 5 == 0)] += 1
    assert not seen[DIFFERENT] and not seen[BUG], seen
    assert seen[REFUSED] > trials // 4, "most damage is noticed"
    return seen
