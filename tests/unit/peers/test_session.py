"""One session: HELLO first and once, frames bounded, pings, and nothing wrong ever reaches the receiver."""

from __future__ import annotations

import socket
import struct

import pytest
import trio
from msgspec.structs import replace

from silofs.errors import PeerError, ProtocolError
from silofs.limits import FRAME_BYTES_MAX, PING_MISSED_MAX, PING_S
from silofs.migrate import wire
from silofs.migrate.messages import Hello, Ping
from silofs.peers import session as session_module
from silofs.peers.session import Session

ID = bytes(range(16))
A, B = b"a" * 16, b"b" * 16


class Pipe:
    """Stands in for TlsStream: one end of a socket pair."""

    remote_address = "test"

    def __init__(self, sock):
        sock.setblocking(False)
        self.stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    async def send_all(self, data):
        await self.stream.send_all(data)

    async def receive_some(self, max_bytes=None):
        return await self.stream.receive_some(max_bytes or 65536)

    async def aclose(self):
        await self.stream.aclose()


def pair():
    with socket.create_server(("127.0.0.1", 0)) as port:
        left = socket.create_connection(port.getsockname())
        right, _ = port.accept()
    return Pipe(left), Pipe(right)


def hello_of(store):
    return lambda session: Hello((wire.VERSION, wire.VERSION), store, session, (), (), ())


async def greeted():
    """(session at B, raw pipe at A with its frame writer and reader)"""
    near, far = pair()
    there = Session(near, A, dialled=False)
    writer, reader = wire.FrameWriter(), wire.FrameReader()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(there.greet, hello_of(B), b"")
        await far.send_all(writer.encode(hello_of(A)(ID)))
        assert next(iter(reader.feed(await far.receive_some()))).session == ID
    return there, far, writer, reader


async def run_until_closed(there, act):
    got = []

    async def receive(message):
        got.append(message)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(there.run, receive)
            await act()
            await there.closed.wait()
    return got


async def test_two_sessions_greet_each_other():
    near, far = pair()
    one, two = Session(near, B, dialled=True), Session(far, A, dialled=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.greet, hello_of(A), ID)
        nursery.start_soon(two.greet, hello_of(B), b"")
    assert one.id == two.id == ID
    assert (one.hello.store, two.hello.store) == (B, A)


@pytest.mark.parametrize(
    "changes", [{"store": b"c" * 16}, {"versions": (7, 9)}], ids=["another store", "another version"]
)
async def test_a_hello_that_does_not_fit_is_refused(changes):
    near, far = pair()
    there = Session(near, A, dialled=False)
    await far.send_all(wire.FrameWriter().encode(replace(hello_of(A)(ID), **changes)))
    with pytest.raises(ProtocolError):
        await there.greet(hello_of(B), b"")


async def test_the_first_message_is_hello():
    near, far = pair()
    there = Session(near, A, dialled=False)
    await far.send_all(wire.FrameWriter().encode(Ping(1)))
    with pytest.raises(ProtocolError):
        await there.greet(hello_of(B), b"")


def _header(length, *, magic=b"sF", version=1, kind=1, sequence=1):
    return wire.HEADER.pack(magic, version, kind, length, sequence, 0)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 64,
        _header(FRAME_BYTES_MAX + 1),
        _header(0xFFFFFFFF),
        _header(8, sequence=5) + b"x" * 8,
        _header(8, kind=9) + b"x" * 8,
        _header(8, version=2) + b"x" * 8,
        _header(8) + b"x" * 8,
        struct.pack(">Q", 1) * 40,
    ],
)
async def test_what_is_no_frame_ends_the_session_and_reaches_nobody(garbage):
    there, far, _, _ = await greeted()
    assert await run_until_closed(there, lambda: far.send_all(garbage)) == []
    assert there.reason


async def test_a_second_hello_ends_the_session():
    there, far, writer, _ = await greeted()
    assert await run_until_closed(there, lambda: far.send_all(writer.encode(hello_of(A)(ID)))) == []
    assert "HELLO" in there.reason


async def test_a_replayed_frame_ends_the_session():
    there, far, writer, _ = await greeted()
    frame = writer.encode(Ping(3))
    assert await run_until_closed(there, lambda: far.send_all(frame + frame)) == []


async def test_pings_are_answered_and_silence_ends_the_session(autojump_clock):
    there, far, writer, reader = await greeted()
    seen = []

    async def act():
        await far.send_all(writer.encode(Ping(42)))
        while not any(getattr(frame, "number", None) == 42 for frame in seen):
            seen.extend(reader.feed(await far.receive_some()))

    started = trio.current_time()
    await run_until_closed_slowly(there, act)
    assert "nothing heard" in there.reason
    assert trio.current_time() - started == pytest.approx(PING_S * (PING_MISSED_MAX + 1), abs=PING_S + 1)


async def run_until_closed_slowly(there, act):
    async def receive(message):
        raise AssertionError(message)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(there.run, receive)
        await act()
        await there.closed.wait()


async def test_a_peer_that_does_not_read_is_cut_off(monkeypatch):
    monkeypatch.setattr(session_module, "QUEUED_MESSAGES_MAX", 100)
    there, _, _, _ = await greeted()
    for number in range(102):
        there.send(Ping(number))
    assert there.closed.is_set() and "read" in there.reason


async def test_a_cut_is_seen():
    there, far, _, _ = await greeted()
    await run_until_closed(there, far.aclose)
    assert there.reason


async def test_an_error_of_the_receiver_for_the_peer_ends_the_session():
    there, far, writer, _ = await greeted()

    async def receive(message):
        raise ProtocolError("not now")

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(there.run, receive)
            await far.send_all(writer.encode(wire.PagesFrame(ID, ID, ID, 1, True, ())))
            await there.closed.wait()
    assert there.reason == "not now"
    assert issubclass(ProtocolError, PeerError)
