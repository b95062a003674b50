"""The clock of freezes over a real engine: what may go wrong under it."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID

import pytest
import trio

from silofs import freezes
from silofs.engine import Engine
from silofs.errors import Busy, StoreFull
from silofs.freezing import Freezes
from silofs.layers.log import WriteLog
from silofs.layers.store import Store
from silofs.service import Service


class Call:
    uid = 0
    fds = ()


class Parts:
    """An engine with its freezes, running."""

    def __init__(self, path: Path) -> None:
        Store.create(path)
        self.store = Store.open(path)
        self.memfd = os.memfd_create("log")
        WriteLog.format(self.memfd, self.store.uuid)
        self.engine = Engine(self.store, WriteLog.open(self.memfd, self.store.uuid))
        self.engine.recover()
        self.freezes = Freezes(self.engine)
        self.freezes.register(Service(self.engine))

    async def create(self, name: str) -> bytes:
        volume = await self.engine.transact(lambda txn: txn.create_volume(name, 1 << 20))
        return volume.uuid

    async def freeze(self, name: str, timeout: float = 30.0) -> None:
        await self.freezes.freeze({"name": name, "timeout": timeout}, Call())  # type: ignore[arg-type]

    async def thaw(self, name: str) -> None:
        await self.freezes.thaw({"name": name}, Call())  # type: ignore[arg-type]

    def close(self) -> None:
        self.engine.close()
        self.store.close()
        os.close(self.memfd)


async def test_a_volume_that_goes_while_it_is_frozen(tmp_path: Path) -> None:
    """An old copy whose time is over is dropped whoever holds it: its deadline then finds nothing, and harms nobody."""
    parts = Parts(tmp_path / "store")
    async with trio.open_nursery() as nursery:
        await nursery.start(parts.engine.run)
        await nursery.start(parts.freezes.run)
        uuid = await parts.create("vm1")
        await parts.create("vm2")
        await parts.freeze("vm1", 1.0)
        await parts.engine.transact(lambda txn: txn.delete_volume(uuid))
        with trio.fail_after(30):
            while not parts.freezes.shown()["expired_freezes"]:
                await trio.sleep(0.01)
        await parts.freeze("vm2")
        await parts.thaw("vm2")
        nursery.cancel_scope.cancel()
    parts.close()


async def test_two_who_freeze_and_two_who_thaw(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "store")
    async with trio.open_nursery() as nursery:
        await nursery.start(parts.engine.run)
        await nursery.start(parts.freezes.run)
        uuid = await parts.create("vm1")
        outcomes: list[str] = []

        async def attempt(what: str) -> None:
            try:
                await (parts.freeze("vm1") if what == "freeze" else parts.thaw("vm1"))
                outcomes.append(what)
            except Busy:
                outcomes.append("refused")

        for what in ("freeze", "thaw", "freeze"):
            async with trio.open_nursery() as two:
                two.start_soon(attempt, what)
                two.start_soon(attempt, what)
            assert sorted(outcomes) == sorted([what, "refused"])
            outcomes.clear()
        assert parts.engine.open_volume(uuid).frozen == 1
        with parts.store.reader() as txn:
            assert freezes.found(txn, uuid) is not None
        nursery.cancel_scope.cancel()
    parts.close()


async def test_a_store_that_cannot_record_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The freeze fails and holds nobody."""
    parts = Parts(tmp_path / "store")
    async with trio.open_nursery() as nursery:
        await nursery.start(parts.engine.run)
        await nursery.start(parts.freezes.run)
        uuid = await parts.create("vm1")

        def full(*_: object) -> None:
            raise StoreFull("full")

        with monkeypatch.context() as patched:
            patched.setattr(freezes, "put", full)
            with pytest.raises(StoreFull):
                await parts.freeze("vm1")
        state = parts.engine.open_volume(uuid)
        assert not state.frozen
        assert parts.engine.write_now(state, 0, bytes(4096))
        await parts.freeze("vm1")
        await parts.thaw("vm1")
        nursery.cancel_scope.cancel()
    parts.close()


async def test_a_deadline_that_passed_while_nobody_served(tmp_path: Path) -> None:
    """Whoever relied on the freeze is told all the same."""
    parts = Parts(tmp_path / "store")
    async with trio.open_nursery() as nursery:
        await nursery.start(parts.engine.run)
        uuid = await parts.create("vm1")
        old = freezes.Freeze(str(UUID(bytes=uuid)), "vm1", "nightly", "", 1, 0, since_ns=1, until_ns=2)
        await parts.engine.transact(lambda txn: freezes.put(txn, old))
        await nursery.start(parts.freezes.run)
        assert not parts.engine.open_volume(uuid).frozen
        assert [each["owner"] for each in parts.freezes.shown()["expired_freezes"]] == ["nightly"]
        with pytest.raises(Busy, match="deadline passed"):
            await parts.thaw("vm1")
        with trio.fail_after(30):
            while freezes.recorded(parts.engine.reads.txn):
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    parts.close()
