"""Objects put together and written in C: the same bytes as in Python, and nothing outside of what was passed."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silofs.blocks import PAGE
from silofs.layers import native, schema
from silofs.layers.native import Source, build_objects, write_cells, zero_pages
from tests.storerig import Rig, page_bytes

SOURCE = native.LIBRARY.with_suffix(".c")
STRICT = ["-std=c11", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wstrict-prototypes", "-Werror"]
BASE = os.urandom(80 * PAGE)


def built(first: int, source: Source) -> bytes:
    values = bytearray(-(-len(source.at) // schema.OBJECT_PAGES) * schema.OBJECT_BYTES)
    values[:] = b"\xff" * len(values)  # what was there before must not show
    build_objects(values, first, source)
    return bytes(values)


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", None)


def test_it_is_built_here() -> None:
    assert native.available


@given(st.lists(st.integers(0, len(BASE) - PAGE), min_size=1, max_size=70), st.integers(1, schema.OBJECT_ID_MAX - 3))
def test_both_make_the_same(places: list[int], first: int) -> None:
    source = Source(BASE, np.array(places, np.int64))
    with pytest.MonkeyPatch.context() as patch:
        ours = built(first, source)
        patch.setattr(native, "_library", None)
        assert built(first, source) == ours


@pytest.mark.parametrize("place", [-1, len(BASE) - PAGE + 1, len(BASE), 1 << 62, -(1 << 62)])
@pytest.mark.parametrize("available", [True, False])
def test_a_page_outside_of_its_buffer_is_an_error(place: int, available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not available:
        monkeypatch.setattr(native, "_library", None)
    with pytest.raises(ValueError, match="outside"):
        built(1, Source(BASE, np.array([0, place], np.int64)))


@pytest.mark.usefixtures("in_python")
def test_a_store_without_it_is_the_same_store(rig: Rig) -> None:
    vm1 = rig.store.write(lambda txn: txn.create_volume("vm1", 4 << 20)).uuid
    rig.put(vm1, range(100), seed=1)
    assert rig.read("vm1")[: 100 * PAGE] == b"".join(page_bytes(page, 1) for page in range(100))


# Cells


def cells_for(pages: int) -> int:
    return -(-pages // schema.OBJECT_PAGES)


def written(first: int, source: Source, cells: list[int], *, before: bytes = b"") -> bytes:
    """A file of nine cells of `before`, or holes, after those were written."""
    fd = os.memfd_create("cells")
    try:
        os.ftruncate(fd, 9 * schema.CELL_BYTES)
        if before:
            os.pwrite(fd, before * (9 * schema.CELL_BYTES), 0)
        write_cells(fd, first, source, cells)
        return os.pread(fd, 9 * schema.CELL_BYTES, 0)
    finally:
        os.close(fd)


@st.composite
def sources(draw: st.DrawFn) -> list[int]:
    """Where pages lie: runs of pages that follow each other, as a guest writes them, anywhere in the buffer."""
    places: list[int] = []
    for _ in range(draw(st.integers(1, 6))):
        first = draw(st.integers(0, len(BASE) - PAGE))
        places += range(first, min(len(BASE) - PAGE + 1, first + draw(st.integers(1, 40)) * PAGE), PAGE)
    return places[: 9 * schema.OBJECT_PAGES]


@given(
    sources() | st.lists(st.integers(0, len(BASE) - PAGE), min_size=1, max_size=70),
    st.integers(1, schema.OBJECT_ID_MAX - 9),
    st.permutations(range(9)),
)
def test_both_write_the_same_cells(places: list[int], first: int, order: list[int]) -> None:
    source, cells = Source(BASE, np.array(places, np.int64)), order[: cells_for(len(places))]
    ours = written(first, source, cells)
    values = built(first, source)
    for number, cell in enumerate(cells):
        value = values[number * schema.OBJECT_BYTES : (number + 1) * schema.OBJECT_BYTES]
        assert ours[cell * schema.CELL_BYTES : (cell + 1) * schema.CELL_BYTES] == bytes(schema.CELL_PAD) + value
    for cell in order[len(cells) :]:
        assert not any(ours[cell * schema.CELL_BYTES : (cell + 1) * schema.CELL_BYTES]), "nobody asked for that"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_library", None)
        assert written(first, source, cells) == ours


@pytest.mark.parametrize("available", [True, False])
def test_a_partial_object_over_a_whole_one(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies behind its last page belongs to nobody, and the header says so."""
    if not available:
        monkeypatch.setattr(native, "_library", None)
    found = written(7, Source(BASE, np.arange(0, 20 * PAGE, PAGE, dtype=np.int64)), [3], before=b"\xff")
    cell = memoryview(found)[3 * schema.CELL_BYTES : 4 * schema.CELL_BYTES]
    value = cell[schema.CELL_PAD :]
    assert not any(cell[: schema.CELL_PAD])
    assert schema.check_header(7, value) == 20
    assert b"".join(schema.object_page(7, slot, value) for slot in range(20)) == BASE[: 20 * PAGE]
    others = found[: 3 * schema.CELL_BYTES] + found[4 * schema.CELL_BYTES :]
    assert others == b"\xff" * (8 * schema.CELL_BYTES)


@pytest.mark.parametrize("place", [-1, len(BASE) - PAGE + 1, len(BASE), 1 << 62, -(1 << 62)])
@pytest.mark.parametrize("at", [0, 5, 31, 40])
@pytest.mark.parametrize("available", [True, False])
def test_a_page_outside_is_not_written_to_a_cell(
    place: int, at: int, available: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not available:
        monkeypatch.setattr(native, "_library", None)
    places = np.zeros(41, np.int64)
    places[at] = place
    with pytest.raises(ValueError, match="outside"):
        written(1, Source(BASE, places), [0, 1])


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file of this process gets longer: a write across that end is short, one behind it fails (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("available", [True, False])
@pytest.mark.parametrize("size", [1, 15, PAGE, PAGE + 1, 3 * PAGE - 7, 20 * PAGE, schema.CELL_BYTES + 5])
def test_a_short_write_goes_on_where_it_ended(
    tmp_path: Path, size: int, available: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that lie apart are written with one call, which may end in the middle of any of them."""
    if not available:
        monkeypatch.setattr(native, "_library", None)
    places = np.array([(number * 37 % 60) * PAGE + number for number in range(62)], np.int64)
    whole = written(5, Source(BASE, places), [0, 1])
    path = tmp_path / "cells"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        with files_end_at(size), pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as raised:
            write_cells(fd, 5, Source(BASE, places), [0, 1])
        assert raised.value.errno == errno.EFBIG
        assert path.read_bytes() == whole[:size]
    finally:
        os.close(fd)


@pytest.mark.parametrize("available", [True, False])
def test_an_error_of_the_file_says_which(tmp_path: Path, available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not available:
        monkeypatch.setattr(native, "_library", None)
    source = Source(BASE, np.zeros(3, np.int64))
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        write_cells(-1, 1, source, [0])
    with Path("/dev/full").open("r+b", buffering=0) as full, pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write_cells(full.fileno(), 1, source, [0])


@pytest.mark.parametrize("available", [True, False])
def test_every_page_is_touched_and_none_beyond(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not available:
        monkeypatch.setattr(native, "_library", None)
    area = np.zeros(3 * PAGE, np.uint8)
    for length in (0, 1, PAGE, PAGE + 1, 3 * PAGE):
        native.touch(area.ctypes.data, length)


def test_a_source_of_pages_that_lie_apart() -> None:
    pages = [os.urandom(PAGE) for _ in range(3)]
    source = Source.of([pages[0], memoryview(pages[1]), bytearray(pages[2])])
    assert [bytes(source.page(index)) for index in range(3)] == pages


@pytest.mark.parametrize("optimised", ["-O0", "-O2"])
def test_it_compiles_without_a_warning(tmp_path: Path, optimised: str) -> None:
    subprocess.run(["gcc", *STRICT, optimised, "-shared", "-fPIC", "-o", tmp_path / "objects.so", SOURCE], check=True)


@pytest.mark.parametrize("available", [True, False])
def test_pages_of_zeros(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not available:
        monkeypatch.setattr(native, "_library", None)
    lone = bytearray(PAGE)
    pages = [bytes(PAGE)]
    for at in (0, 1, 7, 8, 2048, PAGE - 1):
        lone[at] = 1
        pages.append(bytes(lone))
        lone[at] = 0
    base = b"x" + b"".join(pages)
    places = np.arange(1, len(base), PAGE, dtype=np.int64)
    assert zero_pages(Source(base, places)).tolist() == [True] + [False] * 6
    assert zero_pages(Source(base, places[::-1])).tolist() == [False] * 6 + [True]
    assert not len(zero_pages(Source(base, places[:0])))
    with pytest.raises(ValueError, match="outside"):
        zero_pages(Source(base, np.array([len(base) - PAGE + 1], np.int64)))
