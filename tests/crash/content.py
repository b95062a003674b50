"""What a volume of a story holds: 512-byte units that each carry the number of the write that they are from.

A unit is 64 words: the write's number, then words that follow from number and unit, so that a torn, stale or misplaced
unit is seen. A picture is the numbers of all units of a volume (0: zeros), and its print says in a few bytes whether
two pictures are the same.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

UNIT: Final = 512
WORDS: Final = UNIT // 8

Numbers = np.ndarray[Any, np.dtype[np.uint64]]


class Torn(AssertionError):
    """A unit holds what no write wrote there."""


def fill(first: int, count: int, number: int) -> bytes:
    """The bytes of write `number` at units [first, first + count)."""
    units = np.arange(first, first + count, dtype=np.uint64)
    return _pattern(units, np.full(count, number, np.uint64)).tobytes()


def numbers(data: bytes) -> Numbers:
    """The picture that `data`, a volume from its start on, shows. Raises Torn."""
    words = np.frombuffer(data, np.uint64).reshape(-1, WORDS)
    found = words[:, 0].copy()
    expected = _pattern(np.arange(len(words), dtype=np.uint64), found)
    expected[found == 0] = 0
    wrong = np.flatnonzero((words != expected).any(axis=1))
    if len(wrong):
        raise Torn(f"{len(wrong)} units are torn or foreign; the first is {wrong[0]}, of write {found[wrong[0]]}")
    return found


def hashes(first: int, picture: Numbers) -> int:
    """What the units from `first` on add to a print: XOR, so that a write changes it by what it replaces and adds."""
    units = np.arange(first, first + len(picture), dtype=np.uint64)
    each = _mix(_mix(units) ^ picture)
    return int(np.bitwise_xor.reduce(each[picture != 0], initial=np.uint64(0)))


def print_of(picture: Numbers) -> str:
    return f"{len(picture)}:{hashes(0, picture):016x}"


def _pattern(units: Numbers, written: Numbers) -> Numbers:
    words = _mix(_mix(units) ^ written)[:, None] + np.arange(WORDS, dtype=np.uint64)[None, :]
    words[:, 0] = written
    return words


def _mix(values: Numbers) -> Numbers:
    """splitmix64's finaliser."""
    with np.errstate(over="ignore"):
        mixed = values + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
