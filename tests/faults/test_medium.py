"""Pages of the store that the medium cannot give: the daemon dies of each once, and only what is on it is lost."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from silofs.layers import schema
from silofs.layers.cells import FILE as CELLS
from silofs.layers.environment import DATA_FILE, Environment
from silofs.layers.rawtree import FREE, RawTree
from silofs.layers.reader import ReadTxn
from tests.faults.medium import medium
from tests.fuse.mounts import Mount, wait
from tests.storerig import Rig

pytestmark = [pytest.mark.fuse, pytest.mark.crash]
MIB, PAGE = 1 << 20, 4096
LEAF_BYTES, LEAF_PAGES = 2 * MIB, 512


def block(number: int) -> bytes:
    return number.to_bytes(8, "little") + random.Random(number).randbytes(PAGE - 8)


class Disk(Mount):
    """A mount whose store's data is on such a medium. Two volumes with 256 pages each, all of them in the store.

    `file`: where their objects are, LMDB's file or that of cells.
    """

    def __init__(self, base: Path, file: str) -> None:
        super().__init__(base)
        self.below, self.bad, self.file = base / "below", base / "bad", file
        with closing(Rig(self.store)) as rig:
            for name, first in (("vm1", 0), ("vm2", 1000)):
                uuid = rig.store.write(lambda txn, name=name: txn.create_volume(name, MIB)).uuid  # type: ignore[misc]
                for number in range(256):
                    rig.write(uuid, number * PAGE, block(first + number))
                    if file == DATA_FILE and number % 62 == 61:
                        rig.commit()  # too little for cells
                rig.commit()
        (self.store / "data").rename(self.below)

    @property
    def data(self) -> Path:
        return self.below / "data.mdb"

    def spoil(self, page: int, file: str = DATA_FILE) -> None:
        """From now on that page of a file cannot be read, once it is not in memory any more."""
        with self.bad.open("a") as bad:
            bad.write(f"{file} {page}\n")

    def spoil_block(self, number: int) -> str:
        """The same of the page that holds a block; what is said of it."""
        with (self.below / self.file).open("rb") as file:
            page = file.read(8 * MIB).index(block(number)[:64]) // PAGE
        self.spoil(page, self.file)
        name, table = ("file of cells", "cell") if self.file == CELLS else ("data file", "object")
        return f"page {page} of the {name}, with record {{}} of table {table}, cannot be read"

    def head_of(self, name: str) -> int:
        """The id of a volume's head layer."""
        found = self.data.parent / "copy"
        found.mkdir(exist_ok=True)
        shutil.copy(self.data, found)
        environment = Environment(found)
        with ReadTxn(environment) as txn:
            head = txn.volume_by_name(name).head
        environment.close()
        return head

    def forget(self) -> None:
        """The next daemon has read nothing yet."""
        self.wait_served(not_by=self.kill_daemon())

    def deaths(self) -> int:
        return self.log().count("was killed by SIGBUS")

    def read(self, name: str, number: int, count: int = 1) -> bytes:
        with self.image(name).open("rb", buffering=0) as image:
            return os.pread(image.fileno(), PAGE * count, number * PAGE)


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    disk = Disk(tmp_path, getattr(request, "param", DATA_FILE))
    with medium(disk.below, disk.store / "data", disk.bad), disk:
        yield disk


in_either_file = pytest.mark.parametrize("disk", [DATA_FILE, CELLS], indirect=True)


def fails_with(code: int, call: Any, *args: Any) -> None:
    with pytest.raises(OSError) as caught:
        call(*args)
    assert caught.value.errno == code, caught.value


@in_either_file
def test_one_object_is_lost_and_all_else_is_served(disk: Disk) -> None:
    place = disk.spoil_block(100)
    disk.forget()
    fails_with(errno.EIO, disk.read, "vm1", 100)
    assert disk.deaths() == 1
    lost = [number for number in range(256) if not readable(disk, "vm1", number)]
    assert lost == list(range(lost[0], lost[0] + len(lost))) and 100 in lost and len(lost) <= schema.OBJECT_PAGES
    for number in range(256):
        assert disk.read("vm2", number) == block(1000 + number)
    assert disk.deaths() == 1, "the place is known"
    (said,) = disk.ask("status")["quarantined"]
    before, after = place.split("{}")
    assert said.startswith(before) and said.endswith(after)
    done = disk.silofs("check", check=False)
    assert done.returncode == 4 and "cannot be read" in done.stdout

    # It survives daemons and mounts, and writes put things right.
    disk.forget()
    fails_with(errno.EIO, disk.read, "vm1", 100)
    disk.stop()
    disk.start()
    fails_with(errno.EIO, disk.read, "vm1", 100)
    with disk.image("vm1").open("r+b", buffering=0) as image:
        os.pwrite(image.fileno(), block(7), 100 * PAGE)
        os.fsync(image.fileno())
        assert os.pread(image.fileno(), PAGE, 100 * PAGE) == block(7)
    assert disk.deaths() == 1


def readable(disk: Disk, name: str, number: int) -> bool:
    try:
        return len(disk.read(name, number)) == PAGE
    except OSError:
        return False


@in_either_file
def test_what_can_be_read_again_is(disk: Disk) -> None:
    disk.spoil_block(100)
    disk.forget()
    fails_with(errno.EIO, disk.read, "vm1", 100)
    disk.bad.write_text("")
    disk.silofs("check")
    assert disk.ask("status")["quarantined"] == []
    assert disk.read("vm1", 100) == block(100)
    assert not (disk.store / "quarantine.json").exists()


class Walk(RawTree):
    """Knows which pages it has been to."""

    def __init__(self, data_file: Path) -> None:
        self.seen: list[int] = []
        super().__init__(data_file)

    def page(self, number: int) -> bytes | None:
        self.seen.append(number)
        return super().page(number)


def written(fd: int, offset: int) -> bool:
    try:
        os.pwrite(fd, block(7), offset)
        os.fsync(fd)
    except OSError as error:
        assert error.errno == errno.EIO
        return False
    return True


def test_a_page_of_a_tree_costs_its_keys(disk: Disk) -> None:
    """Some 60 leaf records of a volume lie on it. They are lost, writes to them fail, and the others go on."""
    disk.silofs("create", "wide", "--size", "2G")
    with disk.image("wide").open("r+b", buffering=0) as image:
        for leaf in range(1000):
            os.pwrite(image.fileno(), block(leaf), leaf * LEAF_BYTES)
        os.fsync(image.fileno())
    disk.forget()
    layer = disk.head_of("wide")
    with Walk(disk.data) as tree:
        assert not list(tree.on_the_way(schema.LEAF.name, schema.leaf_key(layer, 500)))
    disk.spoil(tree.seen[-1])
    disk.forget()
    fails_with(errno.EIO, disk.read, "wide", 500 * LEAF_PAGES)
    assert disk.deaths() == 1
    lost = [leaf for leaf in range(1000) if not readable(disk, "wide", leaf * LEAF_PAGES)]
    assert lost == list(range(lost[0], lost[-1] + 1)) and 500 in lost and 5 < len(lost) < 200
    with disk.image("wide").open("r+b", buffering=0) as wide, disk.image("vm2").open("r+b", buffering=0) as other:
        wait(lambda: not written(wide.fileno(), 500 * LEAF_BYTES), "a commit has found that it cannot be stored")
        os.pwrite(other.fileno(), block(8), 0)
        os.fsync(other.fileno())
        disk.forget()
        assert os.pread(other.fileno(), PAGE, 0) == block(8)
    assert disk.deaths() <= 2 and disk.status()["state"] == "serving"


def test_without_the_list_of_free_pages_io_is_held_and_said_to_be(disk: Disk) -> None:
    with RawTree(disk.data) as tree:
        root, _ = tree._root(FREE)
    disk.spoil(root)
    disk.kill_daemon()
    about = wait(lambda: (now := disk.status())["state"] == "holding" and "why" in now and now, "I/O is held")
    wait(lambda: "which every change needs" in disk.status().get("why", ""), "the reason is told")
    assert disk.silofs("status", check=False).returncode == 75 and about["next_try"]
    disk.bad.write_text("")
    wait(lambda: disk.status()["state"] == "serving", "it is served as soon as it can be", timeout_s=60)
    assert disk.read("vm2", 3) == block(1003)


@in_either_file
def test_a_check_finds_every_page_and_kills_no_daemon(disk: Disk) -> None:
    disk.forget()
    places = [disk.spoil_block(number).split("{}")[0] for number in (10, 100, 1200)]
    daemon = disk.status()["daemon_pid"]
    drop_cache(disk.store / "data" / disk.file)
    done = disk.silofs("check", "--read-data", check=False)
    assert done.returncode == 4
    assert all(place in done.stdout for place in places), done.stdout
    assert len(disk.ask("status")["quarantined"]) == 3 and "itself died" not in done.stdout
    fails_with(errno.EIO, disk.read, "vm1", 10)
    assert disk.status()["daemon_pid"] == daemon and disk.deaths() == 0


@in_either_file
def test_without_a_daemon_a_command_says_what_cannot_be_read(disk: Disk, tmp_path: Path) -> None:
    out = tmp_path / "out"
    disk.stop()
    place = disk.spoil_block(100).split("{}")[0]

    def export(name: str) -> tuple[int, list[str]]:
        done = disk.silofs("export", name, str(out), check=False)
        return done.returncode, done.stderr.splitlines()[-2:]  # before them what this medium cannot do (punch holes)

    code, (what, hint) = export("vm1")
    assert code == 4 and place in what, what
    assert "silofs check --read-data" in hint and not out.exists()
    code, (what, _) = export("vm1")
    assert code == 4 and "cannot be read" in what, "the place is known, and this one was not killed"
    assert export("vm2")[0] == 0
    assert out.read_bytes() == b"".join(block(1000 + number) for number in range(256))
    assert [row["name"] for row in disk.ask("ls")["volumes"]] == ["vm1", "vm2"]
    disk.start()
    fails_with(errno.EIO, disk.read, "vm1", 100)
    assert disk.deaths() == 0 and disk.read("vm2", 3) == block(1003)


def test_without_a_daemon_and_the_list_of_free_pages_nothing_is_changed(disk: Disk) -> None:
    disk.stop()
    with RawTree(disk.data) as tree:
        root, _ = tree._root(FREE)
    disk.spoil(root)
    for _ in range(2):
        done = disk.silofs("create", "vm3", "--size", "1M", check=False)
        assert done.returncode == 1 and "which every change needs" in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 2
    disk.bad.write_text("")
    disk.silofs("create", "vm3", "--size", "1M")


def drop_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
