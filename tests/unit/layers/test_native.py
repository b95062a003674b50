"""Objects put together in C: the same bytes as in Python, and nothing outside of what was passed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silofs.blocks import PAGE
from silofs.layers import native, schema
from silofs.layers.native import Source, build_objects
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
    monkeypatch.setattr(native, "_objects", None)


def test_it_is_built_here() -> None:
    assert native.available


@given(st.lists(st.integers(0, len(BASE) - PAGE), min_size=1, max_size=70), st.integers(1, schema.OBJECT_ID_MAX - 3))
def test_both_make_the_same(places: list[int], first: int) -> None:
    source = Source(BASE, np.array(places, np.int64))
    with pytest.MonkeyPatch.context() as patch:
        ours = built(first, source)
        patch.setattr(native, "_objects", None)
        assert built(first, source) == ours


@pytest.mark.parametrize("place", [-1, len(BASE) - PAGE + 1, len(BASE), 1 << 62, -(1 << 62)])
@pytest.mark.parametrize("available", [True, False])
def test_a_page_outside_of_its_buffer_is_an_error(place: int, available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not available:
        monkeypatch.setattr(native, "_objects", None)
    with pytest.raises(ValueError, match="outside"):
        built(1, Source(BASE, np.array([0, place], np.int64)))


@pytest.mark.usefixtures("in_python")
def test_a_store_without_it_is_the_same_store(rig: Rig) -> None:
    vm1 = rig.store.write(lambda txn: txn.create_volume("vm1", 4 << 20)).uuid
    rig.put(vm1, range(100), seed=1)
    assert rig.read("vm1")[: 100 * PAGE] == b"".join(page_bytes(page, 1) for page in range(100))


def test_a_source_of_pages_that_lie_apart() -> None:
    pages = [os.urandom(PAGE) for _ in range(3)]
    source = Source.of([pages[0], memoryview(pages[1]), bytearray(pages[2])])
    assert [bytes(source.page(index)) for index in range(3)] == pages


@pytest.mark.parametrize("optimised", ["-O0", "-O2"])
def test_it_compiles_without_a_warning(tmp_path: Path, optimised: str) -> None:
    subprocess.run(["gcc", *STRICT, optimised, "-shared", "-fPIC", "-o", tmp_path / "objects.so", SOURCE], check=True)
