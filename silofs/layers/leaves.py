"""The codec of leaves: 512 page references to bytes and back. Pure.

Two encodings. RUNS is for what is uniform, sparse or written in order: (start, count, reference) for every run of
pages; references to slots of an object or a container step by one slot inside a run, all others repeat; holes are left
out. DENSE is 512 references of 7 bytes. A leaf is dense when its runs would no longer fit beside others in an LMDB
page; then it takes exactly one overflow page.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from silofs.blocks import LEAF_PAGES
from silofs.errors import Damaged
from silofs.layers.schema import HOLE, LOST, PACKED, REF_BYTES, SLOT_STEP, ZERO, Refs, kinds, stepping

RUNS: Final = 1
DENSE: Final = 2
RUNS_MAX: Final = 172  # 1903 bytes: with key and LMDB's node header still less than half a page

_RUN: Final = np.dtype([("first", "<u2"), ("pages", "<u2"), ("ref", "<u8")])  # the last byte is cut off
_RUN_BYTES: Final = 4 + REF_BYTES
_DENSE_BYTES: Final = 1 + LEAF_PAGES * REF_BYTES
_STEP: Final = np.uint64(SLOT_STEP)
_STEPS: Final[Refs] = np.arange(LEAF_PAGES).astype(np.uint64) * _STEP


def _uniform(ref: int) -> Refs:
    refs = np.full(LEAF_PAGES, ref, np.uint64)
    refs.flags.writeable = False
    return refs


HOLES: Final = _uniform(HOLE)
ZEROS: Final = _uniform(ZERO)
LOST_LEAF: Final = _uniform(LOST)
"""What stands in for a leaf that cannot be read."""


def encode(refs: Refs) -> bytes:
    """One leaf's payload."""
    return encode_many(refs.reshape(1, LEAF_PAGES))[0]


def encode_many(matrix: Refs) -> list[bytes]:
    """The payloads of the rows of an (n, 512) array: the work of finding runs is shared between them."""
    rows = len(matrix)
    first = np.empty((rows, LEAF_PAGES), bool)
    first[:, 0] = True
    expected = matrix[:, :-1] + np.where(stepping(matrix[:, :-1]), _STEP, np.uint64(0))
    np.not_equal(matrix[:, 1:], expected, out=first[:, 1:])
    runs = np.count_nonzero(first & (matrix != 0), axis=1)
    dense = runs > RUNS_MAX
    payloads: list[bytes] = []
    packed = b""
    if dense.any():
        as_bytes = np.ascontiguousarray(matrix[dense]).view(np.uint8).reshape(-1, LEAF_PAGES, 8)
        packed = as_bytes[:, :, :REF_BYTES].tobytes()
    at = 0
    for row, is_dense in enumerate(dense.tolist()):
        if is_dense:
            payloads.append(b"\x02" + packed[at : at + _DENSE_BYTES - 1])
            at += _DENSE_BYTES - 1
        else:
            payloads.append(_encode_runs(matrix[row], np.flatnonzero(first[row])))
    return payloads


def _encode_runs(refs: Refs, starts: npt.NDArray[np.intp]) -> bytes:
    runs = np.empty(len(starts), _RUN)
    runs["first"] = starts
    runs["pages"] = np.diff(starts, append=LEAF_PAGES)
    runs["ref"] = refs[starts]
    runs = runs[runs["ref"] != HOLE]
    packed: bytes = runs.view(np.uint8).reshape(-1, _RUN.itemsize)[:, :_RUN_BYTES].tobytes()
    return b"\x01" + packed


def decode(payload: memoryview) -> Refs:
    """The references of a payload; Damaged when it is of no known form."""
    encoding = payload[0] if len(payload) else 0
    if encoding == DENSE and len(payload) == _DENSE_BYTES:
        wide = np.zeros((LEAF_PAGES, 8), np.uint8)
        wide[:, :REF_BYTES] = np.frombuffer(payload, np.uint8, offset=1).reshape(LEAF_PAGES, REF_BYTES)
        dense: Refs = wide.view(np.uint64).reshape(LEAF_PAGES)
        return dense
    if encoding != RUNS or (len(payload) - 1) % _RUN_BYTES:
        raise Damaged("a leaf is of no known encoding")
    packed = np.frombuffer(payload, np.uint8, offset=1).reshape(-1, _RUN_BYTES)
    wide = np.zeros((len(packed), _RUN.itemsize), np.uint8)
    wide[:, :_RUN_BYTES] = packed
    runs = wide.view(_RUN).reshape(-1)
    first, values = runs["first"].astype(np.intp), runs["ref"]
    end = first + runs["pages"]
    if (
        (end <= first).any()
        or (first[1:] < end[:-1]).any()
        or (end > LEAF_PAGES).any()
        or (values == HOLE).any()
        or (kinds(values) > PACKED).any()
    ):
        raise Damaged("a leaf has runs that are no runs")
    refs = HOLES.copy()
    refs[first] = values
    steps = stepping(values)
    for index in np.flatnonzero(runs["pages"] > 1).tolist():
        start, stop, value = first[index], end[index], values[index]
        refs[start:stop] = value + _STEPS[: stop - start] if steps[index] else value
    return refs
