"""When rounds end, and which manifests and maps are refused."""

from __future__ import annotations

import pytest

from silofs import limits
from silofs.errors import ProtocolError
from silofs.migrate import messages as ms
from silofs.migrate import plan
from silofs.migrate.plan import Verdict
from silofs.migrate.states import MAP_COMPLETE, Mode

V, W = b"v" * 16, b"w" * 16
GROUP = (ms.VolumeEpoch(V, 2), ms.VolumeEpoch(W, 5))
BASES = (ms.Base(V, b"g" * 16), ms.Base(W, b""))
MIB_S = 256 * 4096.0


def segment(volume: bytes, uuid: int, parent: bytes | int, size: int = 1 << 20, clip: int = 0) -> ms.Segment:
    parent = bytes([parent]) * 16 if isinstance(parent, int) else parent
    return ms.Segment(volume, bytes([uuid]) * 16, parent, size, clip, 1, 1)


@pytest.mark.parametrize(
    ("mode", "rounds", "rate", "expected"),
    [
        (Mode.AUTO, [100_000], 100 * MIB_S, Verdict.AGAIN),
        (Mode.AUTO, [100_000, 10_000], 100 * MIB_S, Verdict.AGAIN),
        (Mode.AUTO, [100_000, 5_000], 100 * MIB_S, Verdict.SWITCH),  # 20 MiB at 100 MiB/s fit 0.3 s
        (Mode.AUTO, [100_000, 95_000], 100 * MIB_S, Verdict.SWITCH),  # it does not shrink
        (Mode.PRECOPY, [100_000, 95_000], 100 * MIB_S, Verdict.AGAIN),
        (Mode.PRECOPY, [100_000] * limits.ROUNDS_MAX, 100 * MIB_S, Verdict.GIVE_UP),
        (Mode.AUTO, [2 ** (40 - n) for n in range(limits.ROUNDS_MAX)], 0.0, Verdict.SWITCH),
        (Mode.POSTCOPY, [100_000], 0.0, Verdict.SWITCH),
        (Mode.AUTO, [0], 0.0, Verdict.SWITCH),
    ],
)
def test_when_rounds_end(mode: Mode, rounds: list[int], rate: float, expected: Verdict) -> None:
    assert plan.verdict(mode, rounds, rate) is expected


def test_the_newest_common_state_is_the_first_that_is_complete() -> None:
    assert plan.newest_common([b"c", b"b", b"a"], {b"a", b"b"}) == b"b"
    assert plan.newest_common([b"c"], {b"a"}) == b""


def test_a_manifest_is_chains_from_the_bases_up() -> None:
    good = (segment(V, 1, b"g" * 16), segment(V, 2, 1), segment(W, 3, b""), segment(V, 4, b""))
    plan.check_manifest(GROUP, BASES, good)
    assert plan.tips((V, W), BASES, good) == {V: bytes([4]) * 16, W: bytes([3]) * 16}
    assert plan.tips((V, W), BASES, ()) == {V: b"g" * 16, W: b""}


@pytest.mark.parametrize(
    "bad",
    [
        (segment(b"x" * 16, 1, b""),),
        (segment(V, 2, 1), segment(V, 1, b"g" * 16)),
        (segment(V, 1, b""), segment(V, 1, b"")),
        (segment(V, 1, b""), segment(W, 2, 1)),
        (segment(W, 1, b"g" * 16),),
        (ms.Segment(V, b"g" * 16, b"", 4096, 0, 1, 1),),
        (segment(V, 1, b"", size=limits.SIZE_MAX + 1),),
        (segment(V, 1, b"", size=4096, clip=8192),),
    ],
)
def test_any_other_manifest_is_refused(bad: tuple[ms.Segment, ...]) -> None:
    with pytest.raises(ProtocolError):
        plan.check_manifest(GROUP, BASES, bad)


def test_bases_of_other_volumes_are_refused() -> None:
    for bases in (BASES[:1], (*BASES, ms.Base(V, b"")), (ms.Base(b"x" * 16, b""), BASES[1])):
        with pytest.raises(ProtocolError):
            plan.check_manifest(GROUP, bases, ())


@pytest.mark.parametrize(
    "runs", [[ms.Run(255, 2)], [ms.Run(4, 2), ms.Run(5, 1)], [ms.Run(4, 1), ms.Run(0, 1)], [ms.Run(0, 257)]]
)
def test_pages_that_are_not_there_are_not_served(runs: list[ms.Run]) -> None:
    with pytest.raises(ProtocolError):
        plan.check_runs(segment(V, 1, b""), runs)
    plan.check_runs(segment(V, 1, b""), [ms.Run(0, 2), ms.Run(2, 254)])


def test_maps_continue_where_they_ended() -> None:
    layer, data = segment(V, 1, b""), ms.PageKind.DATA
    assert plan.map_after(layer, 0, ms.MapPart(layer.uuid, 0, 9, (ms.MapRun(0, 9, data),))) == 9
    assert plan.map_after(layer, 9, ms.MapPart(layer.uuid, 9, None, (ms.MapRun(20, 236, data),))) == MAP_COMPLETE
    for part in (
        ms.MapPart(b"x" * 16, 0, None, ()),
        ms.MapPart(layer.uuid, 5, None, ()),
        ms.MapPart(layer.uuid, 0, 0, ()),
        ms.MapPart(layer.uuid, 0, 4, (ms.MapRun(0, 5, data),)),
        ms.MapPart(layer.uuid, 0, None, (ms.MapRun(0, 5, data), ms.MapRun(4, 1, data))),
        ms.MapPart(layer.uuid, 0, None, (ms.MapRun(250, 7, data),)),
    ):
        with pytest.raises(ProtocolError):
            plan.map_after(layer, 0, part)


def test_what_has_arrived_of_a_segment_is_kept_if_it_is_the_same() -> None:
    old = (segment(V, 1, b""), segment(V, 2, 1))
    new = (segment(V, 1, b""), segment(V, 2, b""), segment(V, 3, 2))
    assert plan.carry_over(old, (MAP_COMPLETE, 7), new) == (MAP_COMPLETE, 0, 0)
