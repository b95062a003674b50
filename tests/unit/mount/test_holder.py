"""What the holder decides about a silent daemon and about restarts, with daemons that are not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from silofs import limits
from silofs.mount import holder as module
from silofs.mount import prepare
from silofs.mount.child import Stage
from silofs.mount.holder import Holder
from silofs.mount.watches import Watches


class Sent:
    def __init__(self) -> None:
        self.messages: list[tuple[str, dict[str, Any]]] = []

    def send(self, op: str, fds: object = (), **fields: Any) -> bool:
        self.messages.append((op, fields))
        return True


class FakeChild:
    def __init__(self, *, held_up: bool = False) -> None:
        self.pid = 1
        self.channel = Sent()
        self.stage = Stage.SERVING
        self.started_at = 0.0
        self.changed_at = 0.0
        self.unanswered = 0
        self.held_up = held_up
        self.killed = 0

    def kill(self) -> None:
        self.killed += 1

    def enter(self, stage: Stage, now: float) -> None:
        self.stage, self.changed_at = stage, now


@pytest.fixture
def holder() -> Holder:
    """A holder that owns nothing."""
    made = Holder.__new__(Holder)
    made._restart, made._spares, made._current, made._ping_at = None, [], None, 0.0
    return made


def ping(holder: Holder, child: FakeChild, times: int = 1) -> None:
    for _ in range(times):
        holder._ping(child, holder._ping_at)  # type: ignore[arg-type]


UNANSWERED = round(limits.PONG_DAEMON_S / limits.PING_DAEMON_S)


def test_a_daemon_that_answers_lives(holder: Holder) -> None:
    child = FakeChild()
    for _ in range(100):
        ping(holder, child)
        child.unanswered = 0
    assert not child.killed
    assert [op for op, _ in child.channel.messages] == ["ping"] * 100


def test_a_silent_daemon_is_killed_once(holder: Holder) -> None:
    child = FakeChild()
    ping(holder, child, UNANSWERED)
    assert not child.killed
    ping(holder, child)
    assert child.killed == 1 and holder._ping_at == pytest.approx(limits.PONG_DAEMON_S + limits.PING_DAEMON_S)
    ping(holder, child)
    assert child.killed == 1


def test_a_daemon_is_not_silent_while_nobody_asks_it(holder: Holder) -> None:
    """The holder itself may be stopped, or wait for the disk to write its log, before or after it has asked."""
    child = FakeChild()
    for _ in range(10):
        ping(holder, child)
        holder._ping_at += 10 * limits.PONG_DAEMON_S
        ping(holder, child)
        child.unanswered = 0  # the answer to both
    assert not child.killed


def test_a_daemon_that_is_held_up_is_left_alone(holder: Holder) -> None:
    child = FakeChild(held_up=True)
    ping(holder, child, 3 * UNANSWERED)
    assert not child.killed
    child.held_up = False
    ping(holder, child, UNANSWERED - 1)
    assert not child.killed, "it gets the whole time from the moment that it can go on"
    ping(holder, child)
    assert child.killed == 1


def test_a_start_that_takes_too_long_is_ended_unless_the_daemon_is_held_up(holder: Holder) -> None:
    child = FakeChild(held_up=True)
    child.stage = Stage.OPENING
    holder._current, holder._over = child, None  # type: ignore[assignment]
    holder._timers(limits.START_S + 1)
    assert not child.killed
    child.held_up = False
    holder._timers(limits.START_S + 2)
    assert not child.killed, "it gets the whole time again"
    holder._timers(2 * limits.START_S + 2)
    assert child.killed == 1


def test_a_restart_drains_the_old_daemon_only_when_the_new_one_is_warm(
    holder: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = FakeChild(), FakeChild()
    new.stage = Stage.BOOTING
    holder._current = old  # type: ignore[assignment]
    monkeypatch.setattr(holder, "_spare", lambda: new, raising=False)
    holder._begin_restart(7)
    assert holder._spares == [new] and not old.channel.messages
    holder._begin_restart(8)
    assert old.channel.messages == [("answer", {"id": 8, "error": "another restart is under way"})]
    holder._warm(new)  # type: ignore[arg-type]
    assert old.channel.messages[1:] == [("drain", {})]


def test_a_new_daemon_that_is_dropped_is_an_answer(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = FakeChild(), FakeChild()
    holder._current = old  # type: ignore[assignment]
    monkeypatch.setattr(holder, "_spare", lambda: new, raising=False)
    holder._begin_restart(7)
    holder._drop_spare(new, "no good")  # type: ignore[arg-type]
    assert old.channel.messages == [("answer", {"id": 7, "error": "no good"})]
    assert new.killed == 1 and not holder._spares


def test_a_descriptor_that_was_given_to_another_meanwhile_is_not_served() -> None:
    """Two descriptors are ready; what is done for the first closes the second, and its number is another's then."""
    watches, called = Watches(), list[str]()
    pipes = [os.pipe() for _ in range(2)]
    for _, writer in pipes:
        os.write(writer, b"x")
    (one, _), (two, _) = pipes

    def first(fd: int) -> None:
        called.append("first")
        other = two if fd == one else one
        watches.remove(other)
        watches.add(other, lambda: called.append("new"))

    watches.add(one, lambda: first(one))
    watches.add(two, lambda: first(two))
    for then in watches.wait(0.0):
        then()
    assert called == ["first"]
    for fd in (fd for pipe in pipes for fd in pipe):
        os.close(fd)


def test_a_fault_of_the_holder_does_not_end_a_mount(
    holder: Holder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    holder._generations = 1
    holder._attempt(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    assert "ZeroDivisionError" in capsys.readouterr().err
    holder._generations = 0
    with pytest.raises(ZeroDivisionError):
        holder._attempt(lambda: 1 // 0)  # type: ignore[arg-type, return-value]


def test_what_the_holder_says_is_told_on_a_full_file_system_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = os.getpid()
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"silofs.mount.holder")
    prepare.publish(tmp_path, {"holder_pid": mine, "daemon_pid": 1})

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    prepare.publish(tmp_path, {"holder_pid": mine, "daemon_pid": 2, "why": "x" * 100})
    assert prepare.published(tmp_path) == {"holder_pid": mine, "daemon_pid": 2, "why": "x" * 100}
    prepare.publish(tmp_path, {"holder_pid": mine, "daemon_pid": None})
    assert prepare.published(tmp_path) == {"holder_pid": mine, "daemon_pid": None}
    assert [path.name for path in tmp_path.iterdir()] == [prepare.STATE_FILE]


def test_a_log_that_cannot_be_written_does_not_end_the_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is on the store's disk, which may be full: whoever ends over that takes the mount with it."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stderr", full)
        Holder._note(Holder.__new__(Holder), "a daemon died")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # what it has in its buffer goes there
