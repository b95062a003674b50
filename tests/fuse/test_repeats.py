"""Calls that change names or attributes, and whose daemon dies between doing them and answering: they are done once."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from silofs.mount import extension
from tests.fuse.mounts import Mount, wait
from tests.fuse.test_files import fails

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(not extension.LIBRARY.exists(), reason="the C extension is not built: requests have no number"),
]
PAGE = 4096


class Dying(Mount):
    """A mount whose daemon dies, once it was armed, the first time that it comes to each of some places."""

    def __init__(self, base: Path, *places: str) -> None:
        self.spent = base / "spent"
        self.spent.mkdir()
        self.places = set(places)
        self._before = 0
        fail = ",".join(f"{place}:kill" for place in places)
        super().__init__(base, env={"SILOFS_FAIL": fail, "SILOFS_FAIL_DIR": str(self.spent)})

    def arm(self) -> None:
        for place in self.places:
            (self.spent / place).unlink()
        self.wait_served(not_by=self.kill_daemon())  # one that has not come by yet
        self._before = self.status()["restarts"]

    @property
    def deaths(self) -> int:
        self.wait_served()
        return int(self.status()["restarts"]) - self._before


@contextmanager
def dying(base: Path, *places: str) -> Iterator[Dying]:
    mount = Dying(base, *places)
    for place in places:
        (mount.spent / place).touch()
    with mount:
        yield mount
        assert mount.deaths == len(places)


def test_an_exclusive_create_works_once(tmp_path: Path) -> None:
    with dying(tmp_path, "create.committed", "open.noted") as mount:
        mount.arm()
        fd = os.open(mount.image("vm1"), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
        os.write(fd, b"x" * PAGE)
        assert mount.ask("info", "vm1")["open_count"] == 1
        os.close(fd)
        wait(lambda: mount.ask("info", "vm1")["open_count"] == 0, "no handle is left over")
        assert mount.image("vm1").stat().st_mode & 0o777 == 0o640
        assert [volume["name"] for volume in mount.ask("ls")["volumes"]] == ["vm1"]


def test_an_open_has_one_handle(tmp_path: Path) -> None:
    with dying(tmp_path, "open.noted", "request.done") as mount:
        image = mount.create("vm1", 1 << 20)
        mount.silofs("snapshot", "vm1@one")
        mount.arm()
        with image.open("rb"):
            assert mount.ask("info", "vm1")["open_count"] == 1
        with (mount.path / ".snapshots" / "vm1@one.img").open("rb") as snapshot:
            assert snapshot.read(5) == bytes(5)
        wait(lambda: mount.ask("status")["open_handles"] == 0, "no handle is left over")


def test_what_was_written_after_a_truncation_is_not_truncated(tmp_path: Path) -> None:
    with dying(tmp_path, "request.done") as mount:
        image = mount.create("vm1", 1 << 20)
        image.write_bytes(b"old" * 1000)
        mount.arm()
        with image.open("r+b") as file:  # the first death is here
            file.write(b"new" * 2000)
        assert image.read_bytes() == b"new" * 2000


@pytest.mark.parametrize("place", ["unlink.committed", "request.done"])
def test_rm_works_once(tmp_path: Path, place: str) -> None:
    with dying(tmp_path, place) as mount:
        mount.create("vm1", 1 << 20)
        mount.arm()
        mount.image("vm1").unlink()
        assert mount.ask("ls")["volumes"] == [] and mount.ask("df")["orphans"] == 0


def test_mv_works_once(tmp_path: Path) -> None:
    with dying(tmp_path, "rename.committed") as mount:
        mount.create("vm1", 1 << 20).write_bytes(b"mine")
        mount.arm()
        mount.image("vm1").rename(mount.image("vm2"))
        assert mount.image("vm2").read_bytes()[:4] == b"mine" and not mount.image("vm1").exists()


def test_attributes_and_size_change_once(tmp_path: Path) -> None:
    with dying(tmp_path, "setattr.committed") as mount:
        image = mount.create("vm1", 1 << 20)
        mount.arm()
        os.truncate(image, 1 << 21)
        assert image.stat().st_size == 1 << 21
        image.chmod(0o604)
        assert image.stat().st_mode & 0o777 == 0o604


def test_a_command_does_not_come_between_a_call_and_its_repetition(tmp_path: Path) -> None:
    """`silofs create` of the name that a dying `rm` has freed: the new volume is there at the end."""
    with dying(tmp_path, "unlink.committed") as mount:
        mount.create("vm1", 1 << 20)
        errors: list[BaseException] = []

        def remove() -> None:
            try:
                mount.image("vm1").unlink()
            except BaseException as error:
                errors.append(error)

        mount.arm()
        rm = threading.Thread(target=remove)
        rm.start()
        wait(lambda: mount.silofs("create", "vm1", "--size", "2MiB", check=False).returncode == 0, "the name is free")
        rm.join(20)
        assert not rm.is_alive() and not errors
        assert mount.image("vm1").stat().st_size == 2 << 20


def busy_with_names(mount: Mount, name: str, stop: threading.Event, errors: list[BaseException]) -> None:
    """Make, write, read, rename and remove files, for ever; any error is one too many."""
    one, two = mount.image(name), mount.image(f"{name}-b")
    number = 0
    try:
        while not stop.is_set():
            number += 1
            text = f"{name} {number}".encode().ljust(64)
            fd = os.open(one, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            os.pwrite(fd, text, 0)
            one.rename(two)
            if number % 3 == 0:
                two.unlink()  # while it is open
            assert os.pread(fd, 64, 0) == text
            os.close(fd)
            if number % 3:
                assert two.read_bytes() == text
                two.write_bytes(text * 2)  # truncates
                assert two.read_bytes() == text * 2
                two.unlink()
    except BaseException as error:
        errors.append(error)


def test_names_and_handles_under_random_kills(mount: Mount) -> None:
    errors: list[BaseException] = []
    stop = threading.Event()
    workers = [
        threading.Thread(target=busy_with_names, args=(mount, name, stop, errors)) for name in ("vm1", "vm2", "vm3")
    ]
    for worker in workers:
        worker.start()
    rng = random.Random(7)
    try:
        for _ in range(12):
            time.sleep(rng.uniform(0.2, 1.0))
            mount.wait_served(not_by=mount.kill_daemon())
    finally:
        stop.set()
        for worker in workers:
            worker.join(30)
    assert not errors, errors
    assert not any(worker.is_alive() for worker in workers)
    wait(lambda: mount.ask("status")["open_handles"] == 0, "no handle is left over")
    assert mount.ask("df")["orphans"] == 0 and mount.ask("ls")["volumes"] == []
    assert mount.silofs("check").returncode == 0


# Removed while open


def written(fd: int, text: bytes) -> bool:
    os.pwrite(fd, text, 0)
    return os.pread(fd, len(text), 0) == text


@pytest.mark.parametrize("close", [os.close, lambda fd: None], ids=["closed", "left open"])
def test_an_open_file_outlives_its_name(mount: Mount, close: Callable[[int], None]) -> None:
    image = mount.create("vm1", 8 << 20)
    fd = os.open(image, os.O_RDWR)
    os.pwrite(fd, os.urandom(4 << 20), 1 << 20)
    image.unlink()
    assert not image.exists() and [path.name for path in mount.path.iterdir()] == [".snapshots"]
    assert mount.ask("ls")["volumes"] == [] and mount.ask("df")["orphans"] == 1
    fails(errno.ENOENT, os.open, image, os.O_RDWR)
    assert written(fd, b"before") and os.fstat(fd).st_nlink == 0
    mount.wait_served(not_by=mount.kill_daemon())
    assert os.pread(fd, 6, 0) == b"before" and written(fd, b"after")
    other = mount.create("vm1", 1 << 20)
    assert other.stat().st_ino != os.fstat(fd).st_ino
    os.ftruncate(fd, 1 << 20)
    assert os.fstat(fd).st_size == 1 << 20
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    assert os.pread(again, 5, 0) == b"after"
    os.close(again)
    assert mount.ask("df")["orphans"] == 1
    close(fd)
    if close is os.close:
        wait(lambda: mount.ask("df")["orphans"] == 0, "it goes with its last handle")
    else:
        mount.destroy()
        os.close(fd)
        mount.start()
        assert mount.ask("df")["orphans"] == 0, "a fresh mount has no handles"
    assert [volume["name"] for volume in mount.ask("ls")["volumes"]] == ["vm1"]
    assert mount.silofs("check").returncode == 0


@pytest.mark.parametrize("place", ["release.done", "release.closed"])
def test_a_daemon_that_dies_while_the_last_handle_goes_leaves_no_orphan(tmp_path: Path, place: str) -> None:
    with dying(tmp_path, place) as mount:
        image = mount.create("vm1", 1 << 20)
        fd = os.open(image, os.O_RDWR)
        image.unlink()
        mount.arm()
        os.close(fd)
        wait(lambda: mount.deaths == 1 and mount.ask("df")["orphans"] == 0, "it is gone")
        assert mount.ask("status")["open_handles"] == 0
