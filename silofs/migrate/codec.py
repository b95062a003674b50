"""Blocks of pages to bytes and back: checksums, and zstd where it pays. Pure; for the bulk threads.

A block is up to 16 pages of one 64 KiB block of a segment. Its page checksums (xxh3-64, seeded with segment and page
number, so that a right page in a wrong place fails) are of the uncompressed bytes. Decoding a peer's block never
allocates more than the block has pages: the size that the zstd frame declares is checked before, and must be exact.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import xxhash
import zstandard

from silofs.blocks import BLOCK, BLOCK_PAGES, PAGE
from silofs.errors import ProtocolError

RAW = 0
ZSTD = 1
ZSTD_LEVEL = 1
_PAYS_NUMERATOR, _PAYS_DENOMINATOR = 15, 16  # a compressed block larger than this part of it travels raw


class Block(msgspec.Struct, frozen=True):
    """One block as it travels. Bit i of `mask`: page number * 16 + i is in it; `sums` one per such page, ascending."""

    number: int
    mask: int
    sums: tuple[int, ...]
    codec: int
    data: bytes | memoryview

    @property
    def pages(self) -> tuple[int, ...]:
        first = self.number * BLOCK_PAGES
        return tuple(first + bit for bit in range(BLOCK_PAGES) if self.mask >> bit & 1)


def page_sum(segment: bytes, page: int, data: bytes | memoryview) -> int:
    """Checksum of one page's 4096 bytes, bound to its segment and place."""
    return xxhash.xxh3_64_intdigest(data, seed=int.from_bytes(segment[:8], "big") ^ page)


class Codec:
    """Encodes and decodes blocks. Not thread-safe: one per thread (the zstd contexts are reused)."""

    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self, segment: bytes, number: int, pages: Mapping[int, bytes | memoryview]) -> Block:
        """A block of `pages` (page number -> 4096 bytes), all of block `number`."""
        assert pages and all(page // BLOCK_PAGES == number and len(data) == PAGE for page, data in pages.items())
        ordered = sorted(pages)
        mask = sum(1 << page % BLOCK_PAGES for page in ordered)
        sums = tuple(page_sum(segment, page, pages[page]) for page in ordered)
        raw = b"".join(pages[page] for page in ordered)
        packed = self._compressor.compress(raw)
        if len(packed) * _PAYS_DENOMINATOR > len(raw) * _PAYS_NUMERATOR:
            return Block(number, mask, sums, RAW, raw)
        return Block(number, mask, sums, ZSTD, packed)

    def decode(self, segment: bytes, block: Block) -> dict[int, memoryview]:
        """Page number -> 4096 bytes. ProtocolError if anything about the block is not exactly right."""
        pages = block.pages
        size = len(pages) * PAGE
        if not pages or block.mask >> BLOCK_PAGES or len(block.sums) != len(pages):
            raise ProtocolError("a block whose page mask and checksums disagree")
        raw: bytes | memoryview
        if block.codec == RAW:
            if len(block.data) != size:
                raise ProtocolError("a raw block of the wrong length")
            raw = block.data
        elif block.codec == ZSTD:
            raw = self._inflate(block.data, size)
        else:
            raise ProtocolError("a block in an unknown encoding")
        view = memoryview(raw)
        found: dict[int, memoryview] = {}
        for at, (page, expected) in enumerate(zip(pages, block.sums, strict=True)):
            data = view[at * PAGE : (at + 1) * PAGE]
            if page_sum(segment, page, data) != expected:
                raise ProtocolError("a page that is not what its checksum says")
            found[page] = data
        return found

    def _inflate(self, data: bytes | memoryview, size: int) -> bytes:
        try:
            frame = zstandard.get_frame_parameters(data)
            if frame.content_size != size or frame.window_size > 2 * BLOCK or frame.dict_id:
                raise ProtocolError("a compressed block that declares another size than its pages have")
            raw = self._decompressor.decompress(data, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ProtocolError("a compressed block that does not decompress") from error
        if len(raw) != size:
            raise ProtocolError("a compressed block of another size than it declared")
        return raw
