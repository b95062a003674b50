"""Either daemon dies at a named step of the protocol: the migration goes on, and nothing acknowledged is missing.

Each failpoint fires once (SILOFS_FAIL_DIR); the holder starts the next daemon, which resumes from its records.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from silofs.limits import BULK_WINDOW_BYTES
from tests.harness import Mount, until
from tests.migrate.writer import PAGE, Writer

pytestmark = [pytest.mark.fuse, pytest.mark.crash]

MIB = 1 << 20
PAGES = 4096
AT_SOURCE = (
    "offer.after_commit",
    "precopy.after_seal",
    "round.after_commit",
    "bulk.after_reply",
    "freeze.after_seal",
    "cede.before_commit",
    "cede.after_commit",
    "source.pulling",
    "retire.before_commit",
    "retire.after_commit",
)
AT_TARGET = (
    "incoming.before_commit",
    "incoming.after_commit",
    "map.after_commit",
    "sweep.after_batch",
    "own.before_commit",
    "own.after_commit",
    "complete.before_commit",
    "complete.after_commit",
    "close.before_commit",
)


def failing(directory: Path, points: tuple[str, ...]) -> dict[str, str]:
    spent = directory / "spent"
    spent.mkdir(parents=True)
    return {"SILOFS_FAIL": ",".join(f"{point}:kill" for point in points), "SILOFS_FAIL_DIR": str(spent)}


def spent(directory: Path) -> set[str]:
    return {path.name for path in (directory / "spent").iterdir()}


def move_under_kills(tmp_path: Path, source: tuple[str, ...], target: tuple[str, ...]) -> None:
    with (
        Mount(tmp_path / "a", listen=True, environment=failing(tmp_path / "a", source)) as a,
        Mount(tmp_path / "b", listen=True, environment=failing(tmp_path / "b", target)) as b,
    ):
        there = a.pair(b)
        a.silofs("create", "vm1", "--size", "64M")
        still = os.urandom(16 * MIB)
        with a.image("vm1").open("r+b", buffering=0) as image:
            os.pwrite(image.fileno(), still, 32 * MIB)
        writer = Writer([a.image("vm1"), b.image("vm1")], PAGES, pause=0.001)
        writer.start()
        until(lambda: writer.acknowledged > 200, "the writer writes")
        a.run("migrate", "vm1", "--to", there, "--switchover", "now", "--fence-writer", "--detach")
        until(lambda: spent(tmp_path / "a") == set(source), f"A dies at {source}", timeout=60)
        until(lambda: spent(tmp_path / "b") == set(target), f"B dies at {target}", timeout=60)
        until(lambda: a.run("migration", "ls", "--json").returncode == 0, "A answers")
        until(
            lambda: [m["phase"] for m in a.silofs_json("migration", "ls")["migrations"]] == ["complete"],
            "A knows that it is complete",
            timeout=60,
        )
        until(lambda: writer.stale and writer.acknowledged > writer.stale[0] + 200, "the writer goes on at B")
        writer.stop()
        writer.check(b.image("vm1"))
        assert b.image("vm1").read_bytes()[32 * MIB : 48 * MIB] == still
        assert b.silofs_json("info", "vm1")["role"] == "owner"
        assert a.silofs_json("info", "vm1")["role"] == "tombstone"
        for side in (a, b):
            assert "Traceback" not in side.log()
            assert side.silofs_json("check", "--read-data")["findings"] == []


@pytest.mark.parametrize("point", ["bulk.after_reply", "freeze.after_seal", "cede.before_commit", "cede.after_commit"])
def test_the_source_dies(tmp_path: Path, point: str) -> None:
    move_under_kills(tmp_path, (point,), ())


@pytest.mark.parametrize(
    "point", ["incoming.after_commit", "sweep.after_batch", "own.before_commit", "own.after_commit"]
)
def test_the_destination_dies(tmp_path: Path, point: str) -> None:
    move_under_kills(tmp_path, (), (point,))


def test_both_die_at_every_step_in_turn(tmp_path: Path) -> None:
    move_under_kills(tmp_path, AT_SOURCE, AT_TARGET)


def test_what_is_durable_at_the_destination_is_not_sent_again(tmp_path: Path) -> None:
    data = os.urandom(64 * MIB)
    with Mount(tmp_path / "a", listen=True) as a, Mount(tmp_path / "b", listen=True) as b:
        there = a.pair(b)
        a.silofs("create", "vm1", "--size", "64M")
        a.image("vm1").open("r+b").write(data)
        command = ("migrate", "vm1", "--to", there, "--switchover", "now", "--mode", "postcopy")
        name = a.silofs_json(*command, "--max-bandwidth", "32M", "--detach")["migration"]
        until(lambda: 0 < _left(b, name) < 32 * MIB, "half of it is durable at B")
        b.kill_daemon()
        with b.image("vm1").open("rb", buffering=0) as image:
            assert os.pread(image.fileno(), PAGE, 63 * MIB) == data[63 * MIB : 63 * MIB + PAGE]
        until(lambda: a.silofs_json("migration", "show", name)["phase"] == "complete", "complete")
        sent = a.silofs_json("migration", "show", name)["bytes_sent"]
        assert len(data) <= sent <= len(data) + BULK_WINDOW_BYTES + MIB
        assert b.image("vm1").read_bytes() == data
        print(f"{sent / MIB:.1f} MiB sent for {len(data) / MIB:.0f} MiB")


def test_daemons_are_replaced_in_the_sweep(tmp_path: Path) -> None:
    """`silofs restart` at both ends: an upgrade in the middle of a migration."""
    data = os.urandom(32 * MIB)
    with Mount(tmp_path / "a", listen=True) as a, Mount(tmp_path / "b", listen=True) as b:
        there = a.pair(b)
        a.silofs("create", "vm1", "--size", "32M")
        a.image("vm1").open("r+b").write(data)
        command = ("migrate", "vm1", "--to", there, "--switchover", "now", "--mode", "postcopy")
        name = a.silofs_json(*command, "--max-bandwidth", "16M", "--detach")["migration"]
        until(lambda: _left(b, name) > 0, "pulling")
        for side in (b, a):
            side.silofs("restart")
            with b.image("vm1").open("rb", buffering=0) as image:
                assert os.pread(image.fileno(), PAGE, 31 * MIB) == data[31 * MIB : 31 * MIB + PAGE]
        until(lambda: a.silofs_json("migration", "show", name)["phase"] == "complete", "complete")
        assert b.image("vm1").read_bytes() == data


def _left(side: Mount, name: str) -> int:
    done = side.run("migration", "show", name, "--json")
    if done.returncode != 0:
        return 0
    shown = side.silofs_json("migration", "show", name)
    return int(shown["bytes_left"]) if shown["phase"] == "pulling" else 0
