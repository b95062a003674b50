"""Leaves, records and objects: what is encoded is decoded, and nothing else is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silofs.blocks import LEAF_PAGES, PAGE
from silofs.errors import Damaged
from silofs.layers import leaves, presence, schema
from silofs.layers.schema import Refs

KINDS = st.sampled_from([schema.ZERO, schema.DATA, schema.LONE, schema.REMOTE, schema.LOST])
RUN = st.tuples(st.integers(0, LEAF_PAGES - 1), st.integers(1, 600), KINDS, st.integers(1, 1 << 43), st.integers(0, 30))


def leaf_of(runs: list[tuple[int, int, int, int, int]]) -> Refs:
    refs = leaves.HOLES.copy()
    for start, count, kind, object_id, slot in runs:
        count = min(count, LEAF_PAGES - start)
        first = schema.ref(kind, object_id if kind in (schema.DATA, schema.LONE, schema.REMOTE) else 0, 0)
        if kind == schema.DATA:
            first = schema.ref(kind, object_id, slot)
            count = min(count, schema.OBJECT_PAGES - slot)
        for index in range(count):
            step = schema.SLOT_STEP * index if kind == schema.DATA else 0
            refs[start + index] = first + step + ((index << schema.OBJECT_SHIFT) if kind == schema.LONE else 0)
    return refs


@settings(max_examples=200)
@given(st.lists(RUN, max_size=40))
def test_leaf_round_trip(runs: list[tuple[int, int, int, int, int]]) -> None:
    refs = leaf_of(runs)
    payload = leaves.encode(refs)
    assert np.array_equal(leaves.decode(memoryview(payload)), refs)
    assert leaves.encode(leaves.decode(memoryview(payload))) == payload


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(0, LEAF_PAGES))
def test_random_leaf_round_trip(seed: int, filled: int) -> None:
    chance = np.random.default_rng(seed)
    refs = leaves.HOLES.copy()
    at = chance.choice(LEAF_PAGES, filled, replace=False)
    refs[at] = (chance.integers(1, 1 << 40, filled).astype(np.uint64) << np.uint64(12)) | np.uint64(schema.LONE)
    payload = leaves.encode(refs)
    assert np.array_equal(leaves.decode(memoryview(payload)), refs)
    assert payload[0] == (leaves.DENSE if filled > leaves.RUNS_MAX else leaves.RUNS)


def test_sizes_of_leaves() -> None:
    uniform = np.full(LEAF_PAGES, schema.ref(schema.REMOTE, 7), np.uint64)
    assert len(leaves.encode(uniform)) == 12
    dense = np.arange(1, LEAF_PAGES + 1, dtype=np.uint64) << np.uint64(13) | np.uint64(schema.DATA)
    assert len(schema.seal_record(schema.LEAF, bytes(16), leaves.encode(dense))) + 16 <= PAGE, "one overflow page"
    most = leaves.HOLES.copy()
    most[: leaves.RUNS_MAX] = dense[: leaves.RUNS_MAX]
    assert len(schema.seal_record(schema.LEAF, bytes(16), leaves.encode(most))) + 16 + 8 <= 2038, "half a page"


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_decoding_anything_is_damage_or_a_leaf(payload: bytes) -> None:
    try:
        refs = leaves.decode(memoryview(payload))
    except Damaged:
        return
    assert refs.shape == (LEAF_PAGES,)


def test_record_is_bound_to_its_place() -> None:
    value = schema.seal_record(schema.LEAF, b"k" * 16, b"payload")
    assert bytes(schema.open_record(schema.LEAF, b"k" * 16, value)) == b"payload"
    for table, key, stored in (
        (schema.LEAF, b"l" * 16, value),
        (schema.PRESENCE, b"k" * 16, value),
        (schema.LEAF, b"k" * 16, value[:-1]),
        (schema.LEAF, b"k" * 16, value[:3]),
        (schema.LEAF, b"k" * 16, bytes([value[0] ^ 1]) + value[1:]),
    ):
        with pytest.raises(Damaged):
            schema.open_record(table, key, stored)


def test_object_fills_whole_pages_of_lmdb() -> None:
    assert schema.OBJECT_BYTES == 131056
    assert (schema.OBJECT_BYTES + 16) % PAGE == 0
    assert (schema.HEADER_BYTES + 16) % PAGE == 0, "pages are aligned in the file"
    assert schema.LONE_BYTES + 16 == PAGE


def test_page_is_bound_to_object_and_slot() -> None:
    pages = [bytes([number]) * PAGE for number in range(3)]
    header = schema.object_header(9, [schema.page_sum(page, 9, slot) for slot, page in enumerate(pages)])
    value = memoryview(header + b"".join(pages) + bytes(28 * PAGE))
    assert schema.check_header(9, value) == 3
    assert schema.object_page(9, 1, value) == pages[1]
    for object_id, slot in ((8, 1), (9, 3), (9, 31)):
        with pytest.raises(Damaged):
            schema.object_page(object_id, slot, value)
    with pytest.raises(Damaged):
        schema.check_header(8, value)
    swapped = memoryview(header + pages[1] + pages[0] + bytes(29 * PAGE))
    with pytest.raises(Damaged):
        schema.object_page(9, 0, swapped)


def test_names_and_references_of_objects_fill_their_slots() -> None:
    pages, layers = list(range(100, 170)), [page % 3 + 1 for page in range(100, 170)]
    refs = schema.object_refs(7, len(pages)).tolist()
    found = []
    for key, value in schema.object_names(7, layers, pages):
        (object_id,) = schema.KEY.unpack(key)
        entries = schema.open_name(key, value)
        found += [(schema.ref(schema.DATA, object_id, slot), entry) for slot, entry in enumerate(entries)]
    assert found == list(zip(refs, zip(layers, pages, strict=True), strict=True))
    assert [schema.object_of(refs[index]) for index in (0, 30, 31, 61, 62, 69)] == [7, 7, 8, 8, 9, 9]
    assert schema.object_names(7, 1, []) == [] and not len(schema.object_refs(7, 0))
    last = schema.OBJECT_ID_MAX
    assert schema.object_refs(last, 31).tolist()[-1] == schema.ref(schema.DATA, last, 30)


def test_lone_page_needs_both_of_its_records() -> None:
    page = bytes(range(256)) * 16
    key = schema.KEY.pack(5)
    name = schema.lone_name(key, 5, 2, 77, page)
    assert schema.lone_page(key, 5, page[:4080], name) == page
    assert schema.open_name(key, name) == [(2, 77)]
    [(_, other)] = schema.object_names(5, 2, [77])
    for value, record in ((page[1:4081], name), (page[:4000], name), (page[:4080], other)):
        with pytest.raises(Damaged):
            schema.lone_page(key, 5, value, record)


def test_chunk_lists() -> None:
    chunks = presence.with_chunk(presence.with_chunk(b"", 3, 9), 0, 7)
    assert presence.chunk_numbers(chunks) == [0, 3]
    assert (presence.chunk_sum(chunks, 0), presence.chunk_sum(chunks, 1), presence.chunk_sum(chunks, 99)) == (7, 0, 0)
    assert presence.with_chunk(presence.with_chunk(chunks, 3, 0), 0, 0) == b""
