"""Negative controls: with a rule of merging or of exchanging entries left out, the store or `check` must show it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silofs.blocks import LEAF_BYTES, PAGE
from silofs.errors import SiloError
from silofs.layers import join, rewrite
from silofs.layers.changes import Changes
from silofs.layers.clean import Clean
from silofs.layers.merge import MergeLayers
from silofs.layers.native import Source
from silofs.layers.policies import drain
from silofs.layers.rewrite import Reap
from silofs.layers.transaction import WriteTxn
from tests.storerig import Rig

SIZE = 3 * LEAF_BYTES
PAGES = SIZE // PAGE


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """Not checked at the end: what the mutants leave is broken."""
    rig = Rig(tmp_path / "store")
    yield rig
    rig.close()


def no_clip(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(join, "pages_for", lambda size: 1 << 40)


def no_names(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WriteTxn, "rehome", lambda *_: None)


def released(patch: pytest.MonkeyPatch) -> None:
    sound = Changes.account
    patch.setattr(Changes, "account", lambda self, *arguments, handed_over=False: sound(self, *arguments))


def nothing_released(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(join, "_release", lambda *_: None)


def lower_wins(patch: pytest.MonkeyPatch) -> None:
    sound = join._rows

    def rows(txn: Any, layer: int, numbers: Any) -> Any:
        found = sound(txn, layer, numbers)
        return found if txn.layer(layer).merging else np.zeros_like(found)

    patch.setattr(join, "_rows", rows)


def no_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(join, "_end_up", lambda txn, lower, upper: txn.drop_layer(lower.id))


def no_compare(patch: pytest.MonkeyPatch) -> None:
    sound = rewrite._exchange

    def blind(txn: Any, layer: int, numbers: Any, flat: Any, pages: Any, old: Any, new: Any) -> int:
        old = np.array([txn.peek_leaf(layer, page >> 9)[page & 511] for page in pages.tolist()], np.uint64)
        return sound(txn, layer, numbers, flat, pages, old, new)

    patch.setattr(rewrite, "_exchange", blind)


def play(rig: Rig) -> None:
    """A story that uses every rule; AssertionError or SiloError when one does not hold."""
    vm = rig.store.write(lambda txn: txn.create_volume("vm", SIZE)).uuid
    rig.put(vm, range(0, PAGES, 2))
    rig.store.write(lambda txn: txn.take_snapshot(vm, "a"))
    for size in (LEAF_BYTES, SIZE):
        rig.store.write(lambda txn, size=size: txn.resize(vm, size))
    rig.put(vm, range(0, PAGES, 3), seed=1)
    rig.store.write(lambda txn: txn.take_snapshot(vm, "b"))
    before = rig.read("vm")
    rig.store.write(lambda txn: txn.remove_snapshot(vm, "a"))
    drain(rig.store, [MergeLayers(), Reap()])
    same = rig.read("vm") == before  # not inside the assertion: pytest would look for what differs in megabytes
    assert same
    assert rig.findings() == []

    def stale(txn: Any) -> int:
        """What a policy does that prepared its pages from an older state."""
        head = txn.volume(vm).head
        refs = txn.store_pages(head, [1], Source.of([b"old!" * (PAGE // 4)]))
        return rewrite.rewrite(txn, [(head, 1, 0x1232, int(refs[0]))])

    rig.put(vm, [1], seed=5)
    before = rig.read("vm")
    assert rig.store.write(stale) == 0
    drain(rig.store, [Clean(rig.store.usage, at=1.0, slack=0)])
    same = rig.read("vm") == before
    assert same
    assert rig.findings() == []


def test_the_story_holds(rig: Rig) -> None:
    play(rig)


@pytest.mark.parametrize("mutant", [no_clip, no_names, released, nothing_released, lower_wins, no_end, no_compare])
def test_a_mutant_is_caught(rig: Rig, mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises((AssertionError, SiloError)):
        play(rig)
