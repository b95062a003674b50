"""Power cuts at random moments: what was synced is there, the rest is a prefix, and the store is whole (G1 and G2)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash import mutant, upkeep
from tests.crash.explore import explore
from tests.crash.telling import record, scratch

pytestmark = [pytest.mark.fuse, pytest.mark.crash]


STEPS = {
    *("commit.grown", "commit.before", "commit.durable", "commit.before_release", "commit.published"),
    *("journal.filled", "journal.formatted", "journal.before_write", "journal.durable", "journal.retired"),
    *("recover.before_commit", "recover.after_commit", "share.before_commit", "share.durable"),
    *("rewrite.before_commit", "rewrite.durable", "cells.written", "cells.synced"),
}
"""Behind each of these the power goes at least once."""

# What a store that forgot to sync would do. LMDB writes its meta page through a descriptor opened O_DSYNC, which stays.
FORGETFUL = """
int fsync(int fd) { return 0; }
int fdatasync(int fd) { return 0; }
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with scratch() as made:
        yield made


def test_synced_writes_survive_and_the_rest_is_a_prefix(
    directory: Path, cuts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    record(directory, seed="power")
    found = explore(directory, cuts=cuts)
    with capsys.disabled():
        print(f"\n{found.cuts} power cuts, anywhere and behind {', '.join(found.steps)}")
    assert not found.problems, "\n".join(found.problems)
    assert cuts < 100 or set(found.steps) >= STEPS


@pytest.mark.parametrize(("what", "share"), [("background", 2), ("upgrade", 10)])
def test_background_work_and_upgrades_change_nothing_that_is_seen(
    directory: Path, what: str, share: int, cuts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    upkeep.record(directory, what)
    found = explore(directory, cuts=cuts // share)
    with capsys.disabled():
        print(f"\n{what}: {found.cuts} power cuts, anywhere and behind {', '.join(found.steps)}")
    assert not found.problems, "\n".join(found.problems)


def test_long_writes_that_go_ahead_of_their_commit(
    directory: Path, cuts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    record(directory, seed="ahead", environment=mutant.environment(directory, "eager_ahead"))
    found = explore(directory, cuts=cuts // 4)
    with capsys.disabled():
        print(f"\nahead: {found.cuts} power cuts, anywhere and behind {', '.join(found.steps)}")
    assert not found.problems, "\n".join(found.problems)
    assert cuts < 100 or "ahead.written" in found.steps


def test_a_store_that_does_not_sync_is_noticed(directory: Path) -> None:
    """The negative control: the same test fails soon when fdatasync(2) does nothing."""
    library = directory / "forgetful.so"
    compiler = ["gcc", "-shared", "-fPIC", "-x", "c", "-o", library, "-"]
    subprocess.run(compiler, input=FORGETFUL, text=True, check=True)
    assert noticed(directory, {"LD_PRELOAD": str(library)})


def test_a_mount_that_does_not_see_the_flags_of_a_write_is_noticed(directory: Path) -> None:
    """The same for RWF_DSYNC: without the extension such a write is acknowledged as if it were a plain one."""
    assert noticed(directory, {"SILOFS_EXTENSION": "off"})


@pytest.mark.parametrize("name", mutant.MUTANTS)
def test_a_mistake_in_what_is_durable_when_is_noticed(directory: Path, name: str) -> None:
    assert noticed(directory, mutant.environment(directory, name))


def noticed(directory: Path, environment: dict[str, str], *, cuts: int = 60) -> bool:
    """Whether the story finds out, while it is told or after a cut, what is wrong with this silofs."""
    try:
        record(directory, seed="mutant", environment=environment)
    except AssertionError:
        return True
    return bool(explore(directory, cuts=cuts).problems)
