"""`silofs restart` under load, from a program that knows an older version of the write log, and to one; log files.

The older program is today's with the layout of version 1 (tests/fuse/odd_daemon.py): no lock table, and nothing known
of what comes behind the ring.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from silofs import limits
from silofs.layers.schema import FORMAT_VERSION
from silofs.mount import prepare
from silofs.mount.logfile import LOG_FILE
from tests.fuse.mounts import Mount, open_files, wait
from tests.fuse.test_deaths import daemons, writing

pytestmark = pytest.mark.fuse


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[Mount]:
    with Mount(tmp_path, daemon="tests.fuse.odd_daemon") as mount:
        yield mount


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Mount]:
    """A mount that the older program has made."""
    mount = Mount(tmp_path, daemon="tests.fuse.odd_daemon")
    mount.store.mkdir()
    from silofs.layers.store import Store

    Store.create(mount.store)
    (mount.store / "old-log").touch()
    with mount:
        yield mount


def log_version(mount: Mount) -> int:
    for link, name in open_files(mount.holder_pid).items():
        if "memfd:silofs-log" in name:
            fd = os.open(link, os.O_RDONLY)
            try:
                return prepare.log_version(fd)
            finally:
                os.close(fd)
    raise AssertionError("the holder has no log")


def test_a_new_program_takes_over_the_log_of_an_old_one(old: Mount) -> None:
    with writing(old.create("vm1", 1 << 20)) as writer, writing(old.create("vm2", 1 << 20)) as other:
        writer.progress()
        assert log_version(old) == 1
        (old.store / "old-log").unlink()
        old.silofs("restart")
        assert log_version(old) == 2
        writer.progress()
        # The old program's successor, which had been warm, has gone: it could not take this log any more.
        wait(lambda: old.silofs("status").returncode == 0 and len(daemons(old)) == 2, "a successor of the new program")
        old.wait_served(not_by=old.kill_daemon())
        writer.progress()
        other.progress()
    assert log_version(old) == 2


def test_a_new_program_that_is_killed_before_it_serves_has_changed_nothing(tmp_path: Path) -> None:
    """Then a daemon of the old program, which is warm, goes on."""
    spent = tmp_path / "spent"
    spent.mkdir()
    env = {"SILOFS_FAIL": "log.upgrade:kill", "SILOFS_FAIL_DIR": str(spent)}
    mount = Mount(tmp_path, daemon="tests.fuse.odd_daemon", env=env)
    from silofs.layers.store import Store

    Store.create(mount.store)
    (mount.store / "old-log").touch()
    with mount, writing(mount.create("vm1", 1 << 20)) as writer:
        (mount.store / "old-log").unlink()
        mount.silofs("restart")
        assert (spent / "log.upgrade").exists()
        wait(lambda: log_version(mount) == 2, "a later daemon of the new program has done it")
        writer.progress()


def test_an_old_program_does_not_get_a_log_that_it_does_not_know(odd: Mount) -> None:
    with writing(odd.create("vm1", 1 << 20)) as writer:
        pid = odd.status()["daemon_pid"]
        (odd.store / "old-log").touch()
        done = odd.silofs("restart", check=False)
        assert done.returncode == 1 and "does not know version 2 of the write log" in done.stderr
        assert odd.status()["daemon_pid"] == pid and log_version(odd) == 2
        writer.progress()


def test_a_program_of_before_the_stores_format_is_not_used_however_often_it_is_tried(odd: Mount) -> None:
    """Before the present daemon is told to go: there may be no other that can open the store."""
    with writing(odd.create("vm1", 1 << 20)) as writer:
        pid = odd.status()["daemon_pid"]
        (odd.store / "old-format").touch()
        for _ in range(3):
            done = odd.silofs("restart", check=False)
            assert done.returncode == 1 and f"does not know version {FORMAT_VERSION} of the store" in done.stderr
            assert odd.status()["daemon_pid"] == pid
            writer.progress()
        # All that could follow are of that program. It is said why nobody does, and ends when the program is right.
        while wait(lambda: (state := odd.status()["state"]) != "starting" and state, "an end") == "serving":
            pid = odd.kill_daemon()
            wait(lambda pid=pid: odd.status()["daemon_pid"] != pid, "it is seen")
        why = wait(lambda: odd.status().get("why"), "it is said why")
        assert "does not know version" in why
        (odd.store / "old-format").unlink()
        writer.progress()


def test_what_is_held_says_why_and_until_when(odd: Mount) -> None:
    with writing(odd.create("vm1", 1 << 20)) as writer:
        (odd.store / "refuse").touch()
        odd.kill_daemon()
        wait(lambda: odd.status()["state"] == "holding", "the holder holds")
        done = odd.silofs("status", "--json", check=False)
        assert done.returncode == 75
        assert '"state": "holding"' in done.stdout and "this test refuses the store" in odd.status()["why"]
        at = time.strptime(odd.status()["next_try"], "%Y-%m-%dT%H:%M:%SZ")
        assert time.mktime(at) - time.mktime(time.gmtime()) <= limits.CRASH_DELAY_MAX_S
        (odd.store / "refuse").unlink()
        writer.progress()
    assert "why" not in odd.status()


def test_the_log_file_is_renewed_and_everybody_goes_along(mount: Mount) -> None:
    log = mount.store / LOG_FILE
    wait(lambda: len(daemons(mount)) == 2, "a successor")
    with log.open("a") as file:
        file.write("long ago\n" * (limits.LOG_FILE_BYTES // 9 + 1))
    wait(lambda: log.stat().st_size < 10000, "a new log")
    assert "long ago" in (mount.store / f"{LOG_FILE}.1").read_text()

    def writes_there(pid: int) -> bool:
        return Path(f"/proc/{pid}/fd/2").readlink() == log

    wait(lambda: all(writes_there(pid) for pid in (mount.holder_pid, *daemons(mount))), "all of them write there")
    mount.wait_served(not_by=mount.kill_daemon())
    assert "was killed by SIGKILL" in log.read_text() and "long ago" not in log.read_text()


def test_a_command_does_not_wait_for_a_daemon_that_is_stopped(mount: Mount, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = mount.kill_daemon(signal.SIGSTOP)
    try:
        started = time.monotonic()
        done = mount.silofs("ls", check=False)
        assert done.returncode == 75 and "does not answer" in done.stderr
        assert time.monotonic() - started < limits.ANSWER_S + limits.SIGN_OF_LIFE_S + 3
    finally:
        os.kill(pid, signal.SIGCONT)
    assert mount.silofs("ls").returncode == 0
