"""freeze and thaw through the shipped command: what waits, what goes on, who is told what; daemons die meanwhile."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import Mount, until

pytestmark = pytest.mark.fuse

PAGE = 4096


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    with Mount(tmp_path) as mounted:
        mounted.silofs("create", "vm1", "--size", "64M")
        yield mounted


class Waiting(threading.Thread):
    """A call that is expected to wait."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__()
        self._work = work
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error

    def done(self) -> None:
        self.join(30)
        assert not self.is_alive()
        assert self.error is None, self.error


def write(path: Path, data: bytes, offset: int = 0) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def error(mount: Mount, code: int, *arguments: str) -> dict[str, str]:
    done = mount.run(*arguments, "--json")
    assert done.returncode == code, done
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_writes_wait_and_the_rest_goes_on(mount: Mount, tmp_path: Path) -> None:
    mount.silofs("create", "vm2", "--size", "64M")
    image = mount.image("vm1")
    write(image, b"a" * PAGE)
    held = mount.silofs_json("freeze", "vm1", "--owner", "nightly", "--reason", "backup", "--timeout", "1m")
    assert (held["owner"], held["reason"], held["uid"], held["timeout_seconds"]) == ("nightly", "backup", 0, 60)
    assert mount.status()["dirty_bytes"] == 0
    # Before anything waits: the kernel lines these up behind a write of the same file.
    image.chmod(0o640)
    fd = os.open(image, os.O_RDWR)
    os.fsync(fd)
    os.close(fd)
    waiting = [
        Waiting(lambda: write(image, b"b" * PAGE)),
        Waiting(lambda: os.truncate(image, 32 << 20)),
        *(Waiting(lambda at=at: write(image, b"c" * PAGE, (at + 1) * PAGE)) for at in range(200)),
    ]
    write(mount.image("vm2"), b"other")
    assert mount.image("vm2").read_bytes()[:5] == b"other"
    assert image.read_bytes()[:PAGE] == b"a" * PAGE
    shown = mount.silofs_json("info", "vm1")["frozen"]
    assert {key: held[key] for key in shown} == shown
    assert [each["volume"] for each in mount.status()["frozen"]] == ["vm1"]
    assert "owner, frozen" in mount.silofs("ls")
    mount.silofs("snapshot", "vm1@s")
    mount.silofs("clone", "vm1", "copy")
    mount.silofs("export", "vm1", str(tmp_path / "out"))
    assert mount.silofs_json("diff", "vm1@s")["count"] == 0
    assert all(thread.is_alive() for thread in waiting)
    thawed = mount.silofs_json("thaw", "vm1")
    assert thawed["owner"] == "nightly"
    assert 0 < thawed["seconds"] < 60
    for thread in waiting:
        thread.done()
    assert image.read_bytes()[:PAGE] == b"b" * PAGE
    assert image.stat().st_size == 32 << 20
    assert mount.silofs_json("info", "vm1")["frozen"] is None
    assert (tmp_path / "out").read_bytes()[:PAGE] == b"a" * PAGE


def test_what_is_refused_says_who_holds_it(mount: Mount) -> None:
    mount.silofs("snapshot", "vm1@s")
    mount.silofs("freeze", "vm1", "--owner", "nightly", "--timeout", "1m")
    for arguments in (
        ["freeze", "vm1"],
        ["resize", "vm1", "128M"],
        ["rollback", "vm1@s", "--yes"],
        ["rm", "vm1", "--yes"],
    ):
        said = error(mount, 11, *arguments)
        assert "nightly" in said["message"]
        assert "thaw vm1" in said["hint"]
    with pytest.raises(OSError, match="busy"):
        mount.image("vm1").unlink()
    mount.silofs("rename", "vm1", "new")
    mount.silofs("thaw", "new")
    assert "is not frozen" in error(mount, 11, "thaw", "new")["message"]
    assert error(mount, 10, "freeze", "nosuch")["code"] == "no_such_volume"
    assert error(mount, 2, "freeze", "new", "--timeout", "2h")["code"] == "invalid"
    assert error(mount, 2, "freeze", "new", "--timeout", "0")["code"] == "invalid"
    assert error(mount, 2, "freeze", "new", "--owner", "two\nlines")["code"] == "invalid"


def test_a_deadline_thaws_and_says_so(mount: Mount) -> None:
    mount.silofs("freeze", "vm1", "--owner", "forgetful", "--timeout", "2s")
    began = time.monotonic()
    write(mount.image("vm1"), b"b" * PAGE)
    assert time.monotonic() - began < 20
    assert [each["owner"] for each in mount.status()["expired_freezes"]] == ["forgetful"]
    assert "vm1 is thawed by its deadline; it was frozen by forgetful" in mount.log()
    said = error(mount, 11, "thaw", "vm1")
    assert "deadline passed" in said["message"]
    assert mount.silofs_json("info", "vm1")["frozen"] is None
    mount.silofs("freeze", "vm1")
    mount.silofs("thaw", "vm1")


def test_it_survives_the_daemon(mount: Mount) -> None:
    image = mount.image("vm1")
    mount.silofs("freeze", "vm1", "--owner", "nightly", "--timeout", "1m")
    waiting = Waiting(lambda: write(image, b"b" * PAGE))
    for _ in range(2):
        mount.kill_daemon()
        until(lambda: mount.run("status").returncode == 0, "a daemon serves")
        assert mount.silofs_json("info", "vm1")["frozen"]["owner"] == "nightly"
        assert image.read_bytes()[:PAGE] == bytes(PAGE)
    assert waiting.is_alive()
    mount.silofs("thaw", "vm1")
    waiting.done()
    assert image.read_bytes()[:PAGE] == b"b" * PAGE


def test_a_deadline_goes_on_over_a_death(mount: Mount) -> None:
    mount.silofs("freeze", "vm1", "--timeout", "3s")
    mount.kill_daemon()
    write(mount.image("vm1"), b"b" * PAGE)
    until(lambda: "is thawed by its deadline" in mount.log(), "the next daemon thaws it")


@pytest.mark.crash
@pytest.mark.parametrize("point", ["hold.recorded", "hold.removed"])
def test_a_death_in_the_command(tmp_path: Path, point: str) -> None:
    environment = {"SILOFS_FAIL": f"{point}:kill", "SILOFS_FAIL_DIR": str(tmp_path)}
    with Mount(tmp_path, environment=environment) as mount:
        mount.silofs("create", "vm1", "--size", "64M")
        if point == "hold.recorded":
            assert error(mount, 75, "freeze", "vm1", "--timeout", "1m")["code"] == "try_again"
            until(lambda: mount.run("status").returncode == 0, "a daemon serves")
            assert mount.silofs_json("info", "vm1")["frozen"] is not None
            mount.silofs("thaw", "vm1")
        else:
            mount.silofs("freeze", "vm1", "--timeout", "1m")
            assert error(mount, 75, "thaw", "vm1")["code"] == "try_again"
            until(lambda: mount.run("status").returncode == 0, "a daemon serves")
            assert mount.silofs_json("info", "vm1")["frozen"] is None
        write(mount.image("vm1"), b"b" * PAGE)
        assert (tmp_path / point).exists()


def test_a_frozen_volume_does_not_migrate(tmp_path: Path) -> None:
    with Mount(tmp_path / "a", listen=True) as here, Mount(tmp_path / "b", listen=True) as there:
        peer = here.pair(there)
        here.silofs("create", "vm1", "--size", "64M")
        here.silofs("freeze", "vm1", "--owner", "nightly", "--timeout", "1m")
        assert "nightly" in error(here, 11, "migrate", "vm1", "--to", peer, "--switchover", "now")["message"]
        here.silofs("thaw", "vm1")
        here.silofs("migrate", "vm1", "--to", peer, "--switchover", "manual", "--detach")
        assert "migration" in error(here, 11, "freeze", "vm1")["message"]
        migration = here.silofs_json("migration", "ls")["migrations"][0]["migration"]
        assert error(there, 11, "freeze", "vm1")["code"] == "busy"
        here.silofs("migration", "cancel", migration)
        here.silofs("migrate", "vm1", "--to", peer, "--switchover", "now")
        assert error(here, 11, "freeze", "vm1")["code"] == "not_owner"
        there.silofs("freeze", "vm1")
        there.silofs("thaw", "vm1")
