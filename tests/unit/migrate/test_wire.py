"""Frames from a broken or hostile peer: nothing but a ProtocolError, and nothing allocated before."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from silofs import limits
from silofs.errors import ProtocolError
from silofs.migrate import messages as ms
from silofs.migrate.codec import Codec
from silofs.migrate.wire import HEADER, MAGIC, VERSION, FrameReader, FrameType, FrameWriter, PagesFrame

M, S, V = b"m" * 16, b"s" * 16, (ms.VolumeEpoch(b"v" * 16, 2),)
ACK = ms.Ack(M, S, V)


def frame(kind: int, payload: bytes, sequence: int = 0, **wrong: Any) -> bytes:
    head = {"magic": MAGIC, "version": VERSION, "length": len(payload), "seed": sequence} | wrong
    check = xxhash.xxh3_64_intdigest(payload, seed=head["seed"])
    return HEADER.pack(head["magic"], head["version"], kind, head["length"], sequence, check) + payload


def decode(*data: bytes) -> list[Any]:
    reader = FrameReader()
    return [decoded for part in data for decoded in reader.feed(part)]


def pages_frame() -> PagesFrame:
    blocks = tuple(
        Codec().encode(S, number, {number * 16 + 3: bytes([number]) * 4096, number * 16 + 5: bytes(range(256)) * 16})
        for number in (0, 7, 9)
    )
    return PagesFrame(S, M, b"g" * 16, 7, False, blocks)


def test_every_message_survives_the_wire() -> None:
    segment = ms.Segment(b"v" * 16, b"g" * 16, b"", 1 << 20, 1 << 20, 12, 1)
    offered = ms.Offered(b"v" * 16, "vm.1", 1 << 20, 12, (b"g" * 16,))
    base = ms.Base(b"v" * 16, b"")
    part = ms.MapPart(b"g" * 16, 0, None, (ms.MapRun(0, 4, ms.PageKind.DATA), ms.MapRun(9, 1, ms.PageKind.ZERO)))
    head = (M, S, V)
    sent = [
        ms.Hello((1, 2), S, S, ("locks",), (ms.SharedVolume(b"v" * 16, "owner", 3, 0),), (M,)),
        ms.Ping(1),
        ms.Pong(1),
        ms.Offer(*head, (offered,), False, b""),
        ms.Announce(*head, 3, (base,), (segment,), True),
        ms.Prepare(*head, 1, 20, (b"s" * 16,)),
        ms.Grant(
            *head, (offered,), (base,), (segment,), (ms.Base(b"v" * 16, b"g" * 16),),
            (ms.SnapshotInfo(b"v" * 16, "daily", b"g" * 16, 4096, 1),), (part,), False,
        ),
        ms.Cancelled(*head, ms.Refusal.CANCELLED),
        ms.Map(*head, 4, part),
        ms.Lost(*head, 4, b"g" * 16, (ms.Run(3, 1),)),
        ms.Unserved(*head, 4, b"g" * 16),
        ms.Digests(*head, (ms.SegmentDigest(b"g" * 16, bytes(32)),)),
        ms.CompleteAck(*head),
        ms.ReturnAsk(*head),
        ms.Ready(*head, (base,)),
        ms.Refuse(*head, ms.Refusal.SPACE, "no space"),
        ms.RoundDone(*head, 3),
        ms.Prepared(*head, 1, None),
        ms.MapAsk(*head, 4, b"g" * 16, 0),
        ms.Pull(*head, 4, b"g" * 16, (ms.Run(0, 4),), ms.Priority.SWEEP),
        ACK,
        ms.Nack(*head, ms.Refusal.EPOCH, V),
        ms.DigestAsk(*head),
        ms.Complete(*head, 0),
        ms.CancelAsk(*head),
        ms.ReadAsk(*head, 4, 512, 4096),
        ms.ReadReply(*head, 4, b"data"),
    ]  # fmt: skip
    kinds = set(ms.AnyMessage.__args__)
    assert {type(message) for message in sent} == kinds, "a message has no sample here"
    writer = FrameWriter()
    stream = b"".join(writer.encode(message) for message in sent)
    assert decode(stream) == sent
    assert decode(*(stream[i : i + 1] for i in range(len(stream)))) == sent


def test_pages_survive_the_wire() -> None:
    sent = pages_frame()
    (got,) = decode(FrameWriter().encode(sent))
    assert got == sent
    assert decode(FrameWriter().encode(msgspec.structs.replace(sent, blocks=(), last=True)))[0].last


@pytest.mark.parametrize(
    "data",
    [
        frame(1, b"", magic=b"xx"),
        frame(1, b"", version=VERSION + 1),
        frame(0, b""),
        frame(3, b""),
        frame(1, b"", sequence=1),
        frame(1, b"\xc0"),
        frame(1, b""),
        frame(1, msgspec.msgpack.encode(ACK), seed=5),
        frame(1, msgspec.msgpack.encode(ACK) + b"x"),
        frame(1, msgspec.msgpack.encode(["nosuch", 1])),
        frame(1, msgspec.msgpack.encode(["ack", M[:15], S, [[b"v" * 16, 2]]])),
        frame(1, msgspec.msgpack.encode(["ack", M, S, []])),
        frame(1, msgspec.msgpack.encode(["ack", M, S, [[b"v" * 16, -1]]])),
        frame(1, msgspec.msgpack.encode(["ack", M, S, [[b"v" * 16, 2]] * (limits.GROUP_MAX + 1)])),
        frame(1, msgspec.msgpack.encode(["ack", M, S, [[b"v" * 16, 2]], "more"])),
        frame(1, msgspec.msgpack.encode(["pull", M, S, [[b"v" * 16, 2]], 1, b"g" * 16, [[0, 0]], 0])),
        frame(1, msgspec.msgpack.encode(["pull", M, S, [[b"v" * 16, 2]], 1, b"g" * 16, [[0, 1]], 9])),
        frame(1, b"\x91" * 3000),
        frame(2, b""),
        frame(2, b"x" * 40),
    ],
)
def test_a_frame_that_is_not_exactly_right_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


@pytest.mark.parametrize("name", ["../x", "", ".hidden", "a/b", "a\0", "ä", "-rf", "x" * 129, "vm\n"])
def test_names_from_a_peer_are_names(name: str) -> None:
    payload = msgspec.msgpack.encode(["offer", M, S, [[b"v" * 16, 2]], [[b"v" * 16, name, 4096, 1, []]], False, b""])
    with pytest.raises(ProtocolError):
        decode(frame(1, payload))


def test_the_length_is_refused_before_the_payload_is_there() -> None:
    header = HEADER.pack(MAGIC, VERSION, 2, limits.FRAME_BYTES_MAX + 1, 0, 0)
    with pytest.raises(ProtocolError):
        FrameReader().header(header)
    assert FrameReader().header(HEADER.pack(MAGIC, VERSION, 2, limits.FRAME_BYTES_MAX, 0, 0)) == limits.FRAME_BYTES_MAX


def test_repeated_swapped_and_missing_frames_are_refused() -> None:
    writer = FrameWriter()
    first, second, third = (writer.encode(ms.Ping(i)) for i in range(3))
    for order in ((first, first), (second,), (first, third)):
        with pytest.raises(ProtocolError):
            decode(*order)


@given(st.binary(max_size=300), st.sampled_from(list(FrameType)))
def test_any_payload_is_a_message_or_a_protocol_error(payload: bytes, kind: FrameType) -> None:
    try:
        decode(frame(kind, payload))
    except ProtocolError:
        pass


@given(st.data())
def test_a_damaged_pages_frame_is_a_protocol_error_or_decodes_to_something_bounded(data: st.DataObject) -> None:
    payload = bytearray(FrameWriter().encode(pages_frame())[HEADER.size :])
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    payload = payload[: data.draw(st.integers(0, len(payload)))]
    codec = Codec()
    try:
        (got,) = decode(frame(2, bytes(payload)))
        for block in got.blocks:
            decoded = codec.decode(S, block)
            assert len(decoded) <= 16 and all(len(page) == 4096 for page in decoded.values())
    except ProtocolError:
        pass


def test_blocks_out_of_order_or_too_many_are_refused() -> None:
    good = FrameWriter().encode(pages_frame())[HEADER.size :]
    count_at = 16 * 3 + 4 + 1
    for count in (2, 4, 17, 65535):
        with pytest.raises(ProtocolError):
            decode(frame(2, good[:count_at] + struct.pack(">H", count) + good[count_at + 2 :]))
    backwards = msgspec.structs.replace(pages_frame(), blocks=pages_frame().blocks[::-1])
    with pytest.raises(ProtocolError):
        decode(FrameWriter().encode(backwards))
