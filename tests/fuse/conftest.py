"""Mounts for the tests of this directory; all of them need /dev/fuse and root (marker `fuse`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuse.mounts import Mount


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """One mount for all tests of a module that leave it as they found it."""
    with Mount(tmp_path_factory.mktemp("mount")) as mount:
        yield mount


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """A mount of its own."""
    with Mount(tmp_path) as mount:
        yield mount
