"""The disk is told to begin with a large commit, and only then; a commit never waits for that."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from silofs.layers.writeback import LARGE_BYTES, START, Writeback
from tests.storerig import Rig


@pytest.fixture
def told() -> list[tuple[Any, ...]]:
    return []


def watched(path: Path, told: list[tuple[Any, ...]]) -> tuple[Writeback, threading.Event]:
    path.touch()
    writeback, called = Writeback(path), threading.Event()

    def start(*arguments: Any) -> int:
        told.append(arguments)
        called.set()
        return -1  # whatever it says, it promises nothing

    writeback._start = start
    return writeback, called


def test_during_a_large_commit_it_is_told(tmp_path: Path, told: list[tuple[Any, ...]]) -> None:
    writeback, called = watched(tmp_path / "data.mdb", told)
    for _ in range(2):
        called.clear()
        with writeback.during(LARGE_BYTES):
            assert called.wait(10)
    writeback.close()
    assert told[0][3] == START


def test_a_small_commit_starts_no_thread(tmp_path: Path, told: list[tuple[Any, ...]]) -> None:
    writeback, _ = watched(tmp_path / "data.mdb", told)
    before = threading.active_count()
    with writeback.during(LARGE_BYTES - 1):
        assert threading.active_count() == before
    writeback.close()
    assert not told


def test_an_error_of_the_commit_comes_out(tmp_path: Path, told: list[tuple[Any, ...]]) -> None:
    writeback, called = watched(tmp_path / "data.mdb", told)
    with pytest.raises(OSError), writeback.during(LARGE_BYTES):
        raise OSError
    with writeback.during(LARGE_BYTES):
        assert called.wait(10)
    writeback.close()


def test_where_there_is_no_such_call_commits_go_on(rig: Rig) -> None:
    rig.store._writer._writeback._start = None
    vm1 = rig.store.write(lambda txn: txn.create_volume("vm1", 8 << 20)).uuid
    rig.put(vm1, range(1100))
    assert len(rig.read("vm1")) == 8 << 20
