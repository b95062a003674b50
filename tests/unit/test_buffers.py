"""Memory that a burst of large requests has left behind goes back, and no sooner than there is much of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
from silofs import buffers, limits
buffers.keep()
before = buffers.own_bytes()
assert not buffers.give_back()
parked = [bytes([at & 255]) * limits.MIB for at in range(600)]
pins = parked[::50]  # what lives on keeps the heap from shrinking by itself
del parked
left = buffers.own_bytes() - before
assert buffers.give_back()
print(left >> 20, (buffers.own_bytes() - before) >> 20)
"""


def test_what_a_burst_left_is_given_back() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", CODE], cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    left, kept = map(int, done.stdout.split())
    assert left > 500  # else this shows nothing
    assert kept < 100  # what lives on is 12
