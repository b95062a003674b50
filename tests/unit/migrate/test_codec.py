"""Blocks: what goes in comes out, and what a hostile peer sends is refused before it costs memory."""

from __future__ import annotations

import random
import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from silofs.errors import ProtocolError
from silofs.migrate.codec import RAW, ZSTD, Block, Codec, page_sum

SEGMENT = b"segment-uuid-016"
TEXT = (b"the quick brown fox " * 300)[:4096]
NOISE = random.Random(1).randbytes(4096)


def block_of(data: bytes, pages: int, *, codec: int = ZSTD, raw: bytes | None = None) -> Block:
    raw = bytes(pages * 4096) if raw is None else raw
    sums = tuple(page_sum(SEGMENT, page, raw[page * 4096 : page * 4096 + 4096]) for page in range(pages))
    return Block(0, (1 << pages) - 1, sums, codec, data)


@given(st.dictionaries(st.integers(160, 175), st.sampled_from([TEXT, NOISE, bytes(4096)]), min_size=1))
def test_what_goes_in_comes_out(pages: dict[int, bytes]) -> None:
    block = Codec().encode(SEGMENT, 10, pages)
    assert {page: bytes(data) for page, data in Codec().decode(SEGMENT, block).items()} == pages


def test_compressed_only_where_it_pays() -> None:
    codec = Codec()
    assert codec.encode(SEGMENT, 0, {0: NOISE, 1: NOISE[::-1]}).codec == RAW
    packed = codec.encode(SEGMENT, 0, {0: TEXT, 1: TEXT})
    assert packed.codec == ZSTD and len(packed.data) < 4096


def test_a_page_in_another_place_or_segment_is_not_that_page() -> None:
    block = Codec().encode(SEGMENT, 0, {0: TEXT, 1: NOISE})
    for wrong in (replace(block, number=1), replace(block, mask=0b110), replace(block, sums=block.sums[::-1])):
        with pytest.raises(ProtocolError):
            Codec().decode(SEGMENT, wrong)
    with pytest.raises(ProtocolError):
        Codec().decode(SEGMENT[::-1], block)


def _several() -> dict[str, Block]:
    zeros, two = zstandard.compress(bytes(8192)), bytes(8192)
    stream = zstandard.ZstdCompressor(write_content_size=False).compress(two)
    wide = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=27, write_content_size=True)
    ).compressobj()
    unsized = wide.compress(two) + wide.flush()
    return {
        "bomb": block_of(zstandard.compress(bytes(1 << 30)), 2),
        "declares more": block_of(zstandard.compress(bytes(8193)), 2),
        "declares less": block_of(zstandard.compress(bytes(4096)), 2),
        "declares nothing": block_of(stream, 2),
        "window of 128 MiB": block_of(unsized, 2),
        "two frames": block_of(zeros + zeros, 2),
        "frame and rubbish": block_of(zeros + b"x", 2),
        "truncated": block_of(zeros[:-3], 2),
        "empty": block_of(b"", 2),
        "no zstd": block_of(b"rubbish" * 9, 2),
        "raw too short": block_of(bytes(8191), 2, codec=RAW),
        "raw too long": block_of(bytes(8193), 2, codec=RAW),
        "unknown codec": block_of(bytes(8192), 2, codec=2),
        "no pages": Block(0, 0, (), RAW, b""),
        "fewer sums": replace(block_of(bytes(8192), 2, codec=RAW), sums=(1,)),
        "mask too wide": Block(0, 1 << 16, (), RAW, bytes(4096)),
        "wrong sum": replace(block_of(bytes(8192), 2, codec=RAW), sums=(1, 2)),
    }


@pytest.mark.parametrize("name", _several())
def test_a_lying_block_is_refused_before_allocation(name: str) -> None:
    block, codec = _several()[name], Codec()
    tracemalloc.start()
    with pytest.raises(ProtocolError):
        codec.decode(SEGMENT, block)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 65536 + 4096 + 65536


def test_a_frame_that_lies_about_its_size_inside_is_refused() -> None:
    """The declared size is right, the content is not: the header of one frame with the body of a longer one."""
    honest = zstandard.compress(bytes(8192))
    longer = zstandard.compress(random.Random(2).randbytes(8192) + bytes(8192))
    at = 4 + 1 + zstandard.frame_header_size(honest) - 5
    forged = honest[: zstandard.frame_header_size(honest)] + longer[zstandard.frame_header_size(longer) :]
    assert at > 0
    with pytest.raises(ProtocolError):
        Codec().decode(SEGMENT, block_of(forged, 2))
