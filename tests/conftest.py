"""What all tests share: the options, and which tests a machine cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills", type=int, default=2, help="SIGKILLs of the daemon in each test of tests/crash/test_kills.py"
    )
    parser.addoption("--cuts", type=int, default=200, help="power cuts in tests/crash/test_powercut.py")


def pytest_sessionstart() -> None:
    """The C extension is built as an installation builds it, where it is not there or older than its source."""
    root = Path(__file__).parents[1]
    source = root / "silofs/mount/extension/dispatch.c"
    library = source.with_suffix(".so")
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=root, check=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a mount are skipped where there can be none; .ci/run allows no such skip where there can."""
    if Path("/dev/fuse").exists() and os.geteuid() == 0:
        return
    skip = pytest.mark.skip(reason="needs /dev/fuse and root")
    for item in items:
        if item.get_closest_marker("fuse"):
            item.add_marker(skip)


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    number: int = request.config.getoption("--kills")
    return number


@pytest.fixture
def cuts(request: pytest.FixtureRequest) -> int:
    number: int = request.config.getoption("--cuts")
    return number
