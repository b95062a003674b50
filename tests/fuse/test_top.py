"""`silofs top` against a real mount: what it prints, and how it leaves a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Mount, until

pytestmark = pytest.mark.fuse

PAGE = 4096


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """One for all tests: each has volumes of its own."""
    with Mount(tmp_path_factory.mktemp("watched")) as mounted:
        yield mounted


def test_while_the_daemon_is_away_there_is_nothing_to_show(mount: Mount) -> None:
    status = mount.status()
    os.kill(status["holder_pid"], signal.SIGSTOP)  # so that it starts no other
    try:
        os.kill(status["daemon_pid"], signal.SIGKILL)
        done = until(lambda: (found := mount.run("top", "--once")).returncode == 75 and found, "nobody answers")
        assert done.stdout == ""
    finally:
        os.kill(status["holder_pid"], signal.SIGCONT)
    until(lambda: mount.run("status").returncode == 0, "a daemon serves again")


def test_top_shows_what_is_done_between_two_looks(mount: Mount) -> None:
    for name in ("written", "unwritten"):
        mount.silofs("create", name, "--size", "1M")
    with mount.image("written").open("r+b", buffering=0) as file:
        process = _top(mount, "--json", "--interval", "100ms")
        try:
            seen = 0.0
            while not seen:  # the writes are in one of the intervals
                os.pwrite(file.fileno(), b"x" * PAGE, 0)
                os.fsync(file.fileno())
                refresh = json.loads(_line(process))
                by_name = {row["name"]: row for row in refresh["volumes"]}
                seen = by_name["written"]["write_iops"]
            assert refresh["schema"] == "silofs.top/1"
            assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", refresh["time"])
            assert by_name["written"]["write_rate"] == pytest.approx(seen * PAGE, abs=0.06 * PAGE)  # both are rounded
            assert (by_name["written"]["open_count"], by_name["unwritten"]["write_rate"]) == (1, 0)
            assert refresh["total"]["write_iops"] >= seen
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=20)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 130
    assert json.loads(out.splitlines()[-1])["code"] == "interrupted"


def test_top_once_is_one_table_over_one_interval(mount: Mount) -> None:
    mount.silofs("create", "once", "--size", "1M")
    lines = mount.silofs("top", "--once", "--interval", "100ms").splitlines()
    first = [line.split()[0] for line in lines]
    assert (first[0], first[-1], first.count("once")) == ("VOLUME", "total", 1)
    assert mount.silofs("top", "--interval", "100ms").splitlines()[0] == lines[0]  # this is no terminal
    once = mount.silofs("top", "--once", "--json", "--interval", "100ms").splitlines()
    assert [json.loads(line)["schema"] for line in once] == ["silofs.top/1"]


def _top(mount: Mount, *arguments: str) -> subprocess.Popen[str]:
    command = [Path(sys.executable).parent / "silofs", "top", *arguments]
    return subprocess.Popen(
        command,
        env=mount.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=_hear_interrupts,
    )


def _hear_interrupts() -> None:
    """Whoever runs the tests in the background of a shell has SIGINT ignored, and so have its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


class Terminal:
    """`silofs top` on a terminal of its own."""

    def __init__(self, mount: Mount, **environment: str) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 100))
        self.before = termios.tcgetattr(slave)
        self._slave = slave
        self.shown = ""
        self.process = subprocess.Popen(
            [Path(sys.executable).parent / "silofs", "top", "--interval", "100ms"],
            env={**mount.environment, "TERM": "xterm-256color", **environment},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_hear_interrupts,
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)

    def until(self, text: str) -> None:
        """Read until it has shown that."""
        deadline = time.monotonic() + 20
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} was not shown: {self.shown!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                self.shown += os.read(self._master, 65536).decode()

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def ended(self) -> int:
        """Its exit code; what it shows meanwhile is read, so that it need not wait."""

        def over() -> bool:
            while select.select([self._master], [], [], 0)[0]:
                self.shown += os.read(self._master, 65536).decode()
            return self.process.poll() is not None

        until(over, "top ends")
        over()
        return self.process.returncode

    @property
    def restored(self) -> bool:
        """The settings are as before, and so is the screen."""
        alternate = (self.shown.rfind("\x1b[?1049h"), self.shown.rfind("\x1b[?1049l"))
        return termios.tcgetattr(self._slave) == self.before and alternate[0] < alternate[1]


@pytest.mark.parametrize(("ending", "code"), [("q", 0), (signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_a_terminal_is_left_as_it_was(mount: Mount, ending: str | int, code: int) -> None:
    with Terminal(mount) as terminal:
        terminal.until("total ")
        assert not terminal.restored
        if isinstance(ending, str):
            terminal.type(ending)
        else:
            terminal.process.send_signal(ending)
        assert terminal.ended() == code
        assert terminal.restored
        assert "Traceback" not in terminal.shown


def test_the_live_table_outlives_the_daemon_and_has_no_colour_if_told(mount: Mount) -> None:
    with Terminal(mount, NO_COLOR="1") as terminal:
        terminal.until("serving, ")
        assert "later" not in terminal.shown
        mount.silofs("restart")
        mount.silofs("create", "later", "--size", "1M")
        terminal.until("later ")
        terminal.type("q")
        assert terminal.ended() == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", terminal.shown)
