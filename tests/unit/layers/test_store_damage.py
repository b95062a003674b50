"""A damaged data file: an error or a refusal to open, never other data than was written.

Each trial spoils a copy of one store and reads all of it in a child process, since LMDB itself may end the process
on a spoilt tree. A child that dies has returned no wrong data.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from silofs.blocks import LEAF_PAGES, PAGE
from silofs.errors import SiloError
from silofs.layers.check import check
from silofs.layers.environment import last_page
from silofs.layers.store import Store
from tests.storerig import Rig, page_bytes

SAME, REFUSED, DIFFERENT, BUG = 0, 10, 20, 30
TRIALS = 50
PAGES = 3 * LEAF_PAGES
SCRATCH = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path("/tmp")

Content = dict[str, dict[int, bytes]]


@pytest.fixture(scope="module")
def spoilable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Content]:
    """A store with a past (overwritten leaves leave old pages in the file), and what is in it."""
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


def trial(path: Path, content: Content, spoil: Callable[[bytearray], None], copy: Path, thorough: bool) -> int:
    shutil.copytree(path, copy)
    try:
        file = copy / "data" / "data.mdb"
        data = bytearray(file.read_bytes())
        spoil(data)
        file.write_bytes(data)
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
        first, second = (at * PAGE for at in chance.sample(trees, 2))
        data[first : first + PAGE], data[second : second + PAGE] = (
            data[second : second + PAGE],
            data[first : first + PAGE],
        )

    return spoil


@pytest.mark.parametrize("kind", [flip, zero, swap])
def test_damage_is_never_other_data(
    kind: Callable[..., Callable[[bytearray], None]], spoilable: tuple[Path, Content]
) -> None:
    path, content = spoilable
    pages = last_page(path / "data" / "data.mdb") + 1
    chance = random.Random(7)
    seen: Counter[int] = Counter()
    for number in range(TRIALS):
        copy = SCRATCH / f"silofs-damage-{os.getpid()}-{number}"
        seen[trial(path, content, kind(chance, pages), copy, thorough=number % 5 == 0)] += 1
    assert not seen[DIFFERENT] and not seen[BUG], seen
    assert seen[REFUSED] > TRIALS // 4, "most damage is noticed"
