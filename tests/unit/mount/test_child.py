"""What the holder can tell of a daemon by looking at its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from silofs.mount.child import Child


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """One that waits for its standard input to end, on two threads."""
    program = "import sys, threading; threading.Thread(target=sys.stdin.read).start(); print(flush=True)"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def child(pid: int) -> Child:
    made = Child.__new__(Child)
    made.pid = pid
    return made


def test_one_that_sleeps_is_not_held_up(process: subprocess.Popen[bytes]) -> None:
    assert not child(process.pid).held_up


def test_one_that_somebody_stopped_is(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert child(process.pid).held_up
    process.send_signal(signal.SIGCONT)
    os.waitid(os.P_PID, process.pid, os.WCONTINUED | os.WNOWAIT)
    assert not child(process.pid).held_up


def test_so_is_one_of_which_any_thread_waits_in_the_kernel(
    process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter("SD")
    monkeypatch.setattr("silofs.mount.child._state", lambda thread: next(states))
    assert child(process.pid).held_up


def test_one_that_is_gone_is_not(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert not child(process.pid).held_up
