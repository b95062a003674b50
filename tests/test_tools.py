"""The test tools themselves: what they build is what the kernel's documentation says."""

from __future__ import annotations

import stat

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
