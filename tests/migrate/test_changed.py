"""Volumes that are changed while they migrate: what ends the migration, what is refused, and what a crash leaves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Mount, until

pytestmark = [pytest.mark.fuse]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Mount, Mount, str]]:
    with Mount(tmp_path / "a", listen=True) as here, Mount(tmp_path / "b", listen=True) as there:
        yield here, there, here.pair(there)


def begin(here: Mount, peer: str, *options: str, phase: str) -> str:
    """A migration of vm1, with a snapshot `s`, that has come to a phase and stays there."""
    here.silofs("create", "vm1", "--size", "16M")
    with here.image("vm1").open("r+b", buffering=0) as file:
        file.write(os.urandom(4 << 20))
    here.silofs("snapshot", "vm1@s")
    migration: str = here.silofs_json("migrate", "vm1", "--to", peer, "--detach", *options)["migration"]
    until(lambda: here.silofs_json("migration", "show", migration)["phase"] == phase, phase)
    return migration


def refused(mount: Mount, *command: str) -> None:
    done = mount.run(*command)
    assert (done.returncode, "migration" in done.stderr) == (11, True), done


@pytest.mark.parametrize("end", ["source", "destination"])
def test_what_migrates_is_not_removed_while_nothing_is_mounted(pair: tuple[Mount, Mount, str], end: str) -> None:
    here, there, peer = pair
    if end == "source":
        begin(here, peer, "--switchover", "manual", phase="precopy")
        mount = here
    else:
        begin(here, peer, "--switchover", "now", "--mode", "postcopy", "--max-bandwidth", "256K", phase="pulling")
        mount = there
    mount.stop()
    refused(mount, "rm", "vm1", "--yes")
    if end == "source":
        refused(mount, "rollback", "vm1@s", "--yes")
    mount.start()
    assert [volume["name"] for volume in mount.silofs_json("ls")["volumes"]] == ["vm1"]
    assert mount.status()["migrations"] == 1


def test_a_removal_waits_for_the_end_of_the_migration_that_it_ends(pair: tuple[Mount, Mount, str]) -> None:
    here, there, peer = pair
    migration = begin(here, peer, "--switchover", "manual", phase="precopy")
    here.silofs("rm", "vm1", "--yes")
    assert here.silofs_json("migration", "show", migration)["phase"] in ("cancelled", "failed")
    here.kill_daemon()
    assert here.silofs_json("ls")["volumes"] == []
    assert here.status()["migrations"] == 0
    until(lambda: there.silofs_json("ls")["volumes"] == [], "it is forgotten at the other end")


def test_a_daemon_that_dies_over_a_removal(tmp_path: Path) -> None:
    spent = tmp_path / "spent"
    spent.mkdir()
    fail = {"SILOFS_FAIL": "close.before_commit:kill", "SILOFS_FAIL_DIR": str(spent)}
    with Mount(tmp_path / "a", listen=True, environment=fail) as here, Mount(tmp_path / "b", listen=True) as there:
        begin(here, here.pair(there), "--switchover", "manual", phase="precopy")
        here.run("rm", "vm1", "--yes")
        until(lambda: here.run("status").returncode == 0, "a daemon serves again")
        assert list(spent.iterdir()), "it died"
        here.run("rm", "vm1", "--yes")
        assert here.silofs_json("ls")["volumes"] == []
        here.stop()
        here.start()
        assert "cannot go on" not in here.log()


def test_a_stream_does_not_come_to_a_volume_that_migrates(pair: tuple[Mount, Mount, str], tmp_path: Path) -> None:
    here, there, peer = pair
    there.silofs("create", "x", "--size", "16M")
    there.silofs("snapshot", "x@1")
    there.silofs("export", "x@1", str(tmp_path / "1"), "--format", "stream")
    with there.image("x").open("r+b", buffering=0) as file:
        file.write(os.urandom(1 << 20))
    there.silofs("snapshot", "x@2")
    there.silofs("export", "x@2", str(tmp_path / "2"), "--since", "x@1")
    here.silofs("import", str(tmp_path / "1"), "vm1")
    migration = here.silofs_json("migrate", "vm1", "--to", peer, "--detach", "--switchover", "manual")["migration"]
    until(lambda: here.silofs_json("migration", "show", migration)["phase"] == "precopy", "precopy")
    refused(here, "import", str(tmp_path / "2"), "--onto", "vm1")
    assert here.silofs_json("migration", "show", migration)["phase"] == "precopy"
    here.silofs("migration", "cancel", migration)
    until(lambda: here.status()["migrations"] == 0, "it is over")
    here.silofs("import", str(tmp_path / "2"), "--onto", "vm1")
