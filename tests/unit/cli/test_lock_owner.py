"""Who holds a store: the file is known by device and number, since numbers repeat on every file system."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from silofs.cli.runner import lock_owner
from tests import smallfs


def test_the_same_number_on_another_file_system_is_another_store(tmp_path: Path) -> None:
    assert lock_owner(tmp_path / "nowhere") is None
    with smallfs.small("tmpfs", 1, tmp_path) as one:
        (tmp_path / "two").mkdir()
        with smallfs.small("tmpfs", 1, tmp_path / "two") as two:
            for each in (one, two):
                (each / "lock").touch()
            if (one / "lock").stat().st_ino != (two / "lock").stat().st_ino:
                pytest.fail("two new file systems number their first files alike")
            with (one / "lock").open("r+b") as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                assert lock_owner(one) == os.getpid()
                assert lock_owner(two) is None
            assert lock_owner(one) is None
