"""Who dies when, and what programs with open files see of it (the table in docs/mount.md)."""

# The system calls are what is tested here.
# ruff: noqa: PTH108, PTH208

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from silofs import limits
from silofs.errors import BadFormat, Busy, NoStore, SiloError, StoreLocked, UserError
from silofs.layers.store import Store
from silofs.mount import kernel, launcher
from silofs.mount.channel import Channel
from tests.fuse.mounts import Mount, open_files, wait
from tests.fuse.test_files import fails
from tests.unit.mount.test_kernel import init_request

pytestmark = pytest.mark.fuse
PAGE = 4096


class Writer:
    """A thread that writes ever higher numbers into the pages of a file, in order, and stops at the first error."""

    def __init__(self, path: Path, pages: int = 64) -> None:
        self._fd = os.open(path, os.O_RDWR)
        self._pages = pages
        self._stop = threading.Event()
        self.done = 0
        self.error: OSError | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                number = self.done
                os.pwrite(self._fd, number.to_bytes(8, "big") * 512, number % self._pages * PAGE)
                self.done = number + 1
        except OSError as error:
            self.error = error

    def progress(self, count: int = 50) -> None:
        """Wait until so many more writes were acknowledged."""
        goal = self.done + count
        wait(lambda: self.error or self.done >= goal, f"{count} more writes")
        assert self.error is None, self.error

    def finish(self) -> None:
        """Stop, and check that every page holds the last number that was written to it."""
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive(), "a write hangs"
        assert self.error is None, self.error
        for number in range(max(0, self.done - self._pages), self.done):
            found = os.pread(self._fd, PAGE, number % self._pages * PAGE)
            assert found == number.to_bytes(8, "big") * 512, f"page {number % self._pages}"
        os.close(self._fd)


@contextmanager
def writing(path: Path) -> Iterator[Writer]:
    writer = Writer(path)
    try:
        yield writer
        writer.finish()
    finally:
        writer._stop.set()


def daemons(mount: Mount) -> set[int]:
    """The daemons of a mount's holder that run."""
    children = Path(f"/proc/{mount.holder_pid}/task/{mount.holder_pid}/children").read_text().split()
    found = set()
    for pid in children:
        with contextlib.suppress(FileNotFoundError):  # it ended meanwhile
            if b"--channel" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(int(pid))
    return found


def test_a_killed_daemon_is_a_pause(mount: Mount) -> None:
    with writing(mount.create("vm1", 1 << 20)) as writer:
        writer.progress()
        for _ in range(4):
            pid = mount.kill_daemon()
            writer.progress()
            mount.wait_served(not_by=pid)
    assert mount.status()["restarts"] == 4
    assert mount.ask("status")["restarts"] == 4


def test_what_was_acknowledged_before_the_kill_is_there_after_it(mount: Mount) -> None:
    fd = os.open(mount.create("vm1", 64 << 20), os.O_RDWR)
    block = os.urandom(1 << 20)
    for number in range(24):
        os.pwrite(fd, number.to_bytes(8, "big") + block[8:], number << 20)
    mount.kill_daemon()
    for number in range(24):
        assert os.pread(fd, 1 << 20, number << 20) == number.to_bytes(8, "big") + block[8:]
    os.close(fd)


def test_handles_survive(mount: Mount) -> None:
    image = mount.create("vm1", 1 << 20)
    mount.silofs("snapshot", "vm1@one")
    reader, writer = os.open(image, os.O_RDONLY), os.open(image, os.O_RDWR | os.O_SYNC)
    snapshot = os.open(mount.path / ".snapshots" / "vm1@one.img", os.O_RDONLY)
    mount.wait_served(not_by=mount.kill_daemon())
    os.pwrite(writer, b"x" * PAGE, 0)
    assert os.pread(reader, PAGE, 0) == b"x" * PAGE
    assert os.pread(snapshot, PAGE, 0) == bytes(PAGE)
    assert mount.ask("info", "vm1")["open_count"] == 2
    fails(errno.EBUSY, os.unlink, image)
    for fd in (reader, writer, snapshot):
        os.close(fd)
    mount.silofs("rm", "vm1@one", "--yes")
    os.unlink(image)


def test_sigterm_replaces_the_daemon(mount: Mount) -> None:
    with writing(mount.create("vm1", 1 << 20)) as writer:
        writer.progress()
        pid = mount.kill_daemon(signal.SIGTERM)
        writer.progress()
        mount.wait_served(not_by=pid)
        assert mount.status()["last_exit"] == "ended as it was asked to"


def test_restart_replaces_the_daemon(mount: Mount) -> None:
    with writing(mount.create("vm1", 1 << 20)) as writer:
        writer.progress()
        wait(lambda: len(daemons(mount)) == 2, "a successor")
        older = daemons(mount)
        about = mount.ask("restart")
        assert about["old_daemon_pid"] in older and about["daemon_pid"] not in older
        writer.progress()
        wait(lambda: not older & daemons(mount), "the successor of before the restart is gone")


def test_a_successor_waits_without_store_and_mount(mount: Mount) -> None:
    about = mount.status()

    def spare() -> int | None:
        return next(iter(daemons(mount) - {about["daemon_pid"]}), None)

    def holds(pid: int) -> set[str]:
        return {*open_files(pid).values()} & {"/dev/fuse", "/memfd:silofs-log (deleted)", str(mount.store / "lock")}

    pid = wait(spare, "a successor")
    assert not holds(pid)
    assert len(holds(about["daemon_pid"])) == 3
    os.kill(pid, signal.SIGKILL)
    other = wait(lambda: (found := spare()) != pid and found, "another successor")
    assert other != about["daemon_pid"] == mount.status()["daemon_pid"]


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[Mount]:
    with Mount(tmp_path, daemon="tests.fuse.odd_daemon") as mount:
        yield mount


def test_a_daemon_that_keeps_dying_holds_the_requests(odd: Mount) -> None:
    with writing(odd.create("vm1", 1 << 20)) as writer:
        writer.progress()
        (odd.store / "die").touch()
        pid = odd.kill_daemon()
        wait(lambda: odd.status()["daemon_pid"] != pid, "the death is noticed")
        if odd.status()["state"] == "serving":  # the successor had been started before
            odd.kill_daemon()
        wait(lambda: odd.status()["state"] == "holding", "the holder holds")
        assert writer.error is None
        assert odd.silofs("status", check=False).returncode == 75
        (odd.store / "die").unlink()
        writer.progress()
    assert odd.status()["state"] == "serving"


def test_a_store_that_cannot_be_opened_again_holds_the_requests(odd: Mount) -> None:
    with writing(odd.create("vm1", 1 << 20)) as writer:
        writer.progress()
        (odd.store / "refuse").touch()
        odd.kill_daemon()
        about = wait(lambda: (now := odd.status())["state"] == "holding" and now, "the holder holds")
        assert about["refused"]["code"] == "bad_format" and "refuses" in about["last_exit"]
        (odd.store / "refuse").unlink()
        writer.progress()


def test_an_upgrade_that_cannot_open_the_store_falls_back_to_the_old_program(odd: Mount) -> None:
    """The daemon that was warm before the restart is of the old program, and takes over."""
    with writing(odd.create("vm1", 1 << 20)) as writer:
        wait(lambda: len(daemons(odd)) == 2, "a successor")
        (before,) = daemons(odd) - {odd.status()["daemon_pid"]}
        wait((odd.store / f"started-{before}").exists, "it is past the point at which it looks")
        (odd.store / "refuse-new").touch()
        done = odd.silofs("restart", check=False)
        assert done.returncode == BadFormat.exit_code
        assert "cannot open the store: this test refuses the store" in done.stderr and "goes on" in done.stderr
        now = odd.status()
        assert now["state"] == "serving" and now["daemon_pid"] == before and now["restarts"] == 1
        said = json.loads(odd.silofs("status", "--json").stdout)
        assert said["refused"]["code"] == now["refused"]["code"] == "bad_format"
        writer.progress()
        (odd.store / "refuse-new").unlink()
        odd.silofs("restart")
        assert odd.status()["refused"] is None and "bad_format" not in odd.silofs("status").stdout
        writer.progress()


def test_a_daemon_of_another_dialect_is_not_used(odd: Mount) -> None:
    with writing(odd.create("vm1", 1 << 20)) as writer:
        pid = odd.status()["daemon_pid"]
        (odd.store / "dialect").touch()
        done = odd.silofs("restart", check=False)
        assert done.returncode == 1 and "dialect" in done.stderr
        assert odd.status()["daemon_pid"] == pid
        writer.progress()


def test_a_daemon_that_lost_the_extension_is_not_used(odd: Mount) -> None:
    """Programs have been told by then that their synchronous writes are durable, and hold locks."""
    with writing(odd.create("vm1", 1 << 20)) as writer:
        pid = odd.status()["daemon_pid"]
        (odd.store / "plain").touch()
        done = odd.silofs("restart", check=False)
        assert done.returncode == 1 and "cannot do what the mount was made with: fallocate" in done.stderr
        assert odd.status()["daemon_pid"] == pid
        writer.progress()


def test_a_mount_that_was_made_without_the_extension_stays_without(tmp_path: Path) -> None:
    mount = Mount(tmp_path, daemon="tests.fuse.odd_daemon", env={"SILOFS_EXTENSION": "off"})
    with mount, writing(mount.create("vm1", 1 << 20)) as writer:
        before = mount.ask("status")["capabilities"]
        assert "write_flags" not in before
        (mount.store / "equipped").touch()
        mount.silofs("restart")
        writer.progress()
        assert mount.ask("status")["restarts"] == 1 and mount.ask("status")["capabilities"] == before


def test_a_request_that_is_withdrawn_while_it_is_read_costs_nothing(odd: Mount) -> None:
    pid = odd.status()["daemon_pid"]
    with writing(odd.create("vm1", 1 << 20)) as writer, writing(odd.create("vm2", 1 << 20)) as other:
        writer.progress()

        def happened() -> bool:
            (odd.store / "withdrawn").touch()  # again and again: a request may come after all
            return "was withdrawn" in odd.log()

        wait(happened, "a withdrawn request")
        (odd.store / "withdrawn").unlink(missing_ok=True)
        writer.progress()
        other.progress()
    assert odd.status()["daemon_pid"] == pid


def test_a_dead_holder_leaves_the_daemon_serving(mount: Mount) -> None:
    image = mount.create("vm1", 1 << 20)
    with writing(image) as writer:
        writer.progress()
        daemon = mount.status()["daemon_pid"]
        os.kill(mount.holder_pid, signal.SIGKILL)
        assert launcher.wait_gone(mount.holder_pid, timeout_s=5)
        writer.progress()
        wait(lambda: mount.ask("status")["holder_pid"] is None, "the daemon knows")
        assert mount.ask("status")["state"] == "serving"
        assert mount.silofs("restart", check=False).returncode == 75
        assert "the holder is dead" in mount.log()
        expected = image.read_bytes()[-PAGE:]
    kernel.unmount(str(mount.path), lazy=False)
    assert launcher.wait_gone(daemon, timeout_s=10), "the daemon ends with its mount"
    mount.start()
    assert image.read_bytes()[-PAGE:] == expected


def test_both_dead_is_a_dead_mount_that_the_next_one_cleans_up(mount: Mount) -> None:
    image = mount.create("vm1", 1 << 20)
    fd = os.open(image, os.O_RDWR)
    os.pwrite(fd, b"x" * PAGE, 0)
    os.fsync(fd)
    pids = mount.status()
    for role in ("holder_pid", "daemon_pid"):
        os.kill(pids[role], signal.SIGKILL)
    for role in ("holder_pid", "daemon_pid"):
        assert launcher.wait_gone(pids[role], timeout_s=5)
    wait(lambda: _errno(fd) == errno.ENOTCONN, "the mount is dead")
    os.close(fd)
    mount.start()
    assert [mounted.mountpoint for mounted in kernel.mounts()].count(str(mount.path)) == 1
    assert image.read_bytes()[:PAGE] == b"x" * PAGE


@pytest.mark.parametrize("said", [("init",), ()])
def test_a_warm_daemon_whose_holder_was_killed_before_it_came_up_ends_without_a_word(
    tmp_path: Path, said: tuple[str, ...]
) -> None:
    ours, theirs = Channel.pair()
    session, daemon_session = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    session.send(init_request(0).request)
    for op in said:
        ours.send(op)
    ours.close()
    session.close()
    command = [sys.executable, "-m", "silofs.daemon", "--store", str(tmp_path), "--mountpoint", str(tmp_path)]
    with theirs, daemon_session:
        fds = (theirs.fileno(), daemon_session.fileno())
        ends = ["--channel", str(fds[0]), "--session", str(fds[1])]
        done = subprocess.run([*command, *ends], pass_fds=fds, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def _errno(fd: int) -> int:
    try:
        os.pread(fd, PAGE, 0)
    except OSError as error:
        return error.errno or 0
    return 0


def test_umount_commits_what_was_never_synced(mount: Mount) -> None:
    image = mount.create("vm1", 1 << 20)
    image.write_bytes(b"dirty" * 1000)
    mount.stop()
    assert not (mount.store / "holder.json").exists()
    mount.start()
    assert image.read_bytes() == b"dirty" * 1000


def test_umount_is_refused_while_files_are_open(mount: Mount) -> None:
    fd = os.open(mount.create("vm1", 1 << 20), os.O_RDWR)
    fails(errno.EBUSY, kernel.unmount, str(mount.path), lazy=False)
    assert mount.silofs("umount", str(mount.path), check=False).returncode == 11
    os.kill(mount.holder_pid, signal.SIGTERM)
    wait(lambda: "cannot be unmounted" in mount.log(), "the holder says why it stays")
    os.pwrite(fd, b"x", 0)
    os.close(fd)
    mount.silofs("umount", str(mount.path))
    assert launcher.wait_gone(mount.holder_pid, timeout_s=10)


def test_a_lazy_umount_serves_open_files_to_their_end(mount: Mount) -> None:
    fd = os.open(mount.create("vm1", 1 << 20), os.O_RDWR)
    mount.silofs("umount", "--lazy", str(mount.path))
    assert not mount.is_mounted and os.listdir(mount.path) == []
    os.pwrite(fd, b"late" * 1024, 0)
    mount.wait_served(not_by=mount.kill_daemon())
    assert os.pread(fd, PAGE, 0) == b"late" * 1024
    os.close(fd)
    assert launcher.wait_gone(mount.holder_pid, timeout_s=10)
    mount.start()
    assert mount.image("vm1").read_bytes()[:PAGE] == b"late" * 1024


def test_sigterm_to_the_holder_unmounts(mount: Mount) -> None:
    mount.create("vm1", 1 << 20).write_bytes(b"kept")
    os.kill(mount.holder_pid, signal.SIGTERM)
    assert launcher.wait_gone(mount.holder_pid, timeout_s=10)
    assert not mount.is_mounted
    mount.start()
    assert mount.image("vm1").read_bytes() == b"kept"


def test_unmounted_while_no_daemon_lives_the_log_is_committed_all_the_same(odd: Mount) -> None:
    odd.create("vm1", 1 << 20).write_bytes(b"in the log only")
    (odd.store / "refuse").touch()
    odd.kill_daemon()
    wait(lambda: odd.status()["state"] == "holding", "the holder holds")
    kernel.unmount(str(odd.path), lazy=False)
    (odd.store / "refuse").unlink()
    assert launcher.wait_gone(odd.holder_pid, timeout_s=10)
    odd.start()
    assert odd.image("vm1").read_bytes() == b"in the log only"


def test_a_stopped_daemon_is_not_taken_for_a_stuck_one(mount: Mount) -> None:
    image = mount.create("vm1", 1 << 20)
    pid = mount.kill_daemon(signal.SIGSTOP)
    started = time.monotonic()
    reader = subprocess.Popen(["cat", image], stdout=subprocess.DEVNULL)
    with pytest.raises(subprocess.TimeoutExpired):
        reader.wait(0.5)
    os.kill(pid, signal.SIGCONT)
    assert reader.wait(10) == 0 and time.monotonic() - started < limits.PONG_DAEMON_S
    assert mount.status()["daemon_pid"] == pid


# What a mount cannot start with


def start_again(mount: Mount, *, store: Path | None = None, path: Path | None = None, options: str = "") -> None:
    launcher.start(launcher.command(store or mount.store, path or mount.path, options=options), store or mount.store)


def test_the_reasons_for_no_mount_are_told(mount: Mount, tmp_path: Path) -> None:
    with pytest.raises(StoreLocked):
        start_again(mount, path=tmp_path)
    with pytest.raises(NoStore):
        start_again(mount, store=tmp_path / "nowhere")
    other = tmp_path / "other-store"
    Store.create(other)
    file = tmp_path / "file"
    file.touch()
    for path, reason in ((file, UserError), (tmp_path / "nothing", UserError), (tmp_path, Busy), (mount.path, Busy)):
        with pytest.raises(reason) as caught:
            start_again(mount, store=other, path=path)
        assert type(caught.value) is reason and str(path) in str(caught.value)
    with pytest.raises(UserError, match="colour"):
        start_again(mount, store=other, path=tmp_path, options="colour")
    data = other / "data" / "data.mdb"
    os.truncate(data, 100)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(BadFormat):
        start_again(mount, store=other, path=empty)
    assert not [mounted for mounted in kernel.mounts() if mounted.source == str(other)]
    assert mount.silofs("mount", str(tmp_path), check=False).returncode == 11


def test_a_launcher_that_waits_no_more_is_missed_by_nobody(tmp_path: Path) -> None:
    """As when the store's disk was not there for a minute."""
    mount = Mount(tmp_path)
    Store.create(mount.store)
    mount.path.mkdir()
    reader, writer = os.pipe()
    pipe = f"pipe:[{os.fstat(writer).st_ino}]"
    os.close(reader)
    command = launcher.command(mount.store, mount.path)
    at = command.index("--")
    with (mount.store / launcher.LOG_FILE).open("ab") as log:
        words = [*command[:at], "--ready-fd", str(writer), *command[at:]]
        with subprocess.Popen(words, pass_fds=(writer,), stdin=subprocess.DEVNULL, stderr=log) as holder:
            os.close(writer)
            try:
                wait(lambda: launcher.holder_state(mount.store), "the holder is there")
                mount.wait_served(not_by=mount.kill_daemon())
                assert pipe not in open_files(holder.pid).values()
                assert "Error" not in mount.log()
                kernel.unmount(str(mount.path), lazy=False)
                assert holder.wait(20) == 0
            finally:
                mount.holder_pid = holder.pid
                mount.destroy()


def test_a_daemon_that_does_not_come_up_leaves_no_mount(tmp_path: Path) -> None:
    mount = Mount(tmp_path, daemon="tests.fuse.odd_daemon")
    Store.create(mount.store)
    (mount.store / "die").touch()
    try:
        with pytest.raises(SiloError, match="ended with status 3"):
            mount.start()
        assert not mount.is_mounted
    finally:
        mount.destroy()
