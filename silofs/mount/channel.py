"""Messages between holder and daemon: one JSON object a packet, with descriptors attached, over a SEQPACKET pair.

    holder -> daemon                                            daemon -> holder
    init                    INIT comes on the session's socket  able abilities logs formats, then (the reply to INIT)
    open   fds lock, log    open the store and replay the log   opened learnt | failed code message hint exit
           killed           by which signal the last one died
    serve  fds fuse         take the requests; + what status    serving format
           shows: restarts, deaths, refused, capabilities
    ping   n                                                    pong n
    log    fds file         messages go there from now on
    drain                   finish requests, commit, exit       bye clean, as the last word
    quit                    the same; no request was ever taken bye clean
    answer id error         to a restart that was refused       restart id

`logs` are the versions of the write log that the daemon can take over (none said: 1), `formats` those of the store that
it can open, and `format` that of the store which it has opened; `learnt` counts the places of the
store that it leaves alone from now on, since the last one died of them.

A packet is whole or absent, so there is no framing; the two ends are always of one installation or of two neighbouring
versions (an upgrade), so unknown fields are ignored and an unknown `op` is too. Nothing here blocks for long: both ends
are read when readable, and a packet is far smaller than the socket's buffer.
"""

from __future__ import annotations

import json
import os
import select
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

PACKET_BYTES_MAX = 65536
FDS_MAX = 4


@dataclass(frozen=True)
class Message:
    """One packet. `fds` belong to the receiver, close-on-exec."""

    op: str
    fields: dict[str, Any] = field(default_factory=dict)
    fds: tuple[int, ...] = ()


class ChannelError(Exception):
    """The other end sent what is no message."""


def encode(op: str, fields: dict[str, Any]) -> bytes:
    packet = json.dumps({**fields, "op": op}).encode()
    assert len(packet) <= PACKET_BYTES_MAX
    return packet


def decode(packet: bytes, fds: Sequence[int] = ()) -> Message:
    """Raises ChannelError on anything that `encode` cannot have made."""
    try:
        fields = json.loads(packet)
        op = fields.pop("op")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ChannelError(f"no message: {packet[:80]!r}") from error
    if not isinstance(op, str):
        raise ChannelError(f"no message: {packet[:80]!r}")
    return Message(op, fields, tuple(fds))


class Channel:
    """One end. Non-blocking: `receive` raises BlockingIOError when there is nothing."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    @classmethod
    def pair(cls) -> tuple[Channel, socket.socket]:
        """This side's channel, and the socket for the child to inherit."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), theirs

    @classmethod
    def inherited(cls, fd: int) -> Channel:
        """The child's side of a pair. The descriptor stays out of the child's own children."""
        os.set_inheritable(fd, False)
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, op: str, fds: Sequence[int] = (), **fields: Any) -> bool:
        """False when the other end is gone, or does not read: its death is then found by other means."""
        try:
            if fds:
                socket.send_fds(self._sock, [encode(op, fields)], fds)
            else:
                self._sock.send(encode(op, fields))
        except OSError:
            return False
        return True

    def receive(self) -> Message | None:
        """The next message, or None when the other end is closed."""
        try:
            packet, fds, _flags, _address = socket.recv_fds(self._sock, PACKET_BYTES_MAX, FDS_MAX)
        except ConnectionError:
            return None
        for fd in fds:
            os.set_inheritable(fd, False)
        if not packet:
            return None
        return decode(packet, fds)

    @property
    def gone(self) -> bool:
        """Whether the other end is closed, although what it sent before may still be here."""
        poller = select.poll()
        poller.register(self._sock, select.POLLRDHUP)
        return bool(poller.poll(0))

    def close(self) -> None:
        self._sock.close()
