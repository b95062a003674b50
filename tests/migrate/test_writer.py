"""A volume moves while it is written: the writer is cut off at A, goes on at B, and nothing it was told is missing."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.harness import Failed, Mount, until
from tests.migrate.writer import PAGE, Writer

pytestmark = pytest.mark.fuse

MIB = 1 << 20
PAGES = 4096


def test_the_writer_is_fenced_and_goes_on_at_the_new_home(tmp_path: Path) -> None:
    with Mount(tmp_path / "a", listen=True) as a, Mount(tmp_path / "b", listen=True) as b:
        there = a.pair(b)
        a.silofs("create", "vm1", "--size", "64M")
        writer = Writer([a.image("vm1"), b.image("vm1")], PAGES, pause=0.0005)
        writer.start()
        until(lambda: writer.acknowledged > 500, "the writer writes")
        with pytest.raises(Failed) as refused:
            a.silofs("migrate", "vm1", "--to", there, "--switchover", "now")
        assert refused.value.code == 11
        begun = a.silofs_json("migrate", "vm1", "--to", there, "--switchover", "manual", "--detach")
        name = begun["migration"]
        until(lambda: a.silofs_json("migration", "show", name)["round"] >= 1, "a round")
        with pytest.raises(Failed) as blocked:
            a.silofs("migration", "switchover", name)
        assert blocked.value.code == 11
        a.silofs("migration", "switchover", name, "--fence-writer")
        until(lambda: a.silofs_json("migration", "show", name)["phase"] == "complete", "complete")
        until(lambda: writer.acknowledged > (writer.stale or [1 << 62])[0] + 500, "the writer goes on")
        writer.stop()
        assert len(writer.stale) == 1 and writer.stale[0] > 500
        writer.check(b.image("vm1"))
        shown = a.silofs_json("migration", "show", name)
        assert shown["verified"] and shown["pause_ms"] < 5000
        print(f"pause {shown['pause_ms']} ms, {shown['round']} rounds, {shown['bytes_sent']} bytes")
        for side in (a, b):
            assert "Traceback" not in side.log()


def test_readers_are_served_during_the_sweep_and_before_it(tmp_path: Path) -> None:
    """A post-copy at a bandwidth that would take half a minute: reads at B do not wait for it."""
    data = os.urandom(64 * MIB)
    with Mount(tmp_path / "a", listen=True) as a, Mount(tmp_path / "b", listen=True) as b:
        there = a.pair(b)
        a.silofs("create", "vm1", "--size", "256M")
        a.image("vm1").open("r+b").write(data)
        command = ("migrate", "vm1", "--to", there, "--switchover", "now", "--mode", "postcopy")
        begun = a.silofs_json(*command, "--max-bandwidth", "4M", "--detach")
        name = begun["migration"]
        until(lambda: a.silofs_json("migration", "show", name)["phase"] == "pulling", "pulling")
        with b.image("vm1").open("r+b", buffering=0) as image:
            for at in range(60 * MIB, 64 * MIB, MIB // 4):
                assert os.pread(image.fileno(), PAGE, at) == data[at : at + PAGE]
            assert os.pread(image.fileno(), MIB, 50 * MIB) == data[50 * MIB : 51 * MIB]
            os.pwrite(image.fileno(), b"new" + bytes(PAGE - 3), 40 * MIB)
            os.pwrite(image.fileno(), b"part", 41 * MIB + 100)
            assert os.pread(image.fileno(), PAGE, 40 * MIB) == b"new" + bytes(PAGE - 3)
            part = bytearray(data[41 * MIB : 41 * MIB + PAGE])
            part[100:104] = b"part"
            assert os.pread(image.fileno(), PAGE, 41 * MIB) == part
        shown = b.silofs_json("migration", "show", name)
        assert shown["phase"] == "pulling" and shown["bytes_left"] > 16 * MIB, "it all happened during the sweep"
        assert shown["bytes_demand"] > 0


def test_reads_at_the_destination_are_answered_before_it_owns_the_volume(tmp_path: Path) -> None:
    data = os.urandom(4 * MIB)
    with Mount(tmp_path / "a", listen=True) as a, Mount(tmp_path / "b", listen=True) as b:
        there = a.pair(b)
        a.silofs("create", "vm1", "--size", "16M")
        with a.image("vm1").open("r+b", buffering=0) as image:
            image.write(data)
            begun = a.silofs_json("migrate", "vm1", "--to", there, "--switchover", "manual", "--detach")
            name = begun["migration"]
            until(b.image("vm1").exists, "the volume shows at B")
            assert b.image("vm1").read_bytes()[: len(data)] == data
            os.pwrite(image.fileno(), b"newer", 0)
            with b.image("vm1").open("rb", buffering=0) as there_image:
                assert os.pread(there_image.fileno(), 5, 0) == b"newer"
            assert b.silofs_json("info", "vm1")["role"] == "incoming"
        a.silofs("migration", "cancel", name)
        until(lambda: not b.image("vm1").exists(), "the name is gone at B")
        assert a.silofs_json("info", "vm1")["role"] == "owner"
        assert a.image("vm1").read_bytes()[5 : len(data)] == data[5:]


def test_two_migrations_of_one_volume_at_once(tmp_path: Path) -> None:
    with Mount(tmp_path / "a", listen=True) as a, Mount(tmp_path / "b", listen=True) as b:
        there = a.pair(b)
        a.silofs("create", "vm1", "--size", "16M")
        codes: list[int] = []

        def go() -> None:
            codes.append(a.run("migrate", "vm1", "--to", there, "--switchover", "now").returncode)

        threads = [threading.Thread(target=go) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(codes) in ([0, 2], [0, 11])
        assert b.silofs_json("info", "vm1")["role"] == "owner"
