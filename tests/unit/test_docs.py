"""The tables of docs/testing.md name tests that exist, and docs/metrics.md lists the metrics as they are."""

from __future__ import annotations

import re
from pathlib import Path

from silofs.metrics import TABLE

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


def test_every_metric_is_listed_as_it_is() -> None:
    page = (TESTS.parent / "docs" / "metrics.md").read_text()
    golden = (TESTS / "golden" / "metrics.txt").read_text().splitlines()
    labels = {words[0]: words[2:] for words in map(str.split, golden)}
    rows = [
        f"| `{each.name}` | {each.kind} | {' '.join(f'`{label}`' for label in labels[each.name])} | {each.help} |"
        for each in TABLE
    ]
    assert page.endswith("\n".join(rows) + "\n")
