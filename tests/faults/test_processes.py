"""Processes that hang, end at the wrong moment, hold on too long, or come from somebody else."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from silofs.sockets import CONTROL
from tests.harness import Failed, Mount, until
from tests.migrate.test_kills import failing, spent
from tests.migrate.test_network import phase

pytestmark = [pytest.mark.fuse, pytest.mark.crash]
MIB, PAGE = 1 << 20, 4096


def stopping(directory: Path, point: str) -> dict[str, str]:
    return {**failing(directory, (point,)), "SILOFS_FAIL": f"{point}:stop"}


def test_a_daemon_that_deadlocks_is_replaced(tmp_path: Path) -> None:
    environment = {**failing(tmp_path, ("mount.statfs",)), "SILOFS_FAIL": "mount.statfs:hang"}
    with Mount(tmp_path / "host", environment=environment) as mount:
        mount.silofs("create", "vm1", "--size", "1M")
        mount.image("vm1").write_bytes(b"kept")
        stuck = int(mount.status()["daemon_pid"])
        assert os.statvfs(mount.mountpoint).f_bavail, "answered by the next one"
        assert mount.image("vm1").read_bytes() == b"kept"
        after = mount.status()
        assert after["daemon_pid"] != stuck and after["restarts"] == 1


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_in_a_flush(tmp_path: Path, signals: int) -> None:
    with Mount(tmp_path / "host", environment=stopping(tmp_path, "journal.before_write")) as mount:
        mount.silofs("create", "vm1", "--size", "8M")
        fd = os.open(mount.image("vm1"), os.O_RDWR)
        daemon = int(mount.status()["daemon_pid"])
        synced = 0

        def sync() -> None:  # the first ones may be commits: the journal is still being made
            nonlocal synced
            while not spent(tmp_path):
                os.pwrite(fd, synced.to_bytes(2, "big") * 2048, synced * PAGE)
                os.fsync(fd)
                synced += 1

        syncing = threading.Thread(target=sync)
        syncing.start()
        until(lambda: spent(tmp_path), "an fsync stops in the middle")
        for _ in range(signals):
            os.kill(daemon, signal.SIGTERM)
        os.kill(daemon, signal.SIGCONT)
        syncing.join(20)
        assert not syncing.is_alive() and synced
        until(lambda: mount.status()["daemon_pid"] != daemon, "the next daemon serves")
        os.close(fd)
        mount.kill_host()
        mount.start()
        data = mount.image("vm1").read_bytes()
        assert data[: synced * PAGE] == b"".join(number.to_bytes(2, "big") * 2048 for number in range(synced))
        assert "Traceback" not in mount.log()


@pytest.mark.parametrize("point", ["freeze.after_seal", "source.pulling", "sweep.after_batch"])
def test_sigterm_in_a_migration(tmp_path: Path, point: str) -> None:
    """To the source while the volume is frozen, and while it is pulled; to the destination while it pulls."""
    at_source = point != "sweep.after_batch"
    environment = stopping(tmp_path, point)
    with (
        Mount(tmp_path / "a", listen=True, environment=environment if at_source else None) as a,
        Mount(tmp_path / "b", listen=True, environment=None if at_source else environment) as b,
    ):
        there = a.pair(b)
        a.silofs("create", "vm1", "--size", "8M")
        data = os.urandom(8 * MIB)
        a.image("vm1").write_bytes(data)
        daemon = int((a if at_source else b).status()["daemon_pid"])
        command = ("migrate", "vm1", "--to", there, "--switchover", "now", "--mode", "postcopy", "--detach")
        name = a.silofs_json(*command)["migration"]
        until(lambda: spent(tmp_path) == {point}, "it stops")
        os.kill(daemon, signal.SIGTERM)
        os.kill(daemon, signal.SIGCONT)
        until(lambda: phase(a, name) == "complete", "complete", timeout=60)
        assert b.image("vm1").read_bytes() == data
        assert [each["role"] for each in b.silofs_json("ls")["volumes"]] == ["owner"]


def test_a_suspended_reader_holds_up_nobody(tmp_path: Path) -> None:
    """`check` in its child holds a read transaction: stopped for long or killed, it must not stop writers."""
    with Mount(tmp_path) as mount:
        mount.silofs("create", "vm1", "--size", "32M")
        with mount.image("vm1").open("r+b", buffering=0) as image:
            image.write(os.urandom(32 * MIB))
            os.fsync(image.fileno())  # so that no space is held for it any more
        checking = subprocess.Popen(
            [Path(sys.executable).parent / "silofs", "check", "--read-data"],
            env=mount.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            child = until(lambda: scrubber(mount.store), "the check's child")
            os.kill(child, signal.SIGSTOP)
            before = mount.silofs_json("df")["file_bytes"]
            with mount.image("vm1").open("r+b", buffering=0) as image:
                for _ in range(4):
                    os.pwrite(image.fileno(), os.urandom(MIB), 0)
                    os.fsync(image.fileno())
            assert mount.silofs_json("df")["file_bytes"] < before + 64 * MIB
            os.kill(child, signal.SIGKILL)
        finally:
            checking.terminate()
            checking.wait(20)
        sizes = []
        for _ in range(12):
            with mount.image("vm1").open("r+b", buffering=0) as image:
                os.pwrite(image.fileno(), os.urandom(4 * MIB), 0)
                os.fsync(image.fileno())
            sizes.append(mount.silofs_json("df")["file_bytes"])
        assert sizes[-1] - sizes[3] < 16 * MIB, "what the dead reader pinned is used again"


def scrubber(store: Path) -> int:
    """The pid of the child in which a check of that store runs, 0 if there is none."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"silofs.layers.scrub" in words and os.fsencode(store) in words:
            return int(entry.parent.name)
    return 0


def test_at_the_limit_of_descriptors_files_are_served(tmp_path: Path) -> None:
    with Mount(tmp_path, listen=True) as mount:
        mount.silofs("create", "vm1", "--size", "4M")
        fd = os.open(mount.image("vm1"), os.O_RDWR)
        mount.silofs("peer", "invite")  # opens the port
        daemon = int(mount.status()["daemon_pid"])
        used = len(list(Path(f"/proc/{daemon}/fd").iterdir()))
        subprocess.run(["prlimit", "--pid", str(daemon), f"--nofile={used}:4096"], check=True)
        assert mount.address is not None
        host, _, port = mount.address.rpartition(":")
        strangers = [socket.create_connection((host, int(port))) for _ in range(20)]
        for number in range(50):
            os.pwrite(fd, number.to_bytes(2, "big") * 2048, number * PAGE)
        os.fsync(fd)
        assert os.pread(fd, PAGE, 49 * PAGE) == (49).to_bytes(2, "big") * 2048
        subprocess.run(["prlimit", "--pid", str(daemon), "--nofile=4096:4096"], check=True)
        for stranger in strangers:
            stranger.close()
        mount.silofs("snapshot", "vm1@after")
        assert mount.status()["daemon_pid"] == daemon
        os.close(fd)


STRANGER = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
try:
    sock.connect(sys.argv[1])
except PermissionError:
    sys.exit(7)
try:
    sock.sendall(b'{"verb": "rm", "args": {"volume": "vm1"}}\\n')
except BrokenPipeError:
    pass  # refused before it was asked anything
print(sock.makefile().readline())
"""


def test_the_control_socket_is_not_for_strangers_nor_for_nonsense(tmp_path: Path) -> None:
    with Mount(tmp_path) as mount:
        mount.silofs("create", "vm1", "--size", "4M")
        path = mount.store / CONTROL
        script = [sys.executable, "-c", STRANGER, str(path)]
        assert subprocess.run(script, capture_output=True, check=False).returncode == 7
        for directory in (path.parent, *path.parent.parents):  # somebody opened it up: their uid is still asked for
            if directory == Path("/tmp"):
                break
            directory.chmod(0o755)
        path.chmod(0o777)
        said = subprocess.run(script, capture_output=True, text=True, check=True).stdout
        assert json.loads(said)["type"] == "error"
        for nonsense in (b"{", b"[" * 100_000, b"\0" * 70_000, b'{"verb": "ls", "args": 3}\n', b"x" * (2 * MIB)):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(path))
                try:
                    sock.sendall(nonsense)
                    sock.shutdown(socket.SHUT_WR)
                    sock.recv(4096)
                except (BrokenPipeError, ConnectionResetError):
                    pass
        assert [volume["name"] for volume in mount.silofs_json("ls")["volumes"]] == ["vm1"]
        assert "Traceback" not in mount.log()


def test_a_copy_of_a_live_store_opens_whole_or_not_at_all(tmp_path: Path) -> None:
    with Mount(tmp_path / "live") as mount:
        mount.silofs("create", "vm1", "--size", "16M")
        stop = threading.Event()

        def write() -> None:
            with mount.image("vm1").open("r+b", buffering=0) as image:
                number = 0
                while not stop.is_set():
                    os.pwrite(image.fileno(), number.to_bytes(8, "big") * 512 * 8, number % 512 * 8 * PAGE)
                    os.fsync(image.fileno())
                    number += 1

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for copy in range(4):
                target = tmp_path / f"copy{copy}"
                target.mkdir()
                subprocess.run(["cp", "-a", mount.store, target / "store"], check=False, stderr=subprocess.DEVNULL)
        finally:
            stop.set()
            writer.join()
    for copy in range(4):
        other = Mount(tmp_path / f"copy{copy}")
        checked = other.run("check", "--read-data")
        if checked.returncode == 0:
            other.silofs("export", "vm1", str(tmp_path / "image"), "--force")
            data = (tmp_path / "image").read_bytes()
            for at in range(0, len(data), PAGE):
                assert data[at : at + PAGE] == data[at : at + 8] * 512
        else:
            assert "Traceback" not in checked.stderr and checked.stderr


def test_a_limit_on_memory_takes_the_daemon_and_not_the_mount(tmp_path: Path) -> None:
    """The kernel ends whoever is over the limit; I/O pauses, and nothing that was acknowledged is lost."""
    group = Path("/sys/fs/cgroup/memory") / f"silofs-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("this machine lets nobody make a memory control group")
    try:
        with Mount(tmp_path) as mount:
            mount.silofs("create", "vm1", "--size", "64M")
            status = mount.status()
            (group / "cgroup.procs").write_text(str(status["daemon_pid"]))
            (group / "memory.limit_in_bytes").write_text(str(40 * MIB))
            data = os.urandom(MIB)
            with mount.image("vm1").open("r+b", buffering=0) as image:
                for number in range(48):
                    os.pwrite(image.fileno(), number.to_bytes(8, "big") + data[8:], number * MIB)
                for number in range(48):
                    assert os.pread(image.fileno(), MIB, number * MIB) == number.to_bytes(8, "big") + data[8:]
            until(lambda: mount.run("status").returncode == 0, "a daemon serves")
            after = mount.status()
            assert after["holder_pid"] == status["holder_pid"]
    finally:
        until(lambda: not (group / "cgroup.procs").read_text(), "the group is empty")
        group.rmdir()
    with pytest.raises(Failed):
        mount.status()
