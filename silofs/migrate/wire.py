"""Frames: what a stream between two peers consists of (docs/protocol.md, "Messages"). Sans-IO.

Header, 24 bytes big-endian: magic "sF", version, type, payload length u32, sequence number u64, xxh3-64 of the payload
seeded with the sequence number. The length is checked before anything is allocated for it. Sequence numbers count from
0 per stream and direction: a frame that is missing, repeated or swapped ends the session, as does all else that is not
exactly as it must be (ProtocolError). Type 1: one message, msgpack. Type 2: pages.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator

import msgspec
import xxhash

from silofs import limits
from silofs.errors import ProtocolError
from silofs.migrate.codec import Block
from silofs.migrate.messages import AnyMessage

VERSION = 2
MAGIC = b"sF"
HEADER = struct.Struct(">2sBBIQQ")
BLOCKS_MAX = 16  # blocks in one pages frame: 1 MiB uncompressed
_PAGES = struct.Struct(">16s16s16sIBH")
_BLOCK = struct.Struct(">QHBI")
_BLOCK_NUMBER_MAX = limits.SIZE_MAX // 65536


class FrameType(enum.IntEnum):
    MESSAGE = 1
    PAGES = 2


class PagesFrame(msgspec.Struct, frozen=True):
    """Pages that answer PULL `request`. `last`: nothing more comes for it (an empty last frame is allowed)."""

    session: bytes
    migration: bytes
    segment: bytes
    request: int
    last: bool
    blocks: tuple[Block, ...]


Frame = AnyMessage | PagesFrame


class FrameWriter:
    """Encodes the frames of one direction of one stream."""

    def __init__(self) -> None:
        self._sequence = 0
        self._encoder = msgspec.msgpack.Encoder()

    def encode(self, frame: Frame) -> bytes:
        """Header and payload. The caller writes the results in the order of the calls."""
        if isinstance(frame, PagesFrame):
            kind, payload = FrameType.PAGES, _pack_pages(frame)
        else:
            kind, payload = FrameType.MESSAGE, self._encoder.encode(frame)
        assert len(payload) <= limits.FRAME_BYTES_MAX, "our own frame is too long"
        sequence, self._sequence = self._sequence, self._sequence + 1
        check = xxhash.xxh3_64_intdigest(payload, seed=sequence)
        return HEADER.pack(MAGIC, VERSION, kind, len(payload), sequence, check) + payload


class FrameReader:
    """Decodes the frames of one direction of one stream.

    Either `header` (exactly HEADER.size bytes in, payload length out) and `payload` in turn, or `feed` with whatever
    arrived. After a ProtocolError the stream is to be closed.
    """

    def __init__(self) -> None:
        self._sequence = 0
        self._decoder = msgspec.msgpack.Decoder(AnyMessage)
        self._pending: tuple[FrameType, int, int, int] | None = None
        self._buffer = bytearray()

    def header(self, data: bytes | bytearray | memoryview) -> int:
        """Length of the payload that follows: at most FRAME_BYTES_MAX."""
        magic, version, kind, length, sequence, check = HEADER.unpack(data)
        if magic != MAGIC or version != VERSION:
            raise ProtocolError("the peer does not speak this protocol, or another version of it")
        if kind not in (FrameType.MESSAGE, FrameType.PAGES):
            raise ProtocolError("a frame of an unknown type")
        if length > limits.FRAME_BYTES_MAX:
            raise ProtocolError("a frame that is too long")
        if sequence != self._sequence:
            raise ProtocolError("a frame out of sequence")
        self._sequence += 1
        self._pending = (FrameType(kind), length, sequence, check)
        return int(length)

    def payload(self, data: bytes | bytearray | memoryview) -> Frame:
        """The frame whose header came last."""
        assert self._pending is not None
        kind, length, sequence, check = self._pending
        self._pending = None
        assert len(data) == length
        if xxhash.xxh3_64_intdigest(data, seed=sequence) != check:
            raise ProtocolError("a frame that is not what its checksum says")
        if kind is FrameType.PAGES:
            return _unpack_pages(memoryview(data))
        try:
            message: AnyMessage = self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError("a message that is none") from error
        return message

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Frame]:
        """Every frame that is complete with `data`. Holds back at most one frame."""
        self._buffer += data
        at = 0
        try:
            while True:
                need = HEADER.size if self._pending is None else self._pending[1]
                if len(self._buffer) - at < need:
                    return
                part = bytes(self._buffer[at : at + need])
                at += need
                if self._pending is None:
                    self.header(part)
                else:
                    yield self.payload(part)
        finally:
            del self._buffer[:at]


def _pack_pages(frame: PagesFrame) -> bytes:
    assert len(frame.blocks) <= BLOCKS_MAX
    parts: list[bytes | memoryview] = [
        _PAGES.pack(
            frame.session, frame.migration, frame.segment, frame.request, int(frame.last), len(frame.blocks)
        )
    ]
    for block in frame.blocks:
        parts.append(_BLOCK.pack(block.number, block.mask, block.codec, len(block.data)))
        parts.append(struct.pack(f">{len(block.sums)}Q", *block.sums))
        parts.append(block.data)
    return b"".join(parts)


def _unpack_pages(data: memoryview) -> PagesFrame:
    """Views into `data`, nothing is copied. What the blocks contain is checked by `codec`."""
    try:
        session, migration, segment, request, last, count = _PAGES.unpack_from(data)
        at = _PAGES.size
        if last > 1 or count > BLOCKS_MAX or not (count or last):
            raise ProtocolError("a pages frame that is malformed")
        blocks: list[Block] = []
        for _ in range(count):
            number, mask, codec, stored = _BLOCK.unpack_from(data, at)
            at += _BLOCK.size
            sums = struct.unpack_from(f">{mask.bit_count()}Q", data, at)
            at += 8 * len(sums)
            if not mask or number > _BLOCK_NUMBER_MAX or (blocks and number <= blocks[-1].number):
                raise ProtocolError("blocks that are empty, impossible or out of order")
            if stored > len(data) - at:
                raise ProtocolError("a block that is cut short")
            blocks.append(Block(number, mask, sums, codec, data[at : at + stored]))
            at += stored
    except struct.error as error:
        raise ProtocolError("a pages frame that is cut short") from error
    if at != len(data):
        raise ProtocolError("a pages frame with something after its end")
    return PagesFrame(session, migration, segment, request, bool(last), tuple(blocks))
