"""The command line against a real mount: what status says, restart, umount, and images that go through the daemon."""

from __future__ import annotations

import functools
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import Failed, Mount, until

pytestmark = pytest.mark.fuse

MIB = 1 << 20


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    with Mount(tmp_path) as mounted:
        yield mounted


def exit_code(mount: Mount, *args: str) -> int:
    return mount.run(*args).returncode


def test_status_and_paths(mount: Mount) -> None:
    status = mount.status()
    assert (status["schema"], status["state"], status["volumes"]) == ("silofs.status/1", "serving", 0)
    assert status["mountpoint"] == str(mount.mountpoint)
    assert "{" not in mount.run("status").stdout  # what is inside other things is said in words, too
    for key in ("daemon_pid", "holder_pid"):
        os.kill(status[key], 0)
    made = mount.silofs_json("create", "vm1", "--size", "1G")
    assert made["path"] == str(mount.image("vm1"))
    assert mount.image("vm1").stat().st_size == 1 << 30
    assert mount.silofs_json("version")["daemon"] == mount.silofs_json("version")["version"]
    assert mount.run("doctor").returncode in (0, 3)


def test_what_was_written_shows_at_once(mount: Mount) -> None:
    mount.silofs("create", "vm1", "--size", "1G")
    with open(mount.image("vm1"), "r+b", buffering=0) as file:
        file.write(os.urandom(MIB))
        shown = mount.silofs_json("info", "vm1")
        assert (shown["allocated"], shown["open_count"]) == (MIB, 1)
        assert mount.silofs_json("du", "vm1")["volumes"][0]["allocated"] == MIB
        assert exit_code(mount, "rm", "vm1") == 11
        assert exit_code(mount, "rollback", "vm1@x", "--yes") == 11
    mount.silofs("rm", "vm1")
    assert not mount.image("vm1").exists()


def test_a_second_mount_of_a_store_is_refused(mount: Mount, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    assert exit_code(mount, "mount", str(other)) == 11
    assert not os.path.ismount(other)
    assert mount.status()["state"] == "serving"


def test_images_through_the_daemon(mount: Mount, tmp_path: Path) -> None:
    source, out = tmp_path / "i", tmp_path / "o"
    source.write_bytes(os.urandom(3 * MIB) + bytes(5 * MIB))
    mount.silofs("import", str(source), "vm1")
    assert mount.image("vm1").read_bytes() == source.read_bytes()
    with open(mount.image("vm1"), "r+b", buffering=0) as file:
        file.write(b"x" * 5000)
    expected = b"x" * 5000 + source.read_bytes()[5000:]
    mount.silofs("snapshot", "vm1@a")
    for name in ("vm1", "vm1@a"):
        mount.silofs("export", name, str(out), "--force")
        assert out.read_bytes() == expected
    assert (mount.mountpoint / ".snapshots" / "vm1@a.img").read_bytes() == expected
    assert mount.silofs_json("check", "--read-data")["damaged"] == 0


def test_rollback_shows_in_the_file(mount: Mount) -> None:
    mount.silofs("create", "vm1", "--size", "8M")
    image = mount.image("vm1")
    before = os.urandom(8 * MIB)
    image.write_bytes(before)
    assert image.stat().st_size == 8 * MIB
    mount.silofs("snapshot", "vm1@a")
    image.write_bytes(os.urandom(4 * MIB))
    mount.silofs("rollback", "vm1@a", "--yes")
    assert image.read_bytes() == before


def test_restart_under_an_open_file(mount: Mount) -> None:
    mount.silofs("create", "vm1", "--size", "64M")
    with open(mount.image("vm1"), "r+b", buffering=0) as file:
        file.write(b"before")
        done = mount.silofs_json("restart")
        assert done["daemon_pid"] != done["old_daemon_pid"]
        assert mount.status()["daemon_pid"] == done["daemon_pid"]
        file.write(b" and after")
        file.seek(0)
        assert file.read(16) == b"before and after"
    status = mount.status()
    assert (status["restarts"], status["deaths"]) == (1, 0)


def test_commands_wait_for_a_daemon_that_was_killed(mount: Mount) -> None:
    mount.silofs("create", "vm1", "--size", "64M")
    for _ in range(3):
        mount.kill_daemon()
        assert [volume["name"] for volume in mount.silofs_json("ls")["volumes"]] == ["vm1"]


def test_nobody_opens_the_store_of_a_holder(mount: Mount) -> None:
    """A daemon that does not answer: commands end with 75, and say that I/O waits."""
    status = mount.status()
    os.kill(status["holder_pid"], signal.SIGSTOP)  # so that it starts no other
    try:
        os.kill(status["daemon_pid"], signal.SIGKILL)
        deadline = time.monotonic() + 10
        while exit_code(mount, "ls") != 75:
            assert time.monotonic() < deadline
        done = mount.run("status", "--json")
        assert done.returncode == 75
        assert '"state": "starting"' in done.stdout
    finally:
        os.kill(status["holder_pid"], signal.SIGCONT)
    deadline = time.monotonic() + 20
    while exit_code(mount, "status"):
        assert time.monotonic() < deadline


def test_umount_is_refused_while_files_are_open(mount: Mount) -> None:
    mount.silofs("create", "vm1", "--size", "64M")
    with open(mount.image("vm1"), "r+b", buffering=0) as file:
        file.write(b"written")
        with pytest.raises(Failed) as caught:
            mount.stop()
        assert caught.value.code == 11
        assert mount.status()["state"] == "serving"
    mount.stop()
    assert exit_code(mount, "status") == 1
    assert exit_code(mount, "umount", str(mount.mountpoint)) == 10
    # Nobody holds the store now: it is there with what was written.
    assert mount.silofs_json("info", "vm1")["allocated"] == 4096


def test_a_volume_is_not_removed_while_somebody_reads_its_snapshot(mount: Mount) -> None:
    mount.silofs("create", "vm1", "--size", "1M")
    mount.image("vm1").write_bytes(b"kept" * 1024 + bytes((1 << 20) - 4096))
    mount.silofs("snapshot", "vm1@s")
    with open(mount.mountpoint / ".snapshots" / "vm1@s.img", "rb", buffering=0) as file:
        done = mount.run("rm", "vm1", "--yes")
        assert done.returncode == 11 and "a snapshot of vm1 is open once" in done.stderr
        mount.silofs("rm", "vm1@s", "--yes")
        assert exit_code(mount, "rm", "vm1", "--yes") == 11, "its name is gone, and it is read"
        assert file.read(4096) == b"kept" * 1024
    until(lambda: exit_code(mount, "rm", "vm1", "--yes") == 0, "it was closed")


@pytest.fixture
def limited() -> Iterator[Callable[[], None]]:
    """What is started has a limit on the size of files until the test calls this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * MIB, before[1]))
    lift = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, before)
    yield lift
    lift()


def test_a_limit_on_the_size_of_files_is_not_the_mounts(tmp_path: Path, limited: Callable[[], None]) -> None:
    with Mount(tmp_path) as mount:
        limited()
        mount.silofs("create", "vm1", "--size", "128M")
        with open(mount.image("vm1"), "r+b", buffering=0) as file:
            for number in range(96):
                assert file.write(bytes([number + 1]) * MIB) == MIB
            os.fsync(file.fileno())
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            os.kill(mount.status()["holder_pid"], number)
        assert mount.status()["state"] == "serving"


def test_a_lazy_umount_lets_open_files_go_on(mount: Mount) -> None:
    mount.silofs("create", "vm1", "--size", "64M")
    holder = mount.status()["holder_pid"]
    with open(mount.image("vm1"), "r+b", buffering=0) as file:
        mount.silofs("umount", "--lazy", str(mount.mountpoint))
        assert not os.path.ismount(mount.mountpoint)
        file.write(b"still here")
        os.fsync(file.fileno())
    deadline = time.monotonic() + 20
    while Path(f"/proc/{holder}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{holder}").exists()
    assert mount.silofs_json("info", "vm1")["allocated"] == 4096
