"""What the network and a full disk do to a migration: it is slower, and right."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness import Mount, until
from tests.migrate.proxy import Proxy
from tests.migrate.test_kills import failing, spent
from tests.migrate.writer import PAGE, Writer

pytestmark = pytest.mark.fuse

MIB = 1 << 20


@contextmanager
def through_proxy(tmp_path: Path) -> Iterator[tuple[Mount, Mount, Proxy, str]]:
    """A, which does not listen; B; the proxy between them; B's name at A."""
    with (
        Mount(tmp_path / "a") as a,
        Mount(tmp_path / "b", listen=True) as b,
        Proxy(b.address or "") as proxy,
    ):
        token = b.silofs_json("peer", "invite", "--address", proxy.address)["token"]
        there = a.silofs_json("peer", "join", token)["name"]
        b.silofs("peer", "allow", b.silofs_json("peer", "ls")["peers"][0]["name"], "*", "in")
        yield a, b, proxy, there


def filled(side: Mount, name: str, size: int) -> bytes:
    data = os.urandom(size)
    side.silofs("create", name, "--size", str(size))
    with side.image(name).open("r+b", buffering=0) as image:
        for at in range(0, size, MIB):
            os.pwrite(image.fileno(), data[at : at + MIB], at)
    return data


def phase(side: Mount, name: str) -> str:
    return str(side.silofs_json("migration", "show", name)["phase"])


def test_flipped_bits_and_cuts_cost_time_and_nothing_else(tmp_path: Path) -> None:
    with through_proxy(tmp_path) as (a, b, proxy, there):
        data = filled(a, "vm1", 32 * MIB)
        proxy.flip_every = 5 * MIB
        name = a.silofs_json("migrate", "vm1", "--to", there, "--switchover", "now", "--detach")["migration"]
        until(lambda: proxy.flipped >= 3, "bits were flipped")
        proxy.flip_every = 0
        proxy.cut()
        until(lambda: phase(a, name) == "complete", "complete")
        assert a.silofs_json("migration", "show", name)["verified"]
        assert b.image("vm1").read_bytes() == data
        for side in (a, b):
            assert "Traceback" not in side.log()


def test_a_long_way_is_slow_and_readers_still_go_first(tmp_path: Path) -> None:
    with through_proxy(tmp_path) as (a, b, proxy, there):
        data = filled(a, "vm1", 32 * MIB)
        proxy.delay_s = 0.02
        command = ("migrate", "vm1", "--to", there, "--switchover", "now", "--mode", "postcopy", "--detach")
        name = a.silofs_json(*command)["migration"]
        until(lambda: phase(a, name) == "pulling", "pulling")
        waits = []
        with b.image("vm1").open("rb", buffering=0) as image:
            for at in range(31 * MIB, 30 * MIB, -MIB // 16):
                begun = time.monotonic()
                assert os.pread(image.fileno(), PAGE, at) == data[at : at + PAGE]
                waits.append(time.monotonic() - begun)
        assert sorted(waits)[len(waits) // 2] < 1.0, "a reader waits for its round trip, not for the sweep"
        proxy.delay_s = 0
        until(lambda: phase(a, name) == "complete", "complete")


def test_a_silent_partition_ends_the_session_and_nothing_else(tmp_path: Path) -> None:
    """Half-open TCP: pings notice it. Before the switch-over the writer at A never notices anything."""
    with through_proxy(tmp_path) as (a, b, proxy, there):
        filled(a, "vm1", 16 * MIB)
        writer = Writer([a.image("vm1"), b.image("vm1")], 1024, pause=0.002)
        writer.legal = {}
        writer.start()
        command = ("migrate", "vm1", "--to", there, "--switchover", "manual", "--detach")
        name = a.silofs_json(*command)["migration"]
        until(lambda: a.silofs_json("migration", "show", name)["round"] >= 1, "a round")
        proxy.swallow = True
        until(lambda: not a.silofs_json("peer", "ls")["peers"][0]["connected"], "the session ended", timeout=40)
        at = writer.acknowledged
        until(lambda: writer.acknowledged > at + 100, "the writer goes on")
        proxy.cut()
        proxy.swallow = False
        until(lambda: a.silofs_json("peer", "ls")["peers"][0]["connected"], "a new session")
        a.silofs("migration", "switchover", name, "--fence-writer")
        until(lambda: phase(a, name) == "complete", "complete")
        until(lambda: writer.stale and writer.acknowledged > writer.stale[0] + 100, "the writer goes on at B")
        writer.stop()
        writer.check(b.image("vm1"))


@pytest.mark.crash
def test_a_peer_that_hangs_in_the_switch_over_goes_on_where_it_was(tmp_path: Path) -> None:
    """Nothing of the test has a file open at B while it hangs: a fork would wait in closing it."""
    with (
        Mount(tmp_path / "a", listen=True) as a,
        Mount(tmp_path / "b", listen=True, environment=stopping(tmp_path / "b", "own.before_commit")) as b,
    ):
        there = a.pair(b)
        hanging = int(b.status()["daemon_pid"])
        writer = Writer([a.image("vm1")], 1024, pause=0.002)
        a.silofs("create", "vm1", "--size", "16M")
        writer.start()
        until(lambda: writer.acknowledged > 100, "the writer writes")
        command = ("migrate", "vm1", "--to", there, "--switchover", "now", "--fence-writer", "--detach")
        name = a.silofs_json(*command)["migration"]
        until(lambda: spent(tmp_path / "b") == {"own.before_commit"}, "B hangs")
        try:
            until(lambda: not a.silofs_json("peer", "ls")["peers"][0]["connected"], "the session ended", timeout=40)
            assert a.silofs_json("info", "vm1")["role"] == "released", "nobody owns it, and nobody may"
        finally:
            os.kill(hanging, signal.SIGCONT)
        until(lambda: phase(a, name) == "complete", "complete", timeout=60)
        writer.stop()
        assert writer.stale == [writer.acknowledged]
        writer.check(b.image("vm1"))


def stopping(directory: Path, point: str) -> dict[str, str]:
    return {**failing(directory, (point,)), "SILOFS_FAIL": f"{point}:stop"}


def test_a_full_destination_pauses_the_sweep_and_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "b" / "store").mkdir(parents=True)
    small = tmp_path / "b" / "store"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300M,mode=700", "tmpfs", small], check=True)
    try:
        with Mount(tmp_path / "a", listen=True) as a, Mount(tmp_path / "b", listen=True) as b:
            there = a.pair(b)
            a.silofs("create", "big", "--size", "1G")
            with a.image("big").open("r+b", buffering=0) as image:
                for at in range(0, 300 * MIB, MIB):
                    os.pwrite(image.fileno(), os.urandom(MIB), at)
            refused = a.run("migrate", "big", "--to", there, "--switchover", "now")
            assert refused.returncode == 1 and "space" in refused.stderr
            data = filled(a, "vm1", 128 * MIB)  # more than a store holds ahead
            command = ("migrate", "vm1", "--to", there, "--switchover", "now", "--mode", "postcopy", "--detach")
            name = a.silofs_json(*command, "--max-bandwidth", "8M")["migration"]
            until(lambda: phase(a, name) == "pulling", "pulling")
            filler = small / "filler"
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        os.write(file.fileno(), bytes(MIB))
                except OSError:
                    pass
            until(lambda: b.silofs_json("migration", "show", name)["error"], "the sweep stops")
            with b.image("vm1").open("rb", buffering=0) as image:
                assert os.pread(image.fileno(), PAGE, 127 * MIB) == data[127 * MIB : 127 * MIB + PAGE]
            assert a.silofs_json("info", "vm1")["role"] == "released"
            filler.unlink()
            until(lambda: phase(a, name) == "complete", "complete", timeout=60)
            assert b.image("vm1").read_bytes() == data
    finally:
        subprocess.run(["umount", "--lazy", small], check=False)
