"""Two engines in one process: a volume moves, is verified, and reads as it was."""

from __future__ import annotations

import os

import pytest
from msgspec.structs import replace

from silofs.errors import NotAuthorised
from tests.unit.peers.node import two

MIB = 1 << 20


async def test_an_idle_volume_moves(tmp_path):
    data = os.urandom(3 * MIB)
    async with two(tmp_path) as (a, b):
        await a.call("create", name="vm1", size=64 * MIB)
        await a.write("vm1", 5 * MIB, data)
        result = await a.call("migrate", names=["vm1"], to=a.b, switchover="now")
        assert result["state"] == "complete" and result["verified"]
        assert b.role("vm1") == "owner"
        assert a.role("vm1") == "retired"
        assert await b.read("vm1", 5 * MIB, len(data)) == data
        assert await b.read("vm1", 0, MIB) == bytes(MIB)
        await b.write("vm1", 0, b"x" * 4096)


async def test_a_volume_that_nobody_allowed_is_refused(tmp_path):
    async with two(tmp_path) as (a, b):
        await a.call("create", name="vm1", size=MIB)
        await b.call("create", name="vm1", size=MIB)
        await _without_rules(b)
        with pytest.raises(NotAuthorised) as refused:
            await a.call("migrate", names=["vm1"], to=a.b, switchover="now")
        assert "another volume" not in str(refused.value)
        assert a.role("vm1") == "owner"


async def _without_rules(node):
    peer = node.peers._book.all()[0]
    await node.peers._book._put(replace(peer, rules=()))
