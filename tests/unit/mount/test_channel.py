from __future__ import annotations

import os
import socket

import pytest

from silofs.mount.channel import PACKET_BYTES_MAX, Channel, ChannelError, decode, encode


def test_messages_arrive_whole_and_in_order_with_their_descriptors() -> None:
    ours, theirs = Channel.pair()
    other = Channel(theirs)
    reader, writer = os.pipe()
    assert ours.send("open", [writer], n=1)
    assert ours.send("serve", restarts=3)
    first, second = other.receive(), other.receive()
    assert first is not None and second is not None
    assert (first.op, first.fields, len(first.fds)) == ("open", {"n": 1}, 1)
    assert (second.op, second.fields, second.fds) == ("serve", {"restarts": 3}, ())
    os.write(first.fds[0], b"x")
    assert os.read(reader, 1) == b"x"
    assert not os.get_inheritable(first.fds[0])
    for fd in (reader, writer, *first.fds):
        os.close(fd)
    with pytest.raises(BlockingIOError):
        other.receive()
    ours.close()
    assert other.receive() is None
    assert not other.send("pong")
    other.close()


@pytest.mark.parametrize("packet", [b"{", b"[]", b"{}", b'{"op": 1}', b"\xff", b"null", b'"op"'])
def test_what_is_no_message_is_refused(packet: bytes) -> None:
    with pytest.raises(ChannelError):
        decode(packet)


def test_unknown_fields_and_operations_pass() -> None:
    message = decode(encode("from-the-future", {"x": [1]}))
    assert (message.op, message.fields) == ("from-the-future", {"x": [1]})


def test_a_reader_that_does_not_read_blocks_nobody() -> None:
    ours, theirs = Channel.pair()
    with theirs:
        while ours.send("ping", n=1):
            pass
    ours.close()


def test_a_packet_is_bounded() -> None:
    with pytest.raises(AssertionError):
        encode("op", {"text": "x" * PACKET_BYTES_MAX})


def test_the_inherited_end_is_not_passed_on() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fd = os.dup(right.fileno())
    os.set_inheritable(fd, True)
    channel = Channel.inherited(fd)
    assert not os.get_inheritable(channel.fileno())
    channel.close()
    left.close()
    right.close()
