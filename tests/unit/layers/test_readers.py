"""Reader slots of processes that died, and what the page cache shows that the medium does not have."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from silofs.errors import StoreBroken
from silofs.layers.filesystem import on_the_medium
from silofs.layers.store import Store
from silofs.limits import MAX_READERS, MIB

HOG = """
import sys, time
from pathlib import Path
from silofs.layers.environment import Environment
environment = Environment(Path(sys.argv[1]))
kept = [environment.begin() for _ in range(int(sys.argv[2]))]
print("ready", flush=True)
time.sleep(600)
"""


def test_slots_of_a_dead_process_are_given_to_others(tmp_path: Path) -> None:
    Store.create(tmp_path / "store")
    with Store.open(tmp_path / "store") as store:
        command = [sys.executable, "-c", HOG, str(tmp_path / "store" / "data"), str(MAX_READERS - 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline() == b"ready\n"
            readers = [store.reader()]
            with pytest.raises(StoreBroken):
                readers.append(store.reader())
            child.send_signal(signal.SIGKILL)
        readers += [store.reader() for _ in range(20)]
        for reader in readers:
            reader.close()


def test_the_medium_is_asked_and_not_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 * MIB))
    assert on_the_medium(path, [(0, 4096), (4096, 3 * MIB)])


def test_a_file_that_is_not_on_the_disk_is_not_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store.create(tmp_path / "store")
    store = Store.open(tmp_path / "store")
    monkeypatch.setattr("silofs.layers.environment.on_the_medium", lambda path, ranges: False)
    with pytest.raises(StoreBroken, match="not on the disk"):
        store.reopen()
