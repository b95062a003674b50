"""`silofs diff` as it is printed, without a daemon and through one."""

from __future__ import annotations

from pathlib import Path

from tests.unit.cli.commands import PAGE, Silofs, image

SIZE = 16 << 20


def test_a_clone_that_was_shrunk_and_its_source(either: Silofs, tmp_path: Path) -> None:
    either.ok("import", image(tmp_path / "i", SIZE, 0, 1, 2, 600, 601, 4095), "golden")
    either.ok("snapshot", "golden@v1")
    either.ok("clone", "golden@v1", "vm1")
    same = either.ok("diff", "golden@v1", "vm1")
    assert (same["schema"], same["count"], same["extents"]) == ("silofs.diff/1", 0, [])
    assert either("diff", "golden@v1", "vm1").out == ""
    either.ok("resize", "vm1", "8192", "--yes")
    either.ok("snapshot", "vm1@short")
    either.ok("resize", "vm1", str(SIZE))
    found = either.ok("diff", "golden@v1", "vm1")
    assert found["extents"] == [
        {"offset": 2 * PAGE, "length": PAGE, "kind": "zero"},
        {"offset": 600 * PAGE, "length": 2 * PAGE, "kind": "zero"},
        {"offset": 4095 * PAGE, "length": PAGE, "kind": "zero"},
    ]
    assert (found["from"], found["to"], found["from_size"], found["to_size"]) == ("golden@v1", "vm1", SIZE, SIZE)
    assert (found["count"], found["data_bytes"], found["zero_bytes"]) == (3, 0, 4 * PAGE)
    back = either.ok("diff", "vm1@short", "golden@v1")
    assert [extent["kind"] for extent in back["extents"]] == ["data"] * 3
    done = either("diff", "golden@v1", "vm1")
    assert done.out.split()[:6] == ["OFFSET", "LENGTH", "KIND", str(2 * PAGE), str(PAGE), "zero"]
    assert done.err == "3 extents: 0 B of data, 16.0 KiB of zeros\n"


def test_the_last_extent_ends_with_the_volume(either: Silofs, tmp_path: Path) -> None:
    either.ok("create", "vm1", "--size", "4096")
    either.ok("snapshot", "vm1@a")
    either.ok("import", image(tmp_path / "i", 8192 + 512, 0, 2), "vm2")
    assert either.ok("diff", "vm1@a", "vm2")["extents"] == [
        {"offset": 0, "length": 4096, "kind": "data"},
        {"offset": 8192, "length": 512, "kind": "data"},
    ]


def test_what_cannot_be_compared(either: Silofs) -> None:
    either.ok("create", "vm1", "--size", "1G")
    either.ok("snapshot", "vm1@a")
    assert either.fails(2, "diff", "vm1")["code"] == "bad_name"
    assert either.fails(10, "diff", "vm1@b")["code"] == "no_such_snapshot"
    assert either.fails(10, "diff", "vm1@a", "vm2")["code"] == "no_such_volume"
    assert either.fails(10, "diff", "vm1@a", "vm1@b")["code"] == "no_such_snapshot"
