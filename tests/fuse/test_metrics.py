"""`silofs metrics` against a real mount: what was done is what is counted."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from silofs.limits import ALONE_FLUSHES, IN_PLACE_REST
from tests.exposition import Family, described, fallen, golden, parse
from tests.fuse.calls import KEEP_SIZE, PUNCH_HOLE, fallocate
from tests.harness import Mount, until

pytestmark = pytest.mark.fuse

PAGE = 4096
KINDS = ("reads", "read_bytes", "writes", "written_bytes", "flushes", "discards", "discarded_bytes")


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """One for all tests: each has volumes of its own, and looks at differences."""
    with Mount(tmp_path_factory.mktemp("watched")) as mounted:
        yield mounted


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Mount]:
    with Mount(tmp_path) as mounted:
        yield mounted


def scrape(mount: Mount) -> dict[str, Family]:
    return parse(mount.silofs("metrics"))


def counted(mount: Mount, volume: str) -> dict[str, int]:
    found = scrape(mount)
    return {kind: int(found[f"silofs_volume_{kind}_total"].value(volume=volume)) for kind in KINDS}


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def test_names_kinds_and_labels_are_as_promised(mount: Mount) -> None:
    mount.silofs("create", "named", "--size", "1M")
    promised = {name: rest for name, rest in golden().items() if not name.startswith("silofs_migration_")}
    del promised["silofs_listener_connections_total"]  # this mount has no port for peers
    assert described(scrape(mount)) == promised
    as_json = mount.silofs_json("metrics")
    assert as_json["schema"] == "silofs.metrics/1"
    assert as_json["metrics"].keys() == promised.keys()


def test_what_was_done_is_counted(mount: Mount) -> None:
    for name in ("done", "idle"):
        mount.silofs("create", name, "--size", "1M")
    with opened(mount.image("done")) as fd:
        for at in range(3):
            os.pwrite(fd, b"x" * PAGE, at * PAGE)
        os.fsync(fd)
        os.fdatasync(fd)
        assert len(os.pread(fd, 2 * PAGE, 0)) == 2 * PAGE
        assert len(os.pread(fd, 4 * PAGE, (1 << 20) - PAGE)) == PAGE  # short at the end
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, (1 << 20) - PAGE, 8 * PAGE)  # of that one page is there
        found = scrape(mount)
        assert found["silofs_volume_open_files"].value(volume="done") == found["silofs_open_files"].value() == 1
    expected = {"reads": 2, "read_bytes": 3 * PAGE, "writes": 3, "written_bytes": 3 * PAGE, "flushes": 2}
    assert counted(mount, "done") == expected | {"discards": 1, "discarded_bytes": PAGE}
    assert counted(mount, "idle") == dict.fromkeys(KINDS, 0)
    assert found["silofs_volume_size_bytes"].value(volume="idle") == 1 << 20
    assert found["silofs_volume_role"].value(volume="idle", role="owner") == 1
    assert found["silofs_journal_syncs_total"].value() + found["silofs_store_commits_total"].value() > 0


def test_fsyncs_are_written_in_place_for_one_client_and_not_for_two(fresh: Mount) -> None:
    for name in ("one", "two"):
        fresh.silofs("create", name, "--size", "1M")
    until(lambda: scrape(fresh)["silofs_journal_present"].value() == 1, "there is a journal")

    def in_place() -> int:
        return int(scrape(fresh)["silofs_journal_syncs_in_place_total"].value())

    def synced(fd: int) -> None:
        os.pwrite(fd, os.urandom(PAGE), 0)
        os.fdatasync(fd)

    with opened(fresh.image("one")) as one, opened(fresh.image("two")) as two:
        for _ in range(3 * ALONE_FLUSHES):
            synced(one)
            assert len(os.pread(two, PAGE, 0)) == PAGE
        assert in_place() == 0

        def alone() -> bool:  # a slow disk is tried now and then
            for _ in range(IN_PLACE_REST):
                synced(one)
            return in_place() > 0

        until(alone, "one is alone")
        assert os.pread(one, PAGE, 0) != bytes(PAGE)


def test_the_total_has_snapshots_and_what_is_gone(mount: Mount) -> None:
    mount.silofs("create", "gone", "--size", "1M")
    mount.image("gone").write_bytes(b"x" * PAGE)
    mount.silofs("snapshot", "gone@a")
    with opened(mount.mountpoint / ".snapshots" / "gone@a.img", os.O_RDONLY) as fd:
        os.pread(fd, PAGE, 0)
    before = scrape(mount)
    reads = before["silofs_requests_total"].value(kind="read")
    assert reads >= 1
    assert before["silofs_volume_reads_total"].value(volume="gone") == 0
    mount.silofs("rm", "gone", "--yes")
    after = scrape(mount)
    assert (("volume", "gone"),) not in after["silofs_volume_reads_total"].samples
    assert after["silofs_requests_total"].value(kind="read") == reads
    assert not fallen(before, after)


def test_no_counter_falls_under_load(mount: Mount) -> None:
    """Writers and readers all the time, while volumes, snapshots and clones come and go."""
    mount.silofs("create", "busy", "--size", "64M")
    over = threading.Event()

    def load() -> None:
        with opened(mount.image("busy")) as fd:
            at = 0
            while not over.is_set():
                at = (at + 37) % 16384
                os.pwrite(fd, os.urandom(PAGE), at * PAGE)
                os.pread(fd, PAGE, at * PAGE)
                if at % 64 == 0:
                    os.fsync(fd)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        before = scrape(mount)
        for step in range(2):
            mount.silofs("snapshot", f"busy@s{step}")
            with opened(mount.mountpoint / ".snapshots" / f"busy@s{step}.img", os.O_RDONLY) as fd:
                os.pread(fd, PAGE, 0)
            mount.silofs("clone", f"busy@s{step}", "copy")
            with opened(mount.image("copy")) as fd:
                os.pwrite(fd, b"x", 0)
            now = scrape(mount)
            assert not fallen(before, now)
            mount.silofs("rm", "copy")
            mount.silofs("rm", f"busy@s{step}")
            before = scrape(mount)
            assert not fallen(now, before)
    finally:
        over.set()
        thread.join()
    assert before["silofs_volume_writes_total"].value(volume="busy") > 0


def test_deaths_and_restarts_are_counted(fresh: Mount) -> None:
    fresh.silofs("create", "vm1", "--size", "1M")
    fresh.image("vm1").write_bytes(b"x" * PAGE)
    first = scrape(fresh)
    assert (first["silofs_daemon_deaths_total"].value(), first["silofs_daemon_restarts_total"].value()) == (0, 0)
    fresh.silofs("restart")
    fresh.kill_daemon()
    now = until(lambda: _scraped(fresh, "silofs_daemon_restarts_total", 2), "the second successor serves")
    assert now["silofs_daemon_deaths_total"].value() == 1
    assert now["silofs_volume_writes_total"].value(volume="vm1") == 0  # each daemon counts from zero ...
    began = "silofs_daemon_start_time_seconds"
    assert now[began].value() > first[began].value()  # ... and says since when
    assert fresh.status()["deaths"] == 1


def _scraped(mount: Mount, name: str, wanted: int) -> dict[str, Family] | None:
    done = mount.run("metrics")
    found = parse(done.stdout) if done.stdout else {}
    return found if done.returncode == 0 and found[name].value() == wanted else None


def test_while_the_daemon_is_away_the_holder_has_its_say(fresh: Mount) -> None:
    status = fresh.status()
    os.kill(status["holder_pid"], signal.SIGSTOP)  # so that it starts no other
    try:
        os.kill(status["daemon_pid"], signal.SIGKILL)
        done = until(lambda: (found := fresh.run("metrics")).returncode == 75 and found, "nobody answers")
        found = parse(done.stdout)
        assert found["silofs_up"].value() == 0
        assert found["silofs_daemon_state"].value(state="starting") == 1
        assert "silofs_store_commits_total" not in found
        assert "does not answer" in done.stderr
    finally:
        os.kill(status["holder_pid"], signal.SIGCONT)
    until(lambda: fresh.run("status").returncode == 0, "a daemon serves again")
