"""Pairing and sessions between two real daemons' parts in one process."""

from __future__ import annotations

import os

import pytest
import trio

from silofs.errors import Busy, NoSuchThing, PeerRefused, PeerUnreachable, UserError
from silofs.limits import INVITE_S
from silofs.migrate.messages import Pull, Run, VolumeEpoch
from silofs.peers import pairing, tls
from silofs.peers.hub import dial
from tests.unit.peers.node import DEADLINE_S, Node, two

MIB = 1 << 20


async def linked(a, b):
    """Both ends' links of a session between them, once it is up."""
    peer = a.peers._book.all()[0]
    link = await a.peers._hub.connect(peer)
    while b.peers._hub.link(a.peers._identity.store_id) is None:
        await b.peers._hub.wait_moved()
    return link, b.peers._hub.link(a.peers._identity.store_id)


async def test_a_token_pairs_once(tmp_path):
    a, b, c = (Node(tmp_path / name) for name in "abc")
    with trio.fail_after(DEADLINE_S):
        async with a.running(), b.running(), c.running():
            token = (await b.call("peer_invite"))["token"]
            joined = await a.call("peer_join", token=token)
            assert joined["fingerprint"] == b.peers._identity.fingerprint.hex()
            for node in (a, c):
                with pytest.raises(PeerRefused, match="used"):
                    await node.call("peer_join", token=token)
            with pytest.raises(UserError, match="this very store"):
                await b.call("peer_join", token=(await b.call("peer_invite"))["token"])
            assert len((await b.call("peer_ls"))["peers"]) == 1
            assert (await c.call("peer_ls"))["peers"] == []


async def test_an_expired_token_is_refused(tmp_path):
    a, b = (Node(tmp_path / name) for name in "ab")
    with trio.fail_after(DEADLINE_S):
        async with a.running(), b.running():
            await b.call("peer_invite")  # keeps the port open
            secret = b.peers._hub.invitations.invite(trio.current_time() - INVITE_S - 1)
            address = b.peers._listener.address
            token = pairing.Token(address, b.peers._identity.fingerprint, secret)
            with pytest.raises(PeerRefused, match="expired"):
                await a.call("peer_join", token=token.word())
            wrong = pairing.Token(address, b.peers._identity.fingerprint, bytes(16))
            with pytest.raises(PeerRefused, match="does not know"):
                await a.call("peer_join", token=wrong.word())
            stranger = pairing.Token(address, a.peers._identity.fingerprint[::-1], secret)
            with pytest.raises(PeerRefused, match="not the one that made"):
                await a.call("peer_join", token=stranger.word())
            assert (await b.call("peer_ls"))["peers"] == []


async def test_without_a_listener_there_is_no_invitation_but_a_session(tmp_path):
    a, b = Node(tmp_path / "a", listen=None), Node(tmp_path / "b")
    with trio.fail_after(DEADLINE_S):
        async with a.running(), b.running():
            with pytest.raises(UserError, match="no listener"):
                await a.call("peer_invite")
            await a.pair_with(b)
            _, there = await linked(a, b)
            assert not there.session.dialled


async def test_a_new_session_replaces_the_old_one(tmp_path):
    async with two(tmp_path) as (a, b):
        mine, theirs = await linked(a, b)
        await a.peers._hub._dial(a.peers._book.all()[0])
        await theirs.session.closed.wait()
        assert theirs.session.reason == "a new session replaced it"
        await mine.session.closed.wait()
        assert b.peers._hub.link(theirs.peer) is not theirs


async def test_both_dial_at_once_and_one_session_is_left(tmp_path):
    async with two(tmp_path) as (a, b):
        for _ in range(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.peers._hub.connect, a.peers._book.all()[0])
                nursery.start_soon(b.peers._hub.connect, b.peers._book.all()[0])
            mine, theirs = await linked(a, b)
            mine.session.close("test")
            await mine.session.closed.wait()
            await theirs.session.closed.wait()


async def test_a_lane_of_no_session_is_refused(tmp_path):
    async with two(tmp_path) as (a, _):
        peer = a.peers._book.all()[0]
        context = tls.client_context(a.peers._identity, peer.certificate, tls.ALPN_BULK)
        stream = await dial(peer.address, context)
        await stream.send_all(os.urandom(16) + b">")
        with pytest.raises((PeerUnreachable, PeerRefused)):
            assert await stream.receive_some() != b""
            await stream.receive_some()
        await trio.aclose_forcefully(stream)


async def test_a_paired_peer_reads_nothing_outside_of_a_migration(tmp_path):
    async with two(tmp_path) as (a, b):
        await a.call("create", name="secret", size=MIB)
        await a.write("secret", 0, b"s" * 4096)
        await a.call("snapshot", volume="secret", snapshot="s")
        txn = a.engine.reads.txn
        volume = txn.volume_by_name("secret")
        layer = txn.layer(txn.snapshots(volume.uuid)[0].layer)
        _, link = await linked(a, b)
        before = [mover.id for mover in a.peers._migrations.movers.values()]
        seen = []
        original = b.peers._migrations._message
        b.peers._migrations._message = lambda link, message: (seen.append(message), original(link, message))
        pull = Pull(os.urandom(16), link.id, (VolumeEpoch(volume.uuid, 2),), 1, layer.uuid, (Run(0, 1),), 0)
        link.session.send(pull)
        while not seen:
            await trio.sleep(0)
        assert type(seen[0]).__name__ == "Unserved"
        assert before == []


async def test_a_peer_is_not_forgotten_while_a_migration_needs_it(tmp_path):
    async with two(tmp_path) as (a, b):
        await a.call("create", name="vm1", size=MIB)
        begun = await a.call("migrate", names=["vm1"], to=a.b, switchover="manual", detach=True)
        while not a.peers._migrations.find(begun["migration"]).record.bases:
            await trio.sleep(0.01)
        with pytest.raises(Busy, match="not over"):
            await a.call("peer_rm", name=a.b)
        await a.call("migration_cancel", id=begun["migration"])
        while b.peers._migrations.movers:
            await trio.sleep(0.01)
        await a.call("peer_rm", name=a.b)
        with pytest.raises(NoSuchThing):
            await a.call("migrate", names=["vm1"], to=a.b)
