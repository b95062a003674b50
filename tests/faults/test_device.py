"""What lies below the store fails: no space, I/O errors, flipped bits, a medium that cannot be read."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from silofs.layers.cells import FILE as CELLS
from silofs.layers.environment import DATA_FILE
from silofs.layers.journal import BLOCK, DIRECTORY, Replay
from silofs.layers.store import Store
from tests.faults.inject import injected
from tests.harness import Mount, until

pytestmark = [pytest.mark.fuse, pytest.mark.crash]
MIB, PAGE = 1 << 20, 4096


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 320 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=320m", "silofs-test", directory], check=True)
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True)


def block(number: int) -> bytes:
    return number.to_bytes(8, "little") + random.Random(number).randbytes(MIB - 8)


def fill(fd: int) -> int:
    """Write MiB after MiB until there is no space; how many were acknowledged."""
    for number in range(1024):
        try:
            done = os.pwrite(fd, block(number), number * MIB)
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
            return number
        assert done == MIB
    raise AssertionError("the store is never full")


def test_a_full_store_says_so_loses_nothing_and_can_be_emptied(small: Path) -> None:
    with Mount(small) as mount:
        mount.silofs("create", "kept", "--size", "1M")
        mount.image("kept").write_bytes(block(0))
        mount.silofs("create", "vm1", "--size", "1G")
        fd = os.open(mount.image("vm1"), os.O_RDWR)
        written = fill(fd)
        assert written > 20
        os.fsync(fd)
        mount.kill_daemon()
        for number in range(written):
            assert os.pread(fd, MIB, number * MIB) == block(number), number
        os.close(fd)
        mount.silofs("rm", "vm1", "--yes")
        mount.silofs("create", "vm2", "--size", "1G")
        fd = os.open(mount.image("vm2"), os.O_RDWR)
        assert fill(fd) > written // 2
        os.fsync(fd)
        os.close(fd)
        assert mount.silofs_json("check", "--read-data")["damaged"] == 0
        assert mount.image("kept").read_bytes() == block(0)


SYNCS = "fdatasync,fsync"
WRITES = "pwrite64,writev,pwritev,pwritev2,fdatasync"


@pytest.mark.parametrize(
    ("calls", "fault"),
    [(SYNCS, "error=EIO:when=1"), (WRITES, "error=EIO:when=2"), (WRITES, "error=ENOSPC:when=3"), (WRITES, "error=EIO")],
)
def test_no_fsync_succeeds_falsely(tmp_path: Path, calls: str, fault: str) -> None:
    """What an fsync acknowledged after, or during, an I/O error is there after the power is gone."""
    with Mount(tmp_path) as mount:
        mount.silofs("create", "vm1", "--size", "64M")
        fd = os.open(mount.image("vm1"), os.O_RDWR)
        durable = -1
        os.pwrite(fd, block(0), 0)
        os.fsync(fd)
        with injected(mount, calls, fault):
            for number in range(1, 6):
                try:
                    os.pwrite(fd, block(number), number * MIB)
                    os.fsync(fd)
                    durable = number
                except OSError as error:
                    assert error.errno in (errno.EIO, errno.ENOSPC, errno.EROFS), error
        if "when" not in fault:
            assert durable < 1, "every write and every sync failed, and an fsync says that data is durable"
        if durable > 0:
            os.close(fd)
            mount.kill_host()
            mount.start()
            fd = os.open(mount.image("vm1"), os.O_RDWR)
        for number in range(durable + 1):
            assert os.pread(fd, MIB, number * MIB) == block(number), number
        os.close(fd)
        assert mount.silofs_json("check", "--read-data")["damaged"] == 0
        mount.silofs("restart")  # a store that failed twice is read-only until then
        with mount.image("vm1").open("r+b", buffering=0) as again:
            os.pwrite(again.fileno(), block(9), 9 * MIB)
            os.fsync(again.fileno())


def test_a_flipped_bit_costs_one_page_and_is_told(tmp_path: Path) -> None:
    with Mount(tmp_path) as mount:
        mount.silofs("create", "vm1", "--size", "8M")
        mount.image("vm1").write_bytes(b"".join(block(number) for number in range(8)))
        mount.stop()
        found_in = {name: head(mount.store / "data" / name).find(block(3)[:64]) for name in (DATA_FILE, CELLS)}
        ((name, at),) = [place for place in found_in.items() if place[1] >= 0]
        with (mount.store / "data" / name).open("r+b") as file:
            os.pwrite(file.fileno(), bytes([block(3)[100] ^ 4]), at + 100)
        mount.start()
        with mount.image("vm1").open("rb", buffering=0) as image:
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(image.fileno(), PAGE, 3 * MIB)
            assert os.pread(image.fileno(), MIB - PAGE, 3 * MIB + PAGE) == block(3)[PAGE:]
            assert os.pread(image.fileno(), MIB, 2 * MIB) == block(2)
        assert "damaged data of vm1" in mount.log()
        found = mount.run("check", "--read-data")
        assert found.returncode == 4 and "checksum" in found.stdout
        with mount.image("vm1").open("r+b", buffering=0) as image:
            os.pwrite(image.fileno(), block(3)[:PAGE], 3 * MIB)
            assert os.pread(image.fileno(), MIB, 3 * MIB) == block(3)
        assert "Traceback" not in mount.log()


def head(path: Path) -> bytes:
    """The beginning of a file: the rest of that of cells is a hole."""
    with path.open("rb") as file:
        return file.read(32 * MIB)


def synced_one_by_one(mount: Mount) -> list[int]:
    """Pages of vm1, each synced before the next is written, then the power goes; where the journal has their bytes."""
    mount.silofs("create", "vm1", "--size", "1M")
    for _ in range(5):
        known = mount.status()
        until(lambda: mount.silofs_json("status")["no_journal"] is None, "there is a journal")
        with mount.image("vm1").open("r+b", buffering=0) as image:
            os.fsync(image.fileno())
            for number in range(10):
                os.pwrite(image.fileno(), block(number)[:PAGE], number * PAGE)
                os.fsync(image.fileno())
        mount.kill_host(known)
        with Store.open(mount.store, replay=False) as store, store.reader() as txn:
            state, uuid = txn.state, store.uuid
        if state.journal:
            records = list(Replay(mount.store / DIRECTORY, state.journal, uuid, state.mark).records())
            if len(records) >= 6:
                return [BLOCK + record.position for record in records]
        mount.start()  # there was no journal yet, or a commit came in between
    raise AssertionError("fsyncs do not go to the journal")


def test_a_flipped_byte_in_the_journal_is_told_and_costs_what_is_said(tmp_path: Path) -> None:
    """What a power cut leaves, with damage and without, through the command."""
    with Mount(tmp_path / "host") as mount:
        places = synced_one_by_one(mount)
        sound = Mount(tmp_path / "sound")
        shutil.copytree(mount.store, sound.store, ignore=shutil.ignore_patterns("*.sock"))
        (journal,) = (mount.store / DIRECTORY).iterdir()
        with journal.open("r+b") as file:
            (byte,) = os.pread(file.fileno(), 1, places[-3] + 1000)
            os.pwrite(file.fileno(), bytes([byte ^ 4]), places[-3] + 1000)
        for verb in (["check"], ["ls"], ["mount", str(mount.mountpoint)]):
            refused = mount.run(*verb)
            what, hint = refused.stderr.splitlines()
            assert refused.returncode == 4, verb
            assert f"the journal {journal} is damaged" in what and what.endswith("cannot be read, of 'vm1'")
            assert "silofs check --repair" in hint
        asked = mount.run("check", "--repair")
        assert asked.returncode == 11 and "its later writes" in asked.stderr
        done = mount.run("check", "--repair", "--yes", "--json")
        assert done.returncode == 3
        (loss,) = json.loads(done.stdout.splitlines()[-1])["losses"]
        assert (loss["what"], loss["name"], loss["ranges"]) == ("journal", "vm1", [])
        assert mount.silofs_json("check", "--read-data")["damaged"] == 0
        assert [volume["name"] for volume in mount.silofs_json("ls")["volumes"]] == ["vm1"]
        assert (mount.store / "data.damaged" / journal.name).exists() and not journal.exists()
        mount.start()
        with mount.image("vm1").open("r+b", buffering=0) as image:
            for number in range(7):
                assert os.pread(image.fileno(), PAGE, number * PAGE) == block(number)[:PAGE]
            assert os.pread(image.fileno(), 3 * PAGE, 7 * PAGE) == bytes(3 * PAGE)
            os.pwrite(image.fileno(), block(7)[:PAGE], 7 * PAGE)
            os.fsync(image.fileno())
    # The negative control: the same store without the flipped byte.
    assert sound.run("check", "--read-data").returncode == 0
    sound.silofs("export", "vm1", str(tmp_path / "image"))
    assert (tmp_path / "image").read_bytes()[: 10 * PAGE] == b"".join(block(number)[:PAGE] for number in range(10))
