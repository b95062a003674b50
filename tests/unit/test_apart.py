"""Work in a child: what comes back is what would have been here, and what ends the child is said."""

from __future__ import annotations

import errno
import faulthandler
import os
import signal
import threading
from pathlib import Path
from typing import Any, NoReturn

import pytest

from silofs import apart
from silofs.apart import Killed, Say
from silofs.errors import NoSuchVolume

Fields = dict[str, Any]


def unheard(fields: Fields) -> NoReturn:
    pytest.fail(f"nothing is said: {fields}")


def test_a_result_comes_back_after_what_was_said() -> None:
    def work(say: Say) -> tuple[int, int]:
        for number in range(3):
            say({"done": number})
        return os.getpid(), os.getppid()

    said: list[Fields] = []
    child, parent = apart.run(work, said.append)
    assert said == [{"done": 0}, {"done": 1}, {"done": 2}]
    assert child != os.getpid() == parent


@pytest.mark.parametrize(
    "error",
    [
        NoSuchVolume("there is no volume 'x'", hint="look for it"),
        OSError(errno.ENOSPC, "No space left on device", "/a/file"),
        KeyboardInterrupt(),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ],
)
def test_an_error_comes_back_as_it_was(error: BaseException) -> None:
    def work(say: Say) -> NoReturn:
        raise error

    with pytest.raises(type(error)) as caught:
        apart.run(work, unheard)
    assert str(caught.value) == str(error) and caught.value.args == error.args
    assert getattr(caught.value, "hint", None) == getattr(error, "hint", None)
    assert getattr(caught.value, "filename", None) == getattr(error, "filename", None)
    assert "in work\n" in caught.value.__notes__[0], "--debug shows where it was raised"


def test_an_error_that_cannot_travel_is_told() -> None:
    class Local(Exception):
        pass

    def work(say: Say) -> NoReturn:
        raise Local("of this test")

    with pytest.raises(RuntimeError, match="Local: of this test"):
        apart.run(work, unheard)


@pytest.mark.parametrize("number", [signal.SIGBUS, signal.SIGABRT, signal.SIGKILL])
def test_what_ends_the_child_is_told(number: int) -> None:
    said: list[Fields] = []

    def work(say: Say) -> None:
        faulthandler.disable()  # pytest's
        say({"done": 1})
        os.kill(os.getpid(), number)

    with pytest.raises(Killed) as caught:
        apart.run(work, said.append)
    assert caught.value.number == number and said == [{"done": 1}]


def test_a_child_that_is_not_wanted_any_more_puts_away_its_work(tmp_path: Path) -> None:
    """As with ^C: who listens is interrupted, and the child is when it has been waited for."""
    left = tmp_path / "left"
    left.touch()

    def work(say: Say) -> None:
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "^C is for the parent"
        try:
            say({"done": 1})
            threading.Event().wait(60)
        except KeyboardInterrupt:
            left.unlink()
            raise

    def interrupted(_: Fields) -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apart.run(work, interrupted)
    assert not left.exists()


def test_a_parent_that_is_killed_takes_the_child_with_it() -> None:
    reading, writing = os.pipe()
    middle = os.fork()
    if not middle:
        os.close(reading)

        def work(say: Say) -> None:
            os.kill(os.getppid(), signal.SIGKILL)
            threading.Event().wait(60)

        apart.run(work, unheard)
        os._exit(1)
    os.close(writing)
    assert os.WTERMSIG(os.waitpid(middle, 0)[1]) == signal.SIGKILL
    assert os.read(reading, 1) == b"", "nobody has the other end any more"
    os.close(reading)
