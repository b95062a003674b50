"""TLS 1.3 between pinned certificates, on trio or on a blocking socket.

Every connection is TLS from its first byte; there is no plaintext mode and no older version. Each side trusts exactly
the certificates of its peers, presents its own, and afterwards compares the other's SHA-256 with the pinned one, so a
certificate that some peer had signed would not do either. The lane that a connection is for (a session, a bulk lane,
a pairing) is its ALPN protocol.

`TlsStream` runs the handshake under trio over memory buffers; so the same connection can go on as an asynchronous
stream (sessions) or be detached to a `BlockingLane`, which threads read or write without the event loop (bulk data).
A TLS object is not safe to read and write from two threads at once, so bulk lanes carry data one way only.
"""

from __future__ import annotations

import socket
import ssl
import threading

import trio

from silofs.errors import PeerRefused, PeerUnreachable
from silofs.peers.identity import Identity, fingerprint_of

ALPN_SESSION = "silofs-session/1"
ALPN_BULK = "silofs-bulk/1"
ALPN_PAIRING = "silofs-pairing/1"
RECEIVE_BYTES = 1 << 18


def _context(identity: Identity, purpose: int, trusted: list[bytes], alpn: list[str]) -> ssl.SSLContext:
    context = ssl.SSLContext(purpose)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_COMPRESSION
    context.check_hostname = False  # names mean nothing here: the certificate itself is pinned
    context.load_cert_chain(identity.certificate, identity.key)
    if trusted:
        context.load_verify_locations(cadata=b"".join(trusted))
    context.set_alpn_protocols(alpn)
    return context


def server_context(identity: Identity, trusted: list[bytes], *, inviting: bool) -> ssl.SSLContext:
    """For the listener. `trusted` are the DER certificates of the paired peers.

    While an invitation is open a client may come without a certificate; then it may only pair (pairing.py). One that
    presents a certificate is verified in either case.
    """
    alpn = [ALPN_SESSION, ALPN_BULK] + ([ALPN_PAIRING] if inviting else [])
    context = _context(identity, ssl.PROTOCOL_TLS_SERVER, trusted, alpn)
    context.verify_mode = ssl.CERT_OPTIONAL if inviting else ssl.CERT_REQUIRED
    context.num_tickets = 0  # no resumption: every connection proves both keys
    return context


def client_context(identity: Identity, certificate: bytes, alpn: str) -> ssl.SSLContext:
    """For dialling the one peer whose DER certificate is given."""
    context = _context(identity, ssl.PROTOCOL_TLS_CLIENT, [certificate], [alpn])
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def pairing_context() -> ssl.SSLContext:
    """For dialling an inviter of whom only the fingerprint is known: the caller compares it before it says a word."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([ALPN_PAIRING])
    return context


class _Buffers:
    """A TLS object between two memory buffers; who fills and empties them decides whether it blocks."""

    def __init__(self, context: ssl.SSLContext, *, server_side: bool) -> None:
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=server_side)


class TlsFailed(PeerRefused):
    """TLS itself said no."""


def _failure(error: ssl.SSLError) -> TlsFailed:
    return TlsFailed(
        f"the TLS connection failed: {error.reason or error}",
        hint="the other side is not the paired store, or does not know this one: pair them again",
    )


class TlsStream(trio.abc.Stream):
    """One TLS connection under trio. One task may send while another receives.

    Raises PeerRefused when TLS says no (wrong or missing certificate, damaged bytes) and PeerUnreachable when the
    connection is gone; a cut without close_notify counts as gone.
    """

    def __init__(self, stream: trio.SocketStream, context: ssl.SSLContext, *, server_side: bool) -> None:
        self._stream = stream
        self._buffers = _Buffers(context, server_side=server_side)
        self._send_lock = trio.Lock()

    async def handshake(self) -> None:
        while True:
            try:
                self._buffers.tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
            except ssl.SSLError as error:
                await self._say_goodbye()
                raise _failure(error) from error
            else:
                await self._flush()
                return

    @property
    def alpn(self) -> str | None:
        return self._buffers.tls.selected_alpn_protocol()

    @property
    def peer_fingerprint(self) -> bytes | None:
        """SHA-256 of the other side's certificate; None if it presented none."""
        der = self._buffers.tls.getpeercert(binary_form=True)
        return fingerprint_of(der) if der else None

    @property
    def remote_address(self) -> str:
        try:
            host, port = self._stream.socket.getpeername()[:2]
        except OSError:
            return "?"
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        # One task at a time from the encryption to the socket: records must leave in the order in which they were made.
        async with self._send_lock:
            try:
                self._buffers.tls.write(data)
            except ssl.SSLError as error:
                raise _failure(error) from error
            await self._send_pending()

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        while True:
            try:
                return self._buffers.tls.read(max_bytes or RECEIVE_BYTES)
            except ssl.SSLWantReadError:
                if self._buffers.outgoing.pending:
                    await self._flush()
                await self._fill()
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLError as error:
                raise _failure(error) from error

    async def aclose(self) -> None:
        """Says goodbye without waiting for an answer, then closes the socket."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 0.5):
            await self._say_goodbye()
        await trio.aclose_forcefully(self._stream)

    def detach(self) -> BlockingLane:
        """Hands the connection over to blocking code; this object is unusable afterwards."""
        # trio tells whoever waits on the socket that it is closed; the descriptor itself lives on in the duplicate.
        raw = socket.socket(fileno=socket.dup(self._stream.socket.fileno()))
        self._stream.socket.close()
        return BlockingLane(raw, self._buffers)

    async def _fill(self) -> None:
        try:
            data = await self._stream.receive_some(RECEIVE_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise PeerUnreachable("the connection broke") from error
        if not data:
            raise PeerUnreachable("the other side closed the connection")
        self._buffers.incoming.write(data)

    async def _flush(self) -> None:
        async with self._send_lock:
            await self._send_pending()

    async def _send_pending(self) -> None:
        data = self._buffers.outgoing.read()
        if not data:
            return
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise PeerUnreachable("the connection broke") from error

    async def _say_goodbye(self) -> None:
        """Sends what TLS still has to say (an alert, close_notify), if the socket takes it."""
        try:
            self._buffers.tls.unwrap()
        except (ssl.SSLError, OSError, ValueError):
            pass
        if self._send_lock.locked():
            return
        try:
            await self._flush()
        except PeerUnreachable:
            pass


class BlockingLane:
    """A TLS connection for threads: one thread, one direction. `stop` may be called from any thread.

    A send or receive that makes no progress for `timeout` seconds, or that is stopped, raises PeerUnreachable.
    """

    def __init__(self, raw: socket.socket, buffers: _Buffers) -> None:
        self._raw = raw
        self._buffers = buffers
        self._stopped = threading.Event()
        raw.setblocking(True)

    def set_timeout(self, seconds: float) -> None:
        self._raw.settimeout(seconds)

    def send(self, data: bytes | bytearray | memoryview) -> None:
        try:
            self._buffers.tls.write(data)
            self._raw.sendall(self._buffers.outgoing.read())
        except (OSError, ssl.SSLError) as error:
            raise PeerUnreachable(f"the bulk lane broke: {error}") from error

    def receive(self) -> bytes:
        """At least one byte; b"" when the other side said goodbye."""
        while True:
            try:
                return self._buffers.tls.read(RECEIVE_BYTES)
            except ssl.SSLWantReadError:
                self._fill()
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLError as error:
                raise PeerUnreachable(f"the bulk lane broke: {error.reason or error}") from error

    def _fill(self) -> None:
        try:
            data = self._raw.recv(RECEIVE_BYTES)
        except OSError as error:
            raise PeerUnreachable(f"the bulk lane broke: {error}") from error
        if not data:
            raise PeerUnreachable("the other side closed the bulk lane")
        self._buffers.incoming.write(data)

    def stop(self) -> None:
        """Wakes whoever is blocked on the connection and ends it."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        try:
            self._raw.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self) -> None:
        self.stop()
        self._raw.close()
