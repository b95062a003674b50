"""The format of a stream: one snapshot, whole or as what changed since another one. docs/stream.md is this in prose.

Pure: bytes in, bytes out. A stream is a header and frames. Each frame's checksum covers the one before it, so frames
that are flipped, swapped, left out or taken from another stream are found at the first one that is wrong; the last
frame has a digest of everything before it. What a reader allocates is bounded before it is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from struct import Struct
from typing import Final

import msgspec
import zstandard
from blake3 import blake3

from silofs.blocks import PAGE, pages_for
from silofs.errors import BadFormat, BadStream, UserError
from silofs.limits import SIZE_MAX, STREAM_HEAD_BYTES_MAX, STREAM_PAGES, STREAM_RUNS
from silofs.names import check_name

MAGIC: Final = b"SILOSTRM"
VERSION: Final = 1
PREFIX: Final = Struct("<8sHHI")  # magic, version, 0, bytes of the body
FRAME: Final = Struct("<BBHIIIQQ")  # kind, codec, 0, bytes, bytes when decompressed, number, first page, end page
COUNT: Final = Struct("<I")
RUN: Final = Struct("<QII")  # first page, pages, kind
LAST: Final = Struct("<32sQQ")  # digest, pages of data, pages of zeros
SUM_BYTES: Final = 16

PAGES: Final = 1  # kinds of frames
END: Final = 2
RAW: Final = 0  # codecs
ZSTD: Final = 1
DATA: Final = 1  # kinds of runs
ZERO: Final = 2

RAW_BYTES_MAX: Final = COUNT.size + STREAM_RUNS * RUN.size + STREAM_PAGES * PAGE
WINDOW_BYTES_MAX: Final = 4 << 20
_ZSTD_LEVEL: Final = 1
_PAYS_NUMERATOR, _PAYS_DENOMINATOR = 15, 16  # a frame that zstd leaves larger than this part of it stays raw

Run = tuple[int, int, int]


class Head(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a stream carries. Sizes are bytes."""

    volume: str
    snapshot: str
    uuid: bytes  # of the snapshot's layer: names its content wherever it is
    size: int
    created_ns: int
    base: bytes = b""  # uuid of the content that this is a change of; empty: it is whole
    base_name: str = ""
    base_size: int = 0

    @property
    def name(self) -> str:
        return f"{self.volume}@{self.snapshot}"

    @property
    def clip(self) -> int:
        """What of the base shows through, in bytes."""
        return min(self.base_size, self.size) if self.base else self.size


class Frame(msgspec.Struct, frozen=True):
    """Pages [first, end) as they are now: the runs that are given, the rest as in the base (or zero, without one)."""

    first: int
    end: int
    runs: tuple[Run, ...]
    data: memoryview  # of the runs of kind DATA, page after page


class Chain:
    """Where a stream stands: what the next frame has to follow. Both directions go through it."""

    def __init__(self, header: bytes) -> None:
        self.number = 0
        self.page = 0  # the pages below have been covered
        self.data_pages = 0
        self.zero_pages = 0
        self.bytes = len(header)
        self._link = header[-SUM_BYTES:]
        self._whole = blake3(header)

    def sum_of(self, head: bytes, payload: bytes | memoryview) -> bytes:
        """The checksum of the frame that comes next."""
        return blake3(self._link).update(head).update(payload).digest(SUM_BYTES)

    def digest(self) -> bytes:
        """Of everything so far."""
        return self._whole.digest()

    def add(self, end: int, runs: Sequence[Run], *parts: bytes | memoryview) -> None:
        """The next frame is `parts`, the last of them its checksum."""
        for part in parts:
            self._whole.update(part)
            self.bytes += len(part)
        self._link = bytes(parts[-1])
        self.number += 1
        self.page = end
        self.data_pages += sum(count for _, count, kind in runs if kind == DATA)
        self.zero_pages += sum(count for _, count, kind in runs if kind == ZERO)


class Encoder:
    """Writes a stream. Goes on after the frames that a `chain` has seen."""

    def __init__(self, head: Head, chain: Chain | None = None) -> None:
        self.head = head
        self.header = header_of(head)
        self.chain = chain or Chain(self.header)
        self._compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)

    def frame(self, end: int, runs: Sequence[Run], data: bytes) -> bytes:
        """The bytes of a frame from where the stream stands to page `end`."""
        raw = b"".join((COUNT.pack(len(runs)), *(RUN.pack(*run) for run in runs), data))
        packed = self._compressor.compress(raw)
        pays = len(packed) * _PAYS_DENOMINATOR <= len(raw) * _PAYS_NUMERATOR
        return self._seal(PAGES, ZSTD if pays else RAW, packed if pays else raw, len(raw), end, runs)

    def end(self) -> bytes:
        """The bytes of the last frame."""
        payload = LAST.pack(self.chain.digest(), self.chain.data_pages, self.chain.zero_pages)
        return self._seal(END, RAW, payload, len(payload), pages_for(self.head.size), ())

    def _seal(self, kind: int, codec: int, payload: bytes, raw: int, end: int, runs: Sequence[Run]) -> bytes:
        chain = self.chain
        head = FRAME.pack(kind, codec, 0, len(payload), raw, chain.number, chain.page, end)
        total = chain.sum_of(head, payload)
        chain.add(end, runs, head, payload, total)
        return b"".join((head, payload, total))


def header_of(head: Head) -> bytes:
    body = msgspec.msgpack.encode(head)
    assert len(body) <= STREAM_HEAD_BYTES_MAX
    front = PREFIX.pack(MAGIC, VERSION, 0, len(body)) + body
    return front + blake3(front).digest(SUM_BYTES)


class Decoder:
    """Reads a stream; believes nothing. `read(n)` gives n bytes, fewer only at the end of what there is.

    Raises BadStream for what is no stream or not the one that was written, BadFormat for another version.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._decompressor = zstandard.ZstdDecompressor()
        self.ended = False
        front = read(PREFIX.size)
        if len(front) < PREFIX.size or front[: len(MAGIC)] != MAGIC:
            raise BadStream("this is no silofs stream", hint="silofs export NAME@SNAP FILE --format stream makes one")
        _, version, _, length = PREFIX.unpack(front)
        if version != VERSION:
            known = f"this silofs knows {VERSION}"
            raise BadFormat(f"the stream is of version {version}, {known}", hint="use the silofs that wrote it")
        if length > STREAM_HEAD_BYTES_MAX:
            raise BadStream("the stream's header is longer than any")
        body = self._exactly(length)
        total = self._exactly(SUM_BYTES)
        if blake3(front + body).digest(SUM_BYTES) != total:
            raise BadStream("the stream's header does not match its checksum")
        self.head = _checked_head(body)
        self.chain = Chain(front + body + total)

    def frames(self) -> Iterator[Frame]:
        """The frames in order, each verified before it is given; returns after a sound last one."""
        while not self.ended:
            yield from self._next()

    def _next(self) -> Iterator[Frame]:
        chain = self.chain
        head = self._exactly(FRAME.size)
        kind, codec, spare, length, raw, number, first, end = FRAME.unpack(head)
        where = f"frame {chain.number} of the stream"
        if kind not in (PAGES, END) or codec not in (RAW, ZSTD) or max(length, raw) > RAW_BYTES_MAX:
            raise BadStream(f"{where} is none")
        payload = self._exactly(length)
        total = self._exactly(SUM_BYTES)
        if chain.sum_of(head, payload) != total:
            raise BadStream(f"{where} does not match its checksum, or does not belong there")
        if spare or (number, first) != (chain.number, chain.page) or not first <= end <= pages_for(self.head.size):
            raise BadStream(f"{where} does not follow the one before it")
        if kind == END:
            self._finish(payload, end)
            chain.add(end, (), head, payload, total)
            self.ended = True
            return
        content = self._inflate(payload, raw, where) if codec == ZSTD else payload
        if len(content) != raw:
            raise BadStream(f"{where} has another size than it declares")
        frame = _frame(first, end, content, where)
        chain.add(end, frame.runs, head, payload, total)
        yield frame

    def _finish(self, payload: bytes, end: int) -> None:
        chain = self.chain
        expected = LAST.pack(chain.digest(), chain.data_pages, chain.zero_pages)
        if payload != expected or end != pages_for(self.head.size):
            raise BadStream("the stream as a whole is not the one that was written")

    def _inflate(self, payload: bytes, size: int, where: str) -> bytes:
        try:
            declared = zstandard.get_frame_parameters(payload)
            if declared.content_size != size or declared.window_size > WINDOW_BYTES_MAX or declared.dict_id:
                raise BadStream(f"{where} declares another size than it has")
            return self._decompressor.decompress(payload, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise BadStream(f"{where} cannot be decompressed") from error

    def _exactly(self, length: int) -> bytes:
        data = self._read(length)
        if len(data) != length:
            at = self.chain.bytes if hasattr(self, "chain") else 0
            raise BadStream(f"the stream ends before its end, after {at} sound bytes", hint="send it again")
        return data


def _checked_head(body: bytes) -> Head:
    try:
        head = msgspec.msgpack.decode(body, type=Head)
        for name in (head.volume, head.snapshot):
            check_name(name)
        sizes = head.size, head.base_size
        if len(head.uuid) != 16 or len(head.base) not in (0, 16) or head.created_ns < 0:
            raise BadStream("the stream's header names no state")
        if not all(0 <= size <= SIZE_MAX for size in sizes) or len(head.base_name) > 300:
            raise BadStream("the stream's header has a size that no volume has")
    except (msgspec.MsgspecError, UserError) as error:
        raise error if isinstance(error, BadStream) else BadStream("the stream's header cannot be read") from error
    return head


def _frame(first: int, end: int, content: bytes, where: str) -> Frame:
    """The runs and pages of a frame's content. BadStream unless they fill it exactly, in order, without overlap."""
    count = COUNT.unpack_from(content)[0] if len(content) >= COUNT.size else STREAM_RUNS + 1
    at = COUNT.size + count * RUN.size
    if count > STREAM_RUNS or at > len(content):
        raise BadStream(f"{where} has more runs than room")
    runs = tuple(RUN.iter_unpack(content[COUNT.size : at]))
    page, pages = first, 0
    for start, length, kind in runs:
        if start < page or not length or kind not in (DATA, ZERO):
            raise BadStream(f"{where} has runs that are none")
        page = start + length
        pages += length if kind == DATA else 0
    if page > end or pages > STREAM_PAGES or len(content) - at != pages * PAGE:
        raise BadStream(f"{where} has other pages than its runs say")
    return Frame(first, end, runs, memoryview(content)[at:])
