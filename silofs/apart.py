"""Work in a child of this process, for what may end the process that does it: a page of the store's map that the disk
cannot give is a SIGBUS, and an assertion of LMDB's a SIGABRT. The parent lives, and says so.

The child is a fork: it has everything that the parent has, files included. Progress, the result and whatever is raised
come back over a pipe; ^C reaches the parent alone, which has the child end as if it had been pressed there, and waits
for it. A parent that is killed takes the child with it.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, Final, NoReturn, TypeVar

T = TypeVar("T")
Say = Callable[[dict[str, Any]], None]

_DIE_WITH_PARENT: Final = 1  # prctl(2): PR_SET_PDEATHSIG


class Killed(Exception):
    """The child died of a signal (of `number`) or of nothing that it could tell (0)."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name if number else "no answer")
        self.number = number


def run(work: Callable[[Say], T], progress: Say) -> T:
    """The result of `work`, which is given where to say what it has done. Raises what it raised, and Killed."""
    reading, writing = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if not child:
        os.close(reading)
        _work(work, writing, parent)
    os.close(writing)
    try:
        with open(reading, "rb") as answers:
            try:
                outcome = _listen(answers, progress)
            except BaseException:
                os.kill(child, signal.SIGTERM)
                _listen(answers, lambda _: None)  # until it has put away what it was at
                raise
    finally:
        _, status = os.waitpid(child, 0)
    if outcome is None:
        raise Killed(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)
    kind, value = outcome
    if kind == "error":
        raise value
    result: T = value
    return result


def _listen(answers: IO[bytes], progress: Say) -> tuple[str, Any] | None:
    """What the child says last; None when it died before that."""
    while True:
        try:
            kind, value = pickle.load(answers)
        except (EOFError, pickle.UnpicklingError):
            return None
        if kind != "progress":
            return kind, value
        progress(value)


def _work(work: Callable[[Say], Any], writing: int, parent: int) -> NoReturn:
    """The child."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            _end()
        with open(writing, "wb") as out:

            def say(kind: str, value: Any) -> None:
                pickle.dump((kind, value), out)
                out.flush()

            try:
                result = work(lambda fields: say("progress", fields))
            except BaseException as error:
                say("error", _portable(error))
            else:
                say("result", result)
    finally:
        _end()


def _end() -> NoReturn:
    os._exit(0)  # what the parent has in its buffers is the parent's to write


def _portable(error: BaseException) -> BaseException:
    """The error, if it comes out of a pipe as it went in, with where it was raised for --debug."""
    text = "".join(traceback.format_exception(error))
    with suppress(Exception):
        error.add_note(text)
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    return RuntimeError(f"{type(error).__name__}: {error}\n{text}")
