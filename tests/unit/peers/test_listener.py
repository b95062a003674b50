"""The port: closed unless wanted; strangers, garbage and floods are bounded and hurt nobody."""

from __future__ import annotations

import os
import socket
import ssl

import pytest
import trio
import trio.testing
import trustme

from silofs.errors import PeerRefused, SiloError
from silofs.limits import HANDSHAKE_S, UNAUTHENTICATED_MAX
from silofs.peers import identity, tls
from silofs.peers.listener import Listener

DEADLINE_S = 20
FLOOD = 1000


@pytest.fixture
def stores(tmp_path):
    made = []
    for name in ("server", "client", "stranger"):
        (tmp_path / name).mkdir()
        made.append(identity.ensure(tmp_path / name))
    return made


class Echo:
    """Echoes to peers that are pinned; remembers who came."""

    def __init__(self, server, pinned, *, inviting=False):
        self.came = []
        self.wanted = True
        self.listener = Listener(
            "127.0.0.1:0",
            context=lambda: tls.server_context(server, [p.der for p in pinned], inviting=inviting),
            wanted=lambda: self.wanted,
            handler=self.handle,
        )

    async def handle(self, stream, authenticated):
        self.came.append((stream.alpn, stream.peer_fingerprint))
        authenticated()
        while data := await stream.receive_some():
            await stream.send_all(data)


async def dial(listener, context):
    stream = tls.TlsStream(await trio.open_tcp_stream("127.0.0.1", listener.port), context, server_side=False)
    await stream.handshake()
    return stream


async def echoed(stream, data=b"hello"):
    await stream.send_all(data)
    return await stream.receive_some()


@pytest.fixture
def started(nursery):
    async def start(echo):
        nursery.start_soon(echo.listener.run)
        with trio.fail_after(DEADLINE_S):
            await echo.listener.wait_open()
        return echo

    return start


async def test_pinned_peers_talk(stores, started):
    server, client, _ = stores
    echo = await started(Echo(server, [client]))
    stream = await dial(echo.listener, tls.client_context(client, server.der, tls.ALPN_SESSION))
    assert await echoed(stream) == b"hello"
    assert stream.peer_fingerprint == server.fingerprint
    assert echo.came == [(tls.ALPN_SESSION, client.fingerprint)]
    await stream.aclose()


async def refused(listener, context):
    """A dialler that is turned away sees an error, at its handshake or at its first answer; never an echo."""
    with trio.fail_after(DEADLINE_S), pytest.raises((SiloError, OSError)):
        stream = await dial(listener, context)
        if await echoed(stream) == b"":
            raise PeerRefused("closed")


async def test_a_stranger_is_refused(stores, started):
    server, client, stranger = stores
    echo = await started(Echo(server, [client]))
    await refused(echo.listener, tls.client_context(stranger, server.der, tls.ALPN_SESSION))
    assert echo.came == []


async def test_a_client_without_a_certificate_is_refused_unless_inviting(stores, started):
    server, client, _ = stores
    echo = await started(Echo(server, [client]))
    await refused(echo.listener, tls.pairing_context())
    assert echo.came == []
    inviting = await started(Echo(server, [client], inviting=True))
    assert await echoed(await dial(inviting.listener, tls.pairing_context())) == b"hello"
    assert inviting.came == [(tls.ALPN_PAIRING, None)]


async def test_a_server_that_is_not_the_pinned_one_is_refused(stores, started):
    server, client, stranger = stores
    echo = await started(Echo(stranger, [client]))
    await refused(echo.listener, tls.client_context(client, server.der, tls.ALPN_SESSION))


async def test_a_certificate_of_some_authority_is_refused(stores, started, tmp_path):
    server, client, _ = stores
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    echo = await started(Echo(server, [client], inviting=True))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    issued.configure_cert(context)
    await refused(echo.listener, context)
    assert echo.came == []


async def test_older_tls_is_refused(stores, started):
    server, client, _ = stores
    echo = await started(Echo(server, [client]))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    await refused(echo.listener, context)


@pytest.mark.parametrize(
    "garbage", [b"", b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 70000, os.urandom(4096)]
)
async def test_garbage_is_closed_and_harmless(stores, started, garbage):
    server, client, _ = stores
    echo = await started(Echo(server, [client]))
    with trio.fail_after(DEADLINE_S):
        stream = await trio.open_tcp_stream("127.0.0.1", echo.listener.port)
        try:
            await stream.send_all(garbage)
            await stream.send_eof()
            while await stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass
    good = await dial(echo.listener, tls.client_context(client, server.der, tls.ALPN_SESSION))
    assert await echoed(good) == b"hello"


async def test_a_bit_flip_ends_the_connection(stores, started):
    server, client, _ = stores
    echo = await started(Echo(server, [client]))
    stream = await dial(echo.listener, tls.client_context(client, server.der, tls.ALPN_SESSION))
    assert await echoed(stream) == b"hello"
    stream._buffers.tls.write(b"world")
    data = bytearray(stream._buffers.outgoing.read())
    data[-3] ^= 1
    await stream._stream.send_all(data)
    with pytest.raises(SiloError):
        assert await stream.receive_some() == b"never"


async def test_a_flood_is_turned_away_and_a_session_goes_on(stores, started):
    server, client, _ = stores
    echo = await started(Echo(server, [client]))
    good = await dial(echo.listener, tls.client_context(client, server.der, tls.ALPN_SESSION))
    flood = []
    with trio.fail_after(DEADLINE_S):
        for _ in range(FLOOD):
            flood.append(await trio.open_tcp_stream("127.0.0.1", echo.listener.port))
            assert echo.listener.statistics()["unauthenticated"] <= UNAUTHENTICATED_MAX
        assert await echoed(good) == b"hello"
        for late in flood[UNAUTHENTICATED_MAX:]:
            assert await late.receive_some() == b""
        assert echo.listener.statistics()["turned_away"] == FLOOD - UNAUTHENTICATED_MAX
        assert await echoed(good, b"again") == b"again"
        for one in flood:
            await one.aclose()


async def test_a_silent_connection_is_closed_in_time(stores, nursery, autojump_clock):
    server, client, _ = stores
    with socket.create_server(("127.0.0.1", 0)) as port:
        far = socket.create_connection(port.getsockname())
        near, _ = port.accept()
    near.setblocking(False)
    echo = Echo(server, [client])
    raw = trio.SocketStream(trio.socket.from_stdlib_socket(near))
    echo.listener._unauthenticated += 1
    started = trio.current_time()
    await echo.listener._serve(raw)
    assert trio.current_time() - started == pytest.approx(HANDSHAKE_S, abs=0.5)
    assert echo.listener.statistics()["unauthenticated"] == 0
    assert far.recv(1) == b""
    far.close()


async def test_the_port_is_closed_unless_wanted(stores, nursery):
    server, client, _ = stores
    echo = Echo(server, [client])
    echo.wanted = False
    nursery.start_soon(echo.listener.run)
    await trio.testing.wait_all_tasks_blocked()
    assert not echo.listener.open
    echo.wanted = True
    echo.listener.update()
    with trio.fail_after(DEADLINE_S):
        await echo.listener.wait_open()
    await (await dial(echo.listener, tls.client_context(client, server.der, tls.ALPN_SESSION))).aclose()
    echo.wanted = False
    echo.listener.update()
    await trio.testing.wait_all_tasks_blocked()
    with pytest.raises(OSError, match=r"."):
        await trio.open_tcp_stream("127.0.0.1", echo.listener.port)
