"""Every operation with its Nth system call failing: a sample here, all of them with `scripts/soak --faults`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.telling import scratch
from tests.faults.nth import OPERATIONS, run

pytestmark = pytest.mark.crash

READS = {"export", "check"}


@pytest.fixture
def directory() -> Iterator[Path]:
    with scratch() as made:
        yield made


def test_an_operation_is_done_or_refused_whatever_call_fails(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = run(directory, "--share", "0.04")
    with capsys.disabled():
        print(f"\n{tried.trials} trials, {sum(tried.met.values())} failing calls")
    assert not tried.problems, "\n".join(tried.problems)
    assert not {name for name in OPERATIONS if not tried.met.get(name)} - READS, "these met no fault"


@pytest.mark.parametrize(("mistake", "operation"), [("unsynced", "snapshot"), ("unsynced-cells", "commit-large")])
def test_a_mistake_is_noticed(directory: Path, mistake: str, operation: str) -> None:
    """The negative control."""
    assert run(directory, "--share", "0.04", "--mistake", mistake, "--only", operation).problems
