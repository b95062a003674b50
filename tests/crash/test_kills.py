"""The daemon is killed under a working exerciser: I/O pauses, nothing fails, nothing acknowledged is lost.

More kills than CI has time for: pytest tests/crash/test_kills.py --kills 20 -s
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.exerciser import completions, pauses, verify
from tests.harness import Mount, until

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.fuse, pytest.mark.crash]

# Longer than a restart takes on a busy machine of two cores: the test is about errors; the pause is printed.
KILL_EVERY_S = (1.2, 2.5)


@pytest.mark.parametrize("mode", ["direct", "direct512", "buffered", "fsync"])
def test_io_goes_on_under_kills(tmp_path: Path, mode: str, kills: int, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(mode)
    log = tmp_path / "log"
    with Mount(tmp_path / "host") as mount:
        image = mount.mountpoint / "disk.img"
        image.touch()
        os.truncate(image, 64 << 20)
        command = [sys.executable, "-m", "tests.exerciser", "run", image, "--log", log, "--mode", mode, "--seed", "3"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as work:
            try:
                moments, pids = [], set()
                for _ in range(kills):
                    time.sleep(rng.uniform(*KILL_EVERY_S))
                    assert work.poll() is None, work.stdout and work.stdout.read()
                    pids.add(mount.kill_daemon())
                    moments.append(time.monotonic_ns())
                time.sleep(2.0)
                assert work.poll() is None, work.stdout and work.stdout.read()
            finally:
                work.terminate()
        assert len(pids) == kills and mount.status()["daemon_pid"] not in pids
        completed = completions(log)
        verify(image, log)
        mount.stop()
        mount.start()
        verify(image, log)
    waits = pauses(completed, moments)
    with capsys.disabled():
        print(
            f"\n{mode}: {kills} kills, {len(completed)} operations, no error, no difference; "
            f"pause median {statistics.median(waits):.2f} s, worst {max(waits):.2f} s"
        )


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("place", ["cells.written", "cells.synced"])
def test_killed_between_cells_and_their_commit(tmp_path: Path, place: str, count: int) -> None:
    """What lies in cells by then nobody refers to; the next daemon commits the same again, from the write log."""
    log, fired = tmp_path / "log", tmp_path / "fired"
    fired.mkdir()
    environment = {"SILOFS_FAIL": f"{place}:kill@{count}", "SILOFS_FAIL_DIR": str(fired)}
    with Mount(tmp_path / "host", environment=environment) as mount:
        image = mount.mountpoint / "disk.img"
        image.touch()
        os.truncate(image, 64 << 20)
        command = [sys.executable, "-m", "tests.exerciser", "run", image, "--log", log, "--seed", "5"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as work:
            try:
                until((fired / place).exists, f"the daemon to die at {place}", timeout=60)
                died = len(completions(log))
                until(lambda: len(completions(log)) > died + 300, "the next daemon to serve", timeout=60)
                assert work.poll() is None, work.stdout and work.stdout.read()
            finally:
                work.terminate()
        verify(image, log)
        mount.silofs("check", "--read-data")
        mount.stop()
        mount.start()
        verify(image, log)
    assert (mount.store / "data" / "cells").stat().st_blocks
