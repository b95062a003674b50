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
)


def place_of(entry: str) -> str:
    name, _, count = entry.partition("@")
    return f"{name}:kill@{count or 1}"


@pytest.mark.crash
@pytest.mark.parametrize("entry", PLACES)
async def test_killed_at(rig: Rig, entry: str, autojump_clock: MockClock) -> None:
    expected = bytearray()
    async with rig.running():
        uuid = (await rig.volume(0)).uuid

    def run(fail: str, seed: int) -> None:
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
            if line != "recovered":
                offset, length, value = map(int, line.split())
                expected.extend(bytes(max(0, offset + length - len(expected))))
                expected[offset : offset + length] = bytes([value]) * length

    if entry.startswith("recover"):
        run("commit.durable:kill@4", seed=1)
    run(place_of(entry), seed=2)
    async with rig.running() as engine:
        volume = engine.open_volume(uuid)
        assert volume.size == len(expected)
        assert await read(engine, volume, 0, volume.size) == expected
