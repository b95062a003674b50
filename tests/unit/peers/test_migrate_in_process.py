"""Two engines in one process: a volume moves, is verified, and reads as it was."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import trio
from msgspec.structs import replace

from silofs import failpoints
from silofs.errors import Busy, FetchTimeout, NoSuchThing, NotAuthorised, NotOwner, UserError
from silofs.layers.policies import drain
from silofs.migrate.events import CheckPrepare, PrepareChecked
from silofs.migrate.messages import CancelAsk, Priority, Pull, Refusal
from silofs.migrate.states import Phase
from silofs.peers import records, target_ops
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


async def test_it_comes_home_when_it_is_cancelled_after_the_switch(tmp_path):
    data = os.urandom(8 * MIB)
    async with two(tmp_path) as (a, b):
        await a.call("create", name="vm1", size=64 * MIB)
        await a.write("vm1", 0, data[:MIB])
        for at in range(MIB, 8 * MIB, MIB):
            await a.write("vm1", at, data[at : at + MIB])
        begun = await _postcopy(a)
        await b.write("vm1", 20 * MIB, b"written at b" + bytes(4084))
        await b.write("vm1", 0, b"over" + bytes(4092))
        assert await b.read("vm1", 4 * MIB, 4096) == data[4 * MIB : 4 * MIB + 4096]
        assert a.role("vm1") == "ceded"
        await a.call("migration_cancel", id=begun["migration"])
        await until(lambda: a.role("vm1") == "owner")
        assert await a.read("vm1", 20 * MIB, 12) == b"written at b"
        assert await a.read("vm1", 0, 4) == b"over"
        assert await a.read("vm1", MIB, 7 * MIB) == data[MIB:]
        await until(lambda: b.role("vm1") == "retired" and not a.peers._migrations.movers)
        await a.write("vm1", 0, b"home" * 1024)


async def test_snapshots_travel_and_clones_stay_clones(tmp_path):
    async with two(tmp_path) as (a, b):
        await a.call("create", name="golden", size=16 * MIB)
        await a.write("golden", 0, b"g" * MIB)
        await a.call("snapshot", volume="golden", snapshot="v1")
        await a.write("golden", 0, b"h" * 4096)
        await a.call("clone", source="golden", snapshot="v1", new="vm1")
        await a.write("vm1", MIB, b"1" * MIB)
        result = await a.call("migrate", names=["golden"], to=a.b, switchover="now")
        assert result["bytes_sent"] == MIB + 4096
        result = await a.call("migrate", names=["vm1"], to=a.b, switchover="now")
        assert result["bytes_sent"] == MIB and result["bytes_skipped"] == MIB
        assert await b.read("vm1", 0, 2 * MIB) == b"g" * MIB + b"1" * MIB
        assert (await b.read("golden", 0, 8192)) == b"h" * 4096 + b"g" * 4096
        info = await b.call("info", name="golden")
        assert [snap["name"] for snap in info["snapshots"]] == ["v1"]


async def test_volumes_of_a_group_move_together(tmp_path):
    async with two(tmp_path) as (a, b):
        for name in ("root", "data"):
            await a.call("create", name=name, size=16 * MIB)
            await a.write(name, 0, name.encode() * 1024)
        result = await a.call("migrate", names=["root", "data"], to=a.b, switchover="now")
        assert result["state"] == "complete" and result["verified"]
        for name in ("root", "data"):
            assert await b.read(name, 0, len(name)) == name.encode()


async def test_a_session_that_breaks_in_the_sweep_is_made_again(tmp_path):
    data = os.urandom(8 * MIB)
    async with two(tmp_path) as (a, b):
        await a.call("create", name="vm1", size=16 * MIB)
        for at in range(0, 8 * MIB, MIB):
            await a.write("vm1", at, data[at : at + MIB])
        begun = await _postcopy(a, bandwidth=16 * MIB)
        mover = b.peers._migrations.find(begun["migration"])
        for _ in range(3):
            seen = mover.progress.traffic.received
            await until(a.peers._hub.links)
            a.peers._hub.links()[0].session.close("test")
            await until(lambda seen=seen: mover.progress.traffic.received > seen or mover.over.is_set())
        await until(lambda: a.role("vm1") == "retired")
        assert await b.read("vm1", 0, 8 * MIB) == data


async def test_a_reader_waits_for_a_peer_that_is_away_and_gets_an_error_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr("silofs.engine.remote.FETCH_DEADLINE_S", 0.5)
    async with two(tmp_path) as (a, b):
        await a.call("create", name="vm1", size=16 * MIB)
        await a.write("vm1", 0, b"x" * MIB)
        await _postcopy(a, bandwidth=4096)
        b.peers._hub.dial_wanted = a.peers._hub.dial_wanted = lambda: None
        a.peers._hub._wants = b.peers._hub._wants = lambda peer: False
        b.peers._hub.links()[0].session.close("test")
        with pytest.raises(FetchTimeout):
            await b.read("vm1", MIB // 2, 4096)
        await b.write("vm1", MIB // 2, b"y" * 4096)
        assert await b.read("vm1", MIB // 2, 4096) == b"y" * 4096
        assert await b.read("vm1", 4 * MIB, 4096) == bytes(4096)


@pytest.mark.parametrize(
    "point",
    ["offer.after_commit", "precopy.after_seal", "freeze.after_seal", "cede.before_commit", "cede.after_commit"]
    + ["incoming.before_commit", "sweep.after_batch", "own.before_commit", "own.after_commit", "retire.before_commit"],
)
async def test_an_error_of_ours_ends_in_another_attempt(tmp_path, point, monkeypatch):
    monkeypatch.setattr("silofs.peers.migrations.REVIVE_S", 0.05)
    monkeypatch.setattr("silofs.limits.REPEAT_S", 0.2)
    async with two(tmp_path) as (a, b):
        await a.call("create", name="vm1", size=16 * MIB)
        await a.write("vm1", 0, b"x" * MIB)
        failpoints.rearm(f"{point}:raise")
        try:
            await a.call("migrate", names=["vm1"], to=a.b, switchover="now", detach=True)
            await until(lambda: a.role("vm1") == "retired")
        finally:
            assert failpoints.spent(point)
            failpoints.rearm("")
        assert b.role("vm1") == "owner"
        assert await b.read("vm1", 0, MIB) == b"x" * MIB
        await b.write("vm1", 0, b"y" * 4096)


async def test_a_rename_ends_the_attempt_and_a_resize_joins_it(tmp_path):
    async with two(tmp_path) as (a, b):
        await a.call("create", name="vm1", size=16 * MIB)
        await a.write("vm1", 0, b"x" * MIB)
        begun = await a.call("migrate", names=["vm1"], to=a.b, switchover="manual", detach=True)
        await until(lambda: a.peers._migrations.find(begun["migration"]).progress.round >= 1)
        await a.call("rename", old="vm1", new="vm2")
        await until(lambda: not a.peers._migrations.movers and not b.peers._migrations.movers)
        assert a.role("vm2") == "owner"
        assert (await b.call("ls"))["volumes"] == []
        begun = await a.call("migrate", names=["vm2"], to=a.b, switchover="manual", detach=True)
        await until(lambda: a.peers._migrations.find(begun["migration"]).progress.round >= 1)
        await a.call("resize", name="vm2", size=32 * MIB)
        await a.call("snapshot", volume="vm2", snapshot="s1")
        await a.call("migration_switchover", id=begun["migration"])
        await until(lambda: a.role("vm2") == "retired")
        info = await b.call("info", name="vm2")
        assert info["virtual_size"] == 32 * MIB
        assert [snap["name"] for snap in info["snapshots"]] == ["s1"]


async def test_what_a_volume_that_has_left_refuses(tmp_path):
    async with two(tmp_path) as (a, b):
        await a.call("create", name="vm1", size=16 * MIB)
        for at in range(8):
            await a.write("vm1", at * MIB, bytes([at + 1]) * MIB)
        begun = await _postcopy(a, bandwidth=65536)
        for verb, args in (
            ("rename", {"old": "vm1", "new": "vm2"}),
            ("resize", {"name": "vm1", "size": 32 * MIB}),
            ("rm", {"volume": "vm1", "force": True}),
            ("snapshot", {"volume": "vm1", "snapshot": "late"}),
        ):
            with pytest.raises(Busy):
                await a.call(verb, **args)
        with pytest.raises(Busy):
            await b.call("rm", volume="vm1", force=True)
        await b.call("snapshot", volume="vm1", snapshot="early")
        await b.write("vm1", 0, b"z" * 4096)
        a.peers._migrations.find(begun["migration"]).context.bandwidth.rate = None
        await until(lambda: a.role("vm1") == "retired")
        await b.call("clone", source="vm1", snapshot="early", new="vm2")
        assert await b.read("vm2", 0, MIB) == b"\1" * MIB
        assert await b.read("vm1", 0, 4096) == b"z" * 4096


async def test_a_retired_copy_goes_when_its_time_is_over_and_the_volume_can_still_come_back(tmp_path):
    async with two(tmp_path) as (a, b):
        await a.call("peer_allow", peer=a.b, pattern="vm*", direction="in")
        await a.call("create", name="vm1", size=16 * MIB)
        await a.write("vm1", 0, b"x" * MIB)
        await a.call("migrate", names=["vm1"], to=a.b, switchover="now", retain=0.1)
        await until(lambda: not a.engine.reads.txn.volumes())
        result = await b.call("migrate", names=["vm1"], to=b.a, switchover="now")
        assert result["verified"] and result["bytes_sent"] == MIB
        assert await a.read("vm1", 0, MIB) == b"x" * MIB
        assert a.engine.reads.txn.ownership(a.engine.reads.txn.volume_by_name("vm1").uuid).epoch == 3


async def test_a_retired_copy_shows_what_its_new_home_has_while_that_owns_it(tmp_path):
    async with two(tmp_path) as (a, b):
        await a.call("peer_allow", peer=a.b, pattern="vm*", direction="in")
        await a.call("create", name="vm1", size=16 * MIB)
        await a.write("vm1", 0, b"old" * 4096)
        await a.call("migrate", names=["vm1"], to=a.b, switchover="now")
        await until(lambda: not a.peers._migrations.movers and not b.peers._migrations.movers)
        await b.write("vm1", 0, b"new" * 4096)
        assert a.role("vm1") == "retired"
        assert await a.read("vm1", 0, 3 * 4096) == b"new" * 4096
        assert (await b.call("info", name="vm1"))["peer"] is None, "its old home has no part in it"
        uuid = b.engine.reads.txn.volume_by_name("vm1").uuid
        mine = b.engine.reads.txn.ownership(uuid)
        for stranger in (replace(mine, peer="00" * 16), replace(mine, epoch=mine.epoch + 1)):
            await b.engine.transact(lambda txn, record=stranger: txn.put_ownership(record))
            with pytest.raises(NotOwner):
                await a.read("vm1", 0, 4096)


async def test_an_old_copy_is_not_read_after_a_way_back_that_was_cancelled(tmp_path):
    async with two(tmp_path) as (a, b):
        await a.call("peer_allow", peer=a.b, pattern="vm*", direction="in")
        await a.call("create", name="vm1", size=16 * MIB)
        await a.write("vm1", 0, b"old" * 4096)
        await a.call("migrate", names=["vm1"], to=a.b, switchover="now")
        await b.write("vm1", 0, b"new" * 4096)
        begun = await b.call("migrate", names=["vm1"], to=b.a, switchover="manual", detach=True)
        await until(lambda: a.role("vm1") == "incoming")
        assert await a.read("vm1", 0, 3) == b"new"
        await b.call("migration_cancel", id=begun["migration"])
        await until(lambda: a.role("vm1") == "none")
        clone = a.call("clone", source="vm1", new="vm2")
        for refused in (a.read("vm1", 0, 3), a.write("vm1", 0, b"two" * 4096), clone):
            with pytest.raises(NotOwner):
                await refused
        assert (await a.call("info", name="vm1"))["role"] == "tombstone"
        result = await b.call("migrate", names=["vm1"], to=b.a, switchover="now")
        assert result["verified"]
        assert await a.read("vm1", 0, 12288) == b"new" * 4096


@pytest.mark.parametrize("asked_at", ["a", "b"])
async def test_no_return_while_a_clone_needs_pages_of_the_old_home(tmp_path, asked_at):
    data = os.urandom(4 * MIB)
    async with two(tmp_path) as (a, b):
        await a.call("create", name="vm1", size=16 * MIB)
        for at in range(0, 4 * MIB, MIB):
            await a.write("vm1", at, data[at : at + MIB])
        begun = await _postcopy(a, bandwidth=4 * MIB)
        await b.call("clone", source="vm1", new="vm2")
        if asked_at == "b":
            with pytest.raises(Busy, match="vm2"):
                await b.call("migration_cancel", id=begun["migration"])
        else:
            await a.call("migration_cancel", id=begun["migration"])
        await until(lambda: a.role("vm1") == "retired")
        assert b.role("vm1") == "owner"
        assert await b.read("vm2", 0, 4 * MIB) == data


async def test_no_clone_while_a_return_runs(tmp_path):
    data = os.urandom(4 * MIB)
    async with two(tmp_path) as (a, b):
        await a.call("create", name="vm1", size=16 * MIB)
        for at in range(0, 4 * MIB, MIB):
            await a.write("vm1", at, data[at : at + MIB])
        begun = await _postcopy(a)
        b.peers._migrations.start_return(b.peers._migrations.find(begun["migration"]))
        with pytest.raises(Busy):
            await b.call("clone", source="vm1", new="vm2")
        await until(lambda: a.role("vm1") == "owner")
        assert await a.read("vm1", 0, 4 * MIB) == data


async def test_what_only_the_source_can_be_told_is_refused_at_the_destination(tmp_path):
    async with two(tmp_path) as (a, b):
        await a.call("create", name="vm1", size=16 * MIB)
        begun = await a.call("migrate", names=["vm1"], to=a.b, switchover="manual", detach=True)
        await until(lambda: b.peers._migrations.movers)
        for verb in ("migration_switchover", "migration_accept_lost"):
            with pytest.raises(UserError, match="from"):
                await b.call(verb, id=begun["migration"])
        await a.call("migration_cancel", id=begun["migration"])


async def test_an_id_that_names_no_migration_names_none(tmp_path):
    """`silofs migration cancel "$ID"` with ID empty must not end whatever is open."""
    async with two(tmp_path) as (a, _):
        await a.call("create", name="vm1", size=16 * MIB)
        begun = await a.call("migrate", names=["vm1"], to=a.b, switchover="manual", detach=True)
        for text in ("", "m", "m-"):
            with pytest.raises(NoSuchThing):
                await a.call("migration_cancel", id=text)
        assert (await a.call("migration_show", id=begun["migration"][:4]))["migration"] == begun["migration"]
        await a.call("migration_cancel", id=begun["migration"])
        for text in ("", "m-"):
            with pytest.raises(NoSuchThing):
                await a.call("migration_show", id=text)


async def test_a_snapshot_that_was_made_anew_comes_home_and_the_old_one_keeps_another_name(tmp_path):
    async with two(tmp_path) as (a, b):
        await a.call("peer_allow", peer=a.b, pattern="vm*", direction="in")
        await a.call("create", name="vm1", size=MIB)
        await a.write("vm1", 0, b"old" * 4096)
        await a.call("snapshot", volume="vm1", snapshot="daily")
        await a.call("migrate", names=["vm1"], to=a.b, switchover="now")
        await b.call("rm", volume="vm1", snapshot="daily")
        await b.write("vm1", 0, b"new" * 4096)
        await b.call("snapshot", volume="vm1", snapshot="daily")
        await b.call("migrate", names=["vm1"], to=b.a, switchover="now")
        await a.call("clone", source="vm1", snapshot="daily", new="vm2")
        await a.call("clone", source="vm1", snapshot="daily.2", new="vm3")
        assert await a.read("vm2", 0, 12288) == b"new" * 4096
        assert await a.read("vm3", 0, 12288) == b"old" * 4096


@pytest.mark.parametrize("way", ["no-snapshots", "rolled back"])
async def test_an_old_copy_stays_while_it_has_snapshots_that_did_not_travel(tmp_path, way):
    async with two(tmp_path) as (a, b):
        await a.call("create", name="vm1", size=MIB)
        await a.call("snapshot", volume="vm1", snapshot="first")
        if way == "rolled back":
            await a.write("vm1", 0, b"x" * MIB)
            await a.call("snapshot", volume="vm1", snapshot="second")
            await a.call("rollback", volume="vm1", snapshot="first")
        with_snapshots = way == "rolled back"
        await a.call("migrate", names=["vm1"], to=a.b, switchover="now", retain=0.0, snapshots=with_snapshots)
        assert [snap["name"] for snap in (await b.call("info", name="vm1"))["snapshots"]] == ["first"] * with_snapshots
        assert not a.peers._migrations.history._retained
        assert not [key for key in a.engine.reads.txn.values("host") if key.startswith("retained ")]
        assert a.role("vm1") == "retired"
        await a.call("rm", volume="vm1", force=True)


async def test_a_home_that_has_merged_a_named_state_away_refuses_before_the_switch(tmp_path):
    async with two(tmp_path) as (a, b):
        await a.call("peer_allow", peer=a.b, pattern="vm*", direction="in")
        await a.call("create", name="vm1", size=MIB)
        for number, name in enumerate(("first", "second")):
            await a.write("vm1", number * 4096, b"x" * 4096)
            await a.call("snapshot", volume="vm1", snapshot=name)
        await a.call("clone", source="vm1", snapshot="second", new="kept")
        first = a.engine.reads.txn.snapshots(a.engine.reads.txn.volume_by_name("vm1").uuid)[0].layer
        uuid = a.engine.reads.txn.layer(first).uuid
        await a.call("migrate", names=["vm1"], to=a.b, switchover="now")
        await a.call("rm", volume="vm1", force=True)
        await trio.to_thread.run_sync(drain, a.store)
        with a.store.reader() as txn:
            assert txn.layer_by_uuid(uuid) is None
        said = await b.call("migrate", names=["vm1"], to=b.a, switchover="now")
        assert (said["state"], said["left_snapshots"]) == ("failed", [])
        assert "no longer the state of a snapshot" in said["error"] and "--no-snapshots" in said["hint"]
        assert b.role("vm1") == "owner"
        await b.write("vm1", 0, b"y" * 4096)
        await b.call("migrate", names=["vm1"], to=b.a, switchover="now", snapshots=False)
        assert (a.role("vm1"), b.role("vm1")) == ("owner", "retired")
        assert await a.read("vm1", 0, 8192) == b"y" * 4096 + b"x" * 4096


@pytest.mark.parametrize("ends", ["complete", "cancelled"])
async def test_a_named_state_stays_from_prepared_to_the_take_over(tmp_path, monkeypatch, ends):
    """A merge, or a removal, at the destination after it has said that the state is there."""
    async with two(tmp_path) as (a, b):
        await a.call("peer_allow", peer=a.b, pattern="vm*", direction="in")
        await a.call("create", name="vm1", size=MIB)
        for number, name in enumerate(("first", "second")):
            await a.write("vm1", number * 4096, b"x" * 4096)
            await a.call("snapshot", volume="vm1", snapshot=name)
        await a.call("clone", source="vm1", snapshot="second", new="kept")
        txn = a.engine.reads.txn
        first = txn.snapshots(txn.volume_by_name("vm1").uuid)[0].layer
        uuid = txn.layer(first).uuid
        await a.engine.transact(lambda txn: txn.pin(first, "test"))
        await a.call("migrate", names=["vm1"], to=a.b, switchover="now")
        await a.call("rm", volume="vm1", force=True)
        sound = target_ops.check_prepare

        async def prepared(*args):
            answer = await sound(*args)
            await a.engine.transact(lambda txn: txn.unpin(first, "test"))
            await trio.to_thread.run_sync(drain, a.store)
            return answer if ends == "complete" else replace(answer, refusal=Refusal.SPACE)

        monkeypatch.setattr(target_ops, "check_prepare", prepared)
        said = await b.call("migrate", names=["vm1"], to=b.a, switchover="now")
        await until(lambda: not a.peers._migrations.movers)
        with a.store.reader() as txn:
            assert not txn.values("migration") and not [pin for each in txn.layers() for pin in txn.pins(each.id)]
        if ends == "complete":
            assert said["state"] == "complete" and a.role("vm1") == "owner"
            info = await a.call("info", name="vm1")
            assert [snap["name"] for snap in info["snapshots"]] == ["first", "second"]
            await a.call("rollback", volume="vm1", snapshot="first")
            assert await a.read("vm1", 0, 8192) == b"x" * 4096 + bytes(4096)
        else:
            assert b.role("vm1") == "owner"
            await trio.to_thread.run_sync(drain, a.store)
            with a.store.reader() as txn:
                assert txn.layer_by_uuid(uuid) is None, "nothing holds it any more"


async def test_a_state_is_not_held_for_a_migration_that_is_over(tmp_path):
    async with two(tmp_path) as (a, _):
        await a.call("create", name="vm1", size=MIB)
        await a.call("snapshot", volume="vm1", snapshot="first")
        layer = a.engine.reads.txn.layers()[0]
        answer = await target_ops.check_prepare(a.engine, bytes(16), CheckPrepare(7, 0, (layer.uuid,)))
        assert answer == PrepareChecked(7, Refusal.BASE)
        assert not a.engine.reads.txn.pins(layer.id)


async def _removed_behind_its_back(node):
    """vm1 goes while nobody looks, as it could before `rm` knew of migrations; then a daemon starts."""
    migrations = node.peers._migrations
    next(iter(migrations.movers.values())).stop()
    await until(lambda: not migrations.movers)
    uuid = node.engine.reads.txn.volume_by_name("vm1").uuid
    await node.engine.transact(lambda txn: txn.delete_volume(uuid))
    migrations._resume()
    return migrations


async def test_a_migration_whose_volume_is_gone_ends_at_the_source(tmp_path):
    async with two(tmp_path) as (a, _):
        await a.call("create", name="vm1", size=MIB)
        await a.call("migrate", names=["vm1"], to=a.b, switchover="manual", detach=True)
        await until(lambda: any(m.progress.phase is Phase.PRECOPY for m in a.peers._migrations.movers.values()))
        migrations = await _removed_behind_its_back(a)
        await until(lambda: not migrations.movers)
        assert records.stored(a.engine.reads.txn) == []
        assert a.engine.reads.txn.volumes() == []


async def test_a_migration_that_cannot_go_on_at_the_destination_keeps_nobody_from_starting(tmp_path, caplog):
    async with two(tmp_path) as (a, b):
        await a.call("create", name="vm1", size=64 * MIB)
        await a.write("vm1", 0, os.urandom(4 * MIB))
        await _postcopy(a)
        migrations = await _removed_behind_its_back(b)
        assert not migrations.movers
        assert "cannot go on" in caplog.text
        (record,) = records.stored(b.engine.reads.txn)
        link = SimpleNamespace(id=b"s" * 16, peer=record.peer)
        for message in (CancelAsk, Pull):
            header = (record.id, link.id, record.volumes)
            rest = () if message is CancelAsk else (1, b"g" * 16, (), Priority.SWEEP)
            assert migrations._stray(link, message(*header, *rest)) is None  # link has no session to answer through
        await b.call("create", name="other", size=MIB)
        assert a.role("vm1") == "ceded"


async def _postcopy(a, bandwidth=MIB):
    begun = await a.call(
        "migrate", names=["vm1"], to=a.b, switchover="now", mode="postcopy", max_bandwidth=bandwidth, detach=True
    )
    await until(lambda: a.peers._migrations.find(begun["migration"]).progress.phase.value == "pulling")
    return begun


async def until(happened):
    while not happened():
        await trio.sleep(0.01)


async def _without_rules(node):
    peer = node.peers._book.all()[0]
    await node.peers._book._put(replace(peer, rules=()))
