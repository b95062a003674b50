"""The tables of docs/testing.md name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def test_every_test_that_is_named_exists() -> None:
    page = (TESTS.parent / "docs" / "testing.md").read_text()
    known: set[str] = set()
    for path in TESTS.rglob("*.py"):
        known |= {path.stem, *re.findall(r"def (test_\w+)", path.read_text())}
    assert not set(re.findall(r"\btest_\w+\b", page)) - known
    assert all(
        (TESTS / path).exists() for path in re.findall(r"`((?:fuse|crash|faults|migrate|qemu|sim)/\w+\.py)", page)
    )
