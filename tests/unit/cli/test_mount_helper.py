"""mount.silofs: what mount(8) passes, and the exit codes that it expects."""

from __future__ import annotations

from pathlib import Path

import pytest

from silofs.cli import mount_helper
from silofs.layers.store import Store
from silofs.mount import launcher


def test_options_of_mount_reach_the_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(launcher, "start", lambda command, store: started.append(command))
    store, mountpoint = tmp_path / "store", tmp_path / "mnt"
    args = [str(store), str(mountpoint), "-sv", "-o", "rw,nofail,listen=10.0.0.1:7011", "-o", "noatime"]
    assert mount_helper.run(args) == 0
    (command,) = started
    assert command[command.index("--options") + 1] == "rw,nofail,noatime"
    assert command[command.index("--listen") + 1] == "10.0.0.1:7011"
    assert (store / "data").is_dir()
    assert mount_helper.run([*args, "-f"]) == 0
    assert len(started) == 1


@pytest.mark.parametrize(
    "args", [[], ["store"], ["a", "b", "c"], ["a", "b", "-x"], ["a", "b", "-o"], ["a", "b", "-o", "listen=nowhere"]]
)
def test_a_wrong_invocation(args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert mount_helper.run(args) == 1
    assert not list(tmp_path.iterdir())


def test_a_store_that_is_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, mountpoint = tmp_path / "store", tmp_path / "mnt"
    mountpoint.mkdir()
    Store.create(store)
    with Store.open(store):
        assert mount_helper.run([str(store), str(mountpoint)]) == 32
    assert "in use" in capsys.readouterr().err
