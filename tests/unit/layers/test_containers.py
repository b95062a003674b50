"""The codec of containers: blocks come back page by page, and nothing that is not theirs does."""

from __future__ import annotations

import random

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from silofs.blocks import PAGE
from silofs.errors import Damaged
from silofs.layers import containers
from silofs.layers.containers import FULL, Block, Piece
from silofs.layers.schema import HEADER_BYTES, OBJECT_BYTES


def noise(seed: int, pages: int) -> bytes:
    return random.Random(seed).randbytes(pages * PAGE)


def text(seed: int, pages: int) -> bytes:
    return (f"{seed} is what this block says, and again: ".encode() * (PAGE * pages))[: PAGE * pages]


def filled(blocks: list[Block], first_id: int = 7) -> dict[int, bytes]:
    """Values of containers by id, each checked for its size."""
    placed = enumerate(containers.place(blocks), first_id)
    values = {container_id: containers.container(container_id, pieces) for container_id, pieces in placed}
    assert all(len(value) == OBJECT_BYTES for value in values.values())
    return values


def read_back(blocks: list[Block], first_id: int = 7) -> dict[int, dict[int, bytes]]:
    """By block: its pages, as found in the containers."""
    found: dict[int, dict[int, bytes]] = {number: {} for number in range(len(blocks))}
    values = filled(blocks, first_id)
    for at, pieces in enumerate(containers.place(blocks)):
        value = memoryview(values[first_id + at])
        for number, (piece, entry) in enumerate(zip(pieces, containers.entries(first_id + at, value), strict=True)):
            plain = containers.plain_pages(first_id + at, number, entry, value)
            for index, slot in enumerate(containers.slots_of(0, entry.pages)):
                assert slot not in found[piece.block]
                found[piece.block][slot] = bytes(plain[index * PAGE : (index + 1) * PAGE])
                if entry.codec == containers.RAW:
                    one = containers.raw_pages(first_id + at, number << 4 | slot, 1, entry, value)
                    assert one == found[piece.block][slot]
    return found


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, FULL), st.booleans(), st.integers(0, 3)), max_size=40))
def test_every_page_comes_back(given_blocks: list[tuple[int, bool, int]]) -> None:
    blocks = []
    for pages, packs, seed in given_blocks:
        plain = (text if packs else noise)(seed, pages.bit_count())
        blocks.append(containers.prepare(pages, plain))
        assert (blocks[-1].packed is not None) == packs
    for number, pages in read_back(blocks).items():
        plain = memoryview(blocks[number].plain)
        expected = containers.slots_of(0, blocks[number].pages)
        assert sorted(pages) == expected
        for index, slot in enumerate(expected):
            assert pages[slot] == plain[index * PAGE : (index + 1) * PAGE]


def test_blocks_that_do_not_pack_fill_containers() -> None:
    blocks = [containers.prepare(FULL, noise(seed, 16)) for seed in range(31)]
    assert len(containers.place(blocks)) == 16  # 31 pages each, as objects have


def test_a_container_takes_16_blocks() -> None:
    blocks = [containers.prepare(FULL, text(seed, 16)) for seed in range(40)]
    assert [len(pieces) for pieces in containers.place(blocks)] == [16, 16, 8]


def test_every_flipped_bit_is_seen_or_does_not_matter() -> None:
    blocks = [containers.prepare(FULL, text(1, 16)), containers.prepare(0b101, noise(2, 2))]
    value = bytearray(filled(blocks)[7])
    sound = memoryview(bytes(value))
    used = HEADER_BYTES + sum(entry.length for entry in containers.entries(7, sound))
    expected = [bytes(containers.plain_pages(7, at, containers.entry(7, at, sound), sound)) for at in (0, 1)]
    for at in [*range(0, HEADER_BYTES, 5), *range(HEADER_BYTES, used, 3)]:
        value[at] ^= 1 << at % 8
        damaged = memoryview(bytes(value))
        seen = 0
        for number in (0, 1):
            try:
                plain = containers.plain_pages(7, number, containers.entry(7, number, damaged), damaged)
                assert plain == expected[number]
            except Damaged:
                seen += 1
        # zstd's frame has bits that mean nothing; everything else is covered by a checksum.
        assert seen or at >= HEADER_BYTES + 2 * PAGE, at
        value[at] ^= 1 << at % 8


def test_a_container_in_the_place_of_another_is_damage() -> None:
    value = memoryview(filled([containers.prepare(FULL, noise(1, 16))])[7])
    with pytest.raises(Damaged, match="container 8"):
        containers.entry(8, 0, value)
    with pytest.raises(Damaged, match="no block 1"):
        containers.entry(7, 1, value)
    entry = containers.entry(7, 0, value)
    with pytest.raises(Damaged):
        containers.raw_pages(7, 10, 7, entry, value)
    with pytest.raises(Damaged):
        containers.cut(7, 3, 1, (0b10111, memoryview(noise(1, 4))))


@pytest.mark.parametrize("said", [True, False])
def test_a_block_that_unpacks_to_more_than_it_should_is_refused_at_once(said: bool) -> None:
    """Memory stays bounded by the mask, whatever the frame says of itself."""
    bomb = zstandard.ZstdCompressor(write_content_size=said).compress(bytes(1 << 30))
    piece = Piece(0, containers.NO_HASH, FULL, containers.ZSTD, bomb[:60000], bytes(16 * PAGE))
    value = memoryview(containers.container(7, [piece]))
    with pytest.raises(Damaged):
        containers.plain_pages(7, 0, containers.entry(7, 0, value), value)


@pytest.mark.parametrize(
    "piece",
    [
        Piece(0, containers.NO_HASH, FULL, containers.RAW, noise(1, 15), noise(1, 16)),
        Piece(0, containers.NO_HASH, 1, containers.ZSTD, noise(1, 1), noise(1, 1)),
        Piece(0, containers.NO_HASH, 1, 2, b"x", noise(1, 1)),
        Piece(0, containers.NO_HASH, 0, containers.RAW, b"", b""),
    ],
)
def test_headers_that_cannot_be(piece: Piece) -> None:
    value = memoryview(containers.container(7, [piece]))
    with pytest.raises(Damaged, match="cannot be"):
        containers.entry(7, 0, value)


def test_the_hash_covers_which_pages_there_are() -> None:
    assert containers.hash_block(0b01, noise(1, 1)) != containers.hash_block(0b10, noise(1, 1))
