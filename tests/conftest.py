"""What all tests share: the options, and which tests a machine cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hypothesis
import pytest

# The same examples each time, however slow the machine is: a test says something of the code and not of the hour.
hypothesis.settings.register_profile("silofs", derandomize=True, deadline=None)
hypothesis.settings.load_profile("silofs")

BUDGETS_S = {
    "unit": 240,
    "stateful": 120,
    "sim": 120,
    "golden": 30,
    "fuse": 360,
    "faults": 360,
    "crash": 600,
    "migrate": 480,
    "qemu": 360,
}
"""Seconds that all tests of a directory may take on two quiet cores: what is over is a warning, since no machine is
known to be quiet. docs/testing.md has the sum."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills", type=int, default=2, help="SIGKILLs of the daemon in each test of tests/crash/test_kills.py"
    )
    parser.addoption("--cuts", type=int, default=200, help="power cuts in tests/crash/test_powercut.py")


def pytest_sessionstart() -> None:
    """The C libraries are built as an installation builds them, where one is not there or older than its source."""
    root = Path(__file__).parents[1]
    sources = [root / "silofs/mount/extension/dispatch.c", root / "silofs/layers/native/objects.c"]
    libraries = [source.with_suffix(".so") for source in sources]
    if any(
        not library.exists() or library.stat().st_mtime < source.stat().st_mtime
        for source, library in zip(sources, libraries, strict=True)
    ):
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=root, check=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a mount are skipped where there can be none; .ci/run allows no such skip where there can."""
    if Path("/dev/fuse").exists() and os.geteuid() == 0:
        return
    skip = pytest.mark.skip(reason="needs /dev/fuse and root")
    for item in items:
        if item.get_closest_marker("fuse"):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Time by directory, beside its budget."""
    spent: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                spent[Path(report.nodeid).parts[1]] += report.duration
    terminalreporter.section("time by directory")
    for name, seconds in spent.most_common():
        budget = BUDGETS_S.get(name)
        over = "" if budget is not None and seconds <= budget else "   OVER ITS BUDGET"
        terminalreporter.write_line(f"{name:9} {seconds:6.0f} s of {budget or 0}{over}")


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    number: int = request.config.getoption("--kills")
    return number


@pytest.fixture
def cuts(request: pytest.FixtureRequest) -> int:
    number: int = request.config.getoption("--cuts")
    return number
