"""A daemon that is killed at a step of a commit or of a recovery has lost nothing that it acknowledged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from trio.testing import MockClock

from .rig import Rig, read

PLACES = (
    "commit.grown",
    "commit.before@3",
    "commit.durable@3",
    "commit.before_release@3",
    "commit.published@3",
    "recover.before_commit",
    "recover.after_commit",
    "journal.filled",
    "journal.formatted",
    "journal.before_write@3",
    "journal.durable@3",
)


def place_of(entry: str) -> str:
    name, _, count = entry.partition("@")
    return f"{name}:kill@{count or 1}"


class Deaths:
    """Runs victims, and keeps what the volume held after each write that they reported."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.states = [b""]
        self.synced = 0  # index of the state that was synced last
        self.begun: list[bytes] = []  # what it would hold after a write that was not reported

    def run(self, fail: str, seed: int) -> None:
        rig = self._rig
        victim = [sys.executable, str(Path(__file__).with_name("victim.py")), str(rig.path), str(rig.fd), str(seed)]
        done = subprocess.run(
            victim,
            env={**os.environ, "SILOFS_FAIL": fail},
            pass_fds=[rig.fd],
            stdout=subprocess.PIPE,
            timeout=60,
            check=False,
        )
        assert done.returncode == -9
        for line in done.stdout.decode().splitlines():
            if line == "done":
                self.states += self.begun
                self.begun = []
            elif line in ("synced", "recovered"):
                self.synced = len(self.states) - 1
            else:
                offset, length, value = map(int, line.split())
                now = bytearray(self.states[-1])
                now.extend(bytes(max(0, offset + length - len(now))))
                now[offset : offset + length] = bytes([value]) * length
                self.begun = [bytes(now)]


@pytest.mark.crash
@pytest.mark.parametrize("entry", PLACES)
async def test_killed_at(rig: Rig, entry: str, autojump_clock: MockClock) -> None:
    async with rig.running():
        uuid = (await rig.volume(0)).uuid
    deaths = Deaths(rig)
    if entry.startswith("recover"):
        deaths.run("commit.durable:kill@4", seed=1)
    deaths.run(place_of(entry), seed=2)
    async with rig.running() as engine:
        volume = engine.open_volume(uuid)
        assert await read(engine, volume, 0, volume.size) in (deaths.states[-1], *deaths.begun)


@pytest.mark.crash
@pytest.mark.parametrize("entry", PLACES)
async def test_killed_at_and_the_log_is_gone_as_well(rig: Rig, entry: str, autojump_clock: MockClock) -> None:
    """Holder and daemon both: what was synced is in the store or its journal, and the rest is a prefix."""
    async with rig.running():
        uuid = (await rig.volume(0)).uuid
    deaths = Deaths(rig)
    if entry.startswith("recover"):
        deaths.run("commit.durable:kill@4", seed=1)
    deaths.run(place_of(entry), seed=2)
    rig.cut_power()
    async with rig.running() as engine:
        volume = engine.open_volume(uuid)
        found = await read(engine, volume, 0, volume.size)
        # A cut between a growth and the write that asked for it leaves a longer volume that ends in zeros.
        states = [*deaths.states[deaths.synced :], *deaths.begun]
        assert found in [state.ljust(len(found), b"\0") for state in states]
