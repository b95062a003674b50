"""An idle volume moves between two mounts by the shipped command."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.harness import Failed, Mount, until

pytestmark = pytest.mark.fuse

MIB = 1 << 20


def test_an_idle_volume_moves_and_comes_back_cheaply(tmp_path: Path) -> None:
    data = os.urandom(16 * MIB)
    with Mount(tmp_path / "a", listen=True) as a, Mount(tmp_path / "b", listen=True) as b:
        there = a.pair(b)
        back = b.silofs_json("peer", "ls")["peers"][0]["name"]
        a.silofs("create", "vm1", "--size", "256M")
        with a.image("vm1").open("r+b") as image:
            image.seek(32 * MIB)
            image.write(data)
        a.silofs("snapshot", "vm1@daily")
        result = a.silofs_json("migrate", "vm1", "--to", there, "--switchover", "now")
        assert result["state"] == "complete" and result["verified"]
        assert result["bytes_sent"] == len(data)
        assert result["pause_ms"] > 0
        with b.image("vm1").open("rb") as image:
            image.seek(32 * MIB)
            assert image.read(len(data)) == data
        assert b.silofs_json("info", "vm1")["role"] == "owner"
        assert [snap["name"] for snap in b.silofs_json("info", "vm1")["snapshots"]] == ["daily"]
        assert a.silofs_json("info", "vm1")["role"] == "tombstone"
        with b.image("vm1").open("r+b") as image:
            image.write(b"x" * MIB)
        result = b.silofs_json("migrate", "vm1", "--to", back, "--switchover", "now")
        assert result["state"] == "complete" and result["verified"]
        assert result["bytes_sent"] == MIB
        assert result["bytes_skipped"] == len(data)
        with a.image("vm1").open("rb") as image:
            assert image.read(MIB) == b"x" * MIB
            image.seek(32 * MIB)
            assert image.read(len(data)) == data
        for side in (a, b):
            assert "Traceback" not in side.log()
            assert side.silofs_json("check", "--read-data")["findings"] == []


def test_what_is_not_allowed_is_refused_and_nothing_is_said_about_what_is_there(tmp_path: Path) -> None:
    with Mount(tmp_path / "a", listen=True) as a, Mount(tmp_path / "b", listen=True) as b:
        token = a.silofs_json("peer", "invite")["token"]
        assert b.silofs_json("peer", "join", token)["name"]
        there = a.silofs_json("peer", "ls")["peers"][0]["name"]
        with pytest.raises(Failed) as again:
            b.silofs("peer", "join", token)
        assert again.value.code == 1
        for name in ("here", "there"):
            a.silofs("create", name, "--size", "1M")
        b.silofs("create", "there", "--size", "1M")
        said = []
        for name in ("here", "there"):
            done = a.run("migrate", name, "--to", there, "--switchover", "now", "--json")
            assert done.returncode == 12
            said.append(done.stdout.splitlines()[-1].replace(name, "NAME"))
            assert a.silofs_json("info", name)["role"] == "owner"
        assert said[0] == said[1]
        assert [volume["name"] for volume in b.silofs_json("ls")["volumes"]] == ["there"]


def test_a_peer_that_is_away_is_said(tmp_path: Path) -> None:
    with Mount(tmp_path / "a", listen=True) as a:
        with Mount(tmp_path / "b", listen=True) as b:
            there = a.pair(b)
        a.silofs("create", "vm1", "--size", "1M")
        until(lambda: not a.silofs_json("peer", "ls")["peers"][0]["connected"], "the session ended")
        assert a.run("migrate", "vm1", "--to", there).returncode == 13
        assert a.run("migrate", "nosuch", "--to", there).returncode == 10
        assert a.run("migrate", "vm1", "--to", "nobody").returncode == 10
        assert a.run("peer", "rm", "nobody").returncode == 10
