"""Two stores in one process, each with its engine and its peers, over real sockets. No mount."""

from __future__ import annotations

import os
import socket
from contextlib import asynccontextmanager

import trio

from silofs.engine import Engine
from silofs.layers.log import WriteLog
from silofs.layers.store import Store
from silofs.peers.service import Peers
from silofs.service import Service

DEADLINE_S = 20.0


class Call:
    def __init__(self):
        self.fds = []
        self.lines = []

    async def progress(self, **fields):
        self.lines.append(fields)


class Node:
    """A store with its daemon's parts. `down` ends the parts as a crash would: nothing is flushed."""

    def __init__(self, path, *, listen="free"):
        if listen == "free":
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                listen = f"127.0.0.1:{probe.getsockname()[1]}"
        self.path = path
        if not (path / "lock").exists():
            Store.create(path)
        self.listen = listen
        self.memfd = os.memfd_create("log")
        self.up = False

    @asynccontextmanager
    async def running(self):
        self.store = Store.open(self.path)
        if os.fstat(self.memfd).st_size == 0:
            WriteLog.format(self.memfd, self.store.uuid)
        self.log = WriteLog.open(self.memfd, self.store.uuid)
        self.engine = Engine(self.store, self.log)
        self.engine.recover()
        self.service = Service(self.engine)
        try:
            async with trio.open_nursery() as nursery:
                self.peers = Peers(self.engine, self.listen)
                await nursery.start(self.engine.run)
                await self.peers.start(nursery, self.service)
                yield self
                nursery.cancel_scope.cancel()
        finally:
            self.engine.close()
            self.store.close()

    async def call(self, verb, **args):
        return await self.service.call(verb, args, Call())

    async def pair_with(self, other):
        """`other` invites, this one joins."""
        token = (await other.call("peer_invite"))["token"]
        return (await self.call("peer_join", token=token))["name"]

    async def write(self, name, offset, data):
        volume = self.engine.open_volume(self.engine.reads.txn.volume_by_name(name).uuid)
        await self.engine.write(volume, offset, data)

    async def read(self, name, offset, length):
        volume = self.engine.open_volume(self.engine.reads.txn.volume_by_name(name).uuid)
        return bytes(await self.engine.read(volume, offset, length))

    def role(self, name):
        txn = self.engine.reads.txn
        return str(txn.ownership(txn.volume_by_name(name).uuid).role)


@asynccontextmanager
async def two(tmp_path, **options):
    """(a, b): running, paired, b lets a bring anything."""
    a, b = Node(tmp_path / "a", **options), Node(tmp_path / "b")
    with trio.fail_after(DEADLINE_S):
        async with a.running(), b.running():
            a.b = await a.pair_with(b)
            b.a = (await b.call("peer_ls"))["peers"][0]["name"]
            await b.call("peer_allow", peer=b.a, pattern="*", direction="in")
            yield a, b
