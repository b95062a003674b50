"""The test tools themselves: what they build is what the kernel's documentation says."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from tests.crash.content import print_of
from tests.crash.story import Chapter, Expected, Volume
from tests.exerciser import Difference, Oracle, completions, main, pattern, pauses, verify
from tests.qemu.guest import cpio_newc, lines_with


def test_newc_archive_is_aligned_and_lists_back() -> None:
    entries = {
        "init": (stat.S_IFREG | 0o755, b"#!/bin/sh\n", (0, 0)),
        "dev": (stat.S_IFDIR | 0o755, b"", (0, 0)),
        "dev/console": (stat.S_IFCHR | 0o600, b"", (5, 1)),
    }
    archive = cpio_newc(entries)
    names, at = [], 0
    while True:
        assert archive[at : at + 6] == b"070701" and at % 4 == 0
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        size, name_size = fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        if name == "TRAILER!!!":
            break
        start = (at + 110 + name_size + 3) // 4 * 4
        mode, content, device = entries[name]
        assert (fields[1], archive[start : start + size], (fields[9], fields[10])) == (mode, content, device)
        names.append(name)
        at = (start + size + 3) // 4 * 4
    assert names == list(entries)


def test_lines_with_takes_only_whole_prefixes() -> None:
    assert list(lines_with("ACK 1\nxACK 2\nACK 3\n", "ACK ")) == ["1", "3"]


SEED, UNIT = 7, 4096


def content(unit: int, sequence: int) -> memoryview:
    return memoryview(pattern(SEED, unit, sequence, UNIT) if sequence else bytes(UNIT))


def test_oracle_accepts_the_last_acknowledged_write_and_those_in_flight() -> None:
    oracle = Oracle(SEED, UNIT)
    first, second, third = (oracle.issue(3, 1, zeroes=False) for _ in range(3))
    oracle.check(3, content(3, 0))
    oracle.acknowledge(first)
    for sequence in (1, 2, 3):
        oracle.check(3, content(3, sequence))
    with pytest.raises(Difference):
        oracle.check(3, content(3, 0))
    oracle.acknowledge(second)  # first and second overlapped: either may have come last
    oracle.check(3, content(3, 1))
    fourth = oracle.issue(3, 1, zeroes=True)
    oracle.acknowledge(fourth)
    oracle.check(3, content(3, 0))
    oracle.check(3, content(3, third.sequence))
    for sequence in (1, 2):
        with pytest.raises(Difference):
            oracle.check(3, content(3, sequence))


def test_oracle_judges_a_read_by_when_it_began() -> None:
    oracle = Oracle(SEED, UNIT)
    oracle.acknowledge(oracle.issue(0, 1, zeroes=False))
    oracle.begin_read(1)
    for _ in range(20):  # more than a history keeps, were it not for the read
        oracle.acknowledge(oracle.issue(0, 1, zeroes=False))
    oracle.end_read(1, 0, content(0, 1))
    oracle.begin_read(1)
    with pytest.raises(Difference):
        oracle.end_read(1, 0, content(0, 20))


def test_oracle_refuses_torn_and_misplaced_units() -> None:
    oracle = Oracle(SEED, UNIT)
    oracle.acknowledge(oracle.issue(0, 8, zeroes=False))
    with pytest.raises(Difference, match="torn"):
        oracle.check(1, memoryview(bytes(content(1, 1)[:512]) + bytes(UNIT - 512)))
    with pytest.raises(Difference, match="foreign"):
        oracle.check(1, content(2, 1))


def test_a_run_verifies_and_a_tampered_file_does_not(tmp_path: Path) -> None:
    image, log = tmp_path / "image", tmp_path / "log"
    image.write_bytes(bytes(4 << 20))
    command = ["run", str(image), "--log", str(log), "--mode", "buffered", "--operations", "300", "--depth", "1"]
    assert main(command) == 0
    assert verify(image, log) > 0 and len(completions(log)) >= 290
    with image.open("r+b") as file:  # one unit of zeros where there was data
        data = file.read()
        unit = next(at for at in range(0, len(data), UNIT) if any(data[at : at + UNIT]))
        os.pwrite(file.fileno(), bytes(UNIT), unit)
    with pytest.raises(Difference):
        verify(image, log)


def test_after_a_power_cut_only_synced_writes_supersede(tmp_path: Path) -> None:
    image, log = tmp_path / "image", tmp_path / "log"
    events = [
        f"H {SEED} {UNIT} 0 {UNIT}",
        "W 1 1 0 1",
        "A 2 1 0",
        "F 3 0",
        "W 4 2 0 1",
        "A 5 2 0",
        "W 6 3 0 1",
        "A 7 3",
    ]
    log.write_text("\n".join(events))  # the last line is cut: never acknowledged
    for sequence, synced, acknowledged in ((0, False, False), (1, True, False), (2, True, True), (3, True, True)):
        image.write_bytes(content(0, sequence))
        for after, legal in (("synced", synced), ("acknowledged", acknowledged)):
            if legal:
                verify(image, log, after=after)
            else:
                with pytest.raises(Difference):
                    verify(image, log, after=after)


def test_a_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    image, log = tmp_path / "image", tmp_path / "log"
    image.write_bytes(bytes(1 << 20))
    # one thread: in a page cache, unlike in a mount, a read may see half of a page that is being written
    command = ["run", str(image), "--log", str(log), "--mode", "buffered", "--operations", "100", "--depth", "1"]
    assert main(command) == 0
    with log.open("a") as file:  # two writes in flight at a kill, and a line that it cut
        file.write("W 100001 100001 0 1\nW 100002 100002 1 1\nA 1000")
    image_bytes = bytearray(image.read_bytes())
    image_bytes[UNIT : 2 * UNIT] = pattern(1, 1, 100002, UNIT)  # only the second took effect
    image.write_bytes(image_bytes)
    assert main([*command, "--continue", "--seed", "9"]) == 0
    verify(image, log)
    assert main([*command, "--continue", "--seed", "10"]) == 0
    verify(image, log)


def test_a_story_tells_a_prefix_from_a_mixture() -> None:
    """Two writes to two units, the first of them synced: what a power cut may leave, by moment."""
    volume = Volume(np.zeros(2, np.uint64), 10)
    volume.write(0, 1, 1)
    volume.history.durable.append((20, 1))
    volume.write(1, 1, 2)
    chapter = Chapter(0, 10, ["vm"], {"vm@s": "print"})
    expected = Expected([chapter, Chapter(30, 40, ["vm"], {}, {"vm": 2})], {"vm": volume.history})
    for picture, moment, legal in (
        ((0, 0), 15, True),
        ((0, 0), 25, False),  # what was synced is lost
        ((1, 0), 25, True),
        ((1, 2), 25, True),
        ((0, 2), 15, False),  # no prefix
    ):
        found = {"vm": print_of(np.array(picture, np.uint64))}
        assert (expected.problems(moment, found, {"vm@s": "print"}) == []) is legal
        assert expected.problems(moment, found, {}), "the snapshot is there until it is removed"
    done, without = {"vm": print_of(np.array((1, 2), np.uint64))}, {"vm": print_of(np.array((1, 0), np.uint64))}
    assert not expected.problems(35, done, {}), "the verb was under way"
    assert expected.problems(35, without, {}), "and took all writes along"


def test_a_pause_ends_with_the_longest_gap() -> None:
    milliseconds = [0, 1, 2, 3, 400, 401, 402, 2000, 2001]
    assert pauses([at * 10**6 for at in milliseconds], [1_500_000, 401_500_000]) == pytest.approx([0.3985, 1.5985])
