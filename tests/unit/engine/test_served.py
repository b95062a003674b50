"""What was served, of volumes and of all: it never falls, whatever goes."""

from __future__ import annotations

import os
from typing import Any

from trio.testing import MockClock

from silofs.blocks import PAGE
from silofs.engine.served import Served
from silofs.errors import StoreBroken
from silofs.figures import Figures

from .rig import Rig, page, write


class Host:
    async def restart(self) -> None: ...

    def status(self) -> dict[str, Any]:
        return {"state": "serving", "open_handles": 0}


def test_all_of_it_is_added_up() -> None:
    total = Served(1, 2, 3, 4, 5, 6, 7)
    total.add(Served(*(10 * each for each in range(1, 8))))
    assert total == Served(11, 22, 33, 44, 55, 66, 77)
    assert list(total.figures().values()) == [11, 22, 33, 44, 55, 66, 77]


async def test_the_total_keeps_what_volumes_and_snapshots_took_with_them(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        snapshot = await engine.transact(lambda txn: txn.take_snapshot(volume.uuid, "a"))
        view = engine.open_layer(volume.uuid, snapshot.layer)
        volume.served.reads, view.served.reads = 5, 7
        assert engine.served().reads == 12
        await engine.transact(lambda txn: txn.delete_volume(volume.uuid))
        while await engine.transact(lambda txn: txn.reap()):
            pass
        assert not list(engine.volumes())
        assert engine.served() == Served(reads=12)


async def test_figures_of_an_engine(rig: Rig, autojump_clock: MockClock) -> None:
    async with rig.running() as engine:
        volume = await rig.volume()
        await rig.engine.transact(lambda txn: txn.create_volume("unopened", PAGE))
        await write(engine, volume, 0, page(1))
        volume.served.writes += 1
        found = await Figures(engine, Host()).statistics({}, None)  # type: ignore[arg-type]
        assert (found["pid"], found["waiting_bytes"], found["daemon"]["state"]) == (os.getpid(), PAGE, "serving")
        unopened, vm = found["volumes"]
        assert (vm["name"], vm["waiting_bytes"], vm["writes"], vm["allocated"]) == ("vm", PAGE, 1, 0)
        assert (unopened["name"], unopened["virtual_size"], unopened["writes"]) == ("unopened", PAGE, 0)
        await engine.flush(volume)
        found = await Figures(engine, Host()).statistics({}, None)  # type: ignore[arg-type]
        assert found["volumes"][1] == vm | {"waiting_bytes": 0, "allocated": PAGE}
        assert found["store"]["volumes"] == 2


async def test_a_store_that_cannot_be_read_leaves_the_rest(
    rig: Rig, autojump_clock: MockClock, monkeypatch: Any
) -> None:
    async with rig.running() as engine:

        def broken() -> None:
            raise StoreBroken("it cannot be read")

        monkeypatch.setattr(engine.store, "reader", broken)
        found = await Figures(engine, Host()).statistics({}, None)  # type: ignore[arg-type]
        monkeypatch.undo()
        assert (found["store"], found["volumes"]) == (None, [])
        assert found["engine"]["log"]["size"] == rig.ring
