"""What was served, of volumes and of all: it never falls, whatever goes."""

from __future__ import annotations

from trio.testing import MockClock

from silofs.engine.served import Served

from .rig import Rig


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
