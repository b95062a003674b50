"""A running guest moves: QEMU's migration and ours together, with the disk on two mounts and no shared storage.

The guest writes numbered pages to its raw disk and prints each acknowledgement on its serial console, which goes to a
file of its host. QEMU's pause-before-switchover capability stops A's guest with its disk flushed; then the volume is
switched over, and `migrate-continue` lets B's guest go on.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import Mount, until
from tests.qemu.guest import Guest, build_initrd, lines_with

pytestmark = [pytest.mark.fuse, pytest.mark.qemu]

PAGES = 256
WRITES = 1500
JOB = f"""
i=0
while [ $i -lt {WRITES} ]; do
  i=$((i+1))
  printf '%08d %4087d' $i $i >/tmp/page
  dd if=/tmp/page of=/dev/vda bs=4096 seek=$((i % {PAGES})) oflag=direct conv=notrunc 2>/dev/null
  echo "ACK $i"
done
i=0
while [ $i -lt {PAGES} ]; do
  dd if=/dev/vda bs=4096 skip=$i count=1 iflag=direct 2>/dev/null | head -c 8
  echo " AT $i"
  i=$((i+1))
done
"""
CAPABILITIES = [{"capability": name, "state": True} for name in ("pause-before-switchover", "events")]


def newest(page: int) -> int:
    """The number of the last write to a page, once all are done."""
    return WRITES - (WRITES - page) % PAGES


def test_guest_goes_on_at_the_new_home_with_every_acknowledged_write(tmp_path: Path) -> None:
    initrd = build_initrd(tmp_path / "initrd", JOB)
    incoming = f"unix:{tmp_path}/migration"
    with Mount(tmp_path / "a", listen=True) as a, Mount(tmp_path / "b", listen=True) as b:
        peer = a.pair(b)
        a.silofs("create", "vm1", "--size", "64M")
        volume = a.mountpoint / "vm1.img"
        with Guest(tmp_path, initrd, [volume], name="a") as old:
            old.wait_serial("ACK 100\n")
            begun = a.silofs_json("migrate", "vm1", "--to", peer, "--switchover", "manual", "--detach")
            identity = begun["migration"]
            moved = b.mountpoint / "vm1.img"
            until(moved.exists, "the volume shows at B")
            with Guest(tmp_path, initrd, [moved], name="b", incoming=incoming) as new:
                for qemu in (old, new):
                    qemu.qmp.command("migrate-set-capabilities", capabilities=CAPABILITIES)
                old.qmp.command("migrate", uri=incoming)
                old.qmp.wait_migration("pre-switchover")
                a.silofs("migration", "switchover", identity, "--fence-writer")
                old.qmp.command("migrate-continue", state="pre-switchover")
                old.qmp.wait_migration("completed")
                new.wait_off(timeout=240)
                consoles = old.serial() + new.serial()
                before = len(list(lines_with(old.serial(), "ACK ")))
        assert [int(text) for text in lines_with(consoles, "ACK ")] == list(range(1, WRITES + 1))
        assert 100 <= before < WRITES, "the guest moved while it was writing"
        seen = dict(line.split(" AT ")[::-1] for line in consoles.splitlines() if " AT " in line)
        assert {int(page): int(number) for page, number in seen.items()} == {p: newest(p) for p in range(PAGES)}
        until(lambda: a.silofs_json("migration", "show", identity)["phase"] == "complete", "the migration is complete")
        assert b.silofs_json("info", "vm1")["role"] == "owner"
        data = moved.read_bytes()
        assert [int(data[page * 4096 :][:8]) for page in range(PAGES)] == [newest(page) for page in range(PAGES)]
