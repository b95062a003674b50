"""A real guest on an imported image, through the mount: boots, writes, trims, and leaves a clean file system."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from tests.harness import Mount
from tests.qemu.guest import Guest, build_initrd, fsck, lines_with, make_ext4

pytestmark = [pytest.mark.fuse, pytest.mark.qemu]

JOB = """
mount -t ext4 -o discard /dev/vda /mnt
echo "HAD $(sha256sum </mnt/old)"
dd if=/dev/urandom of=/mnt/new bs=64k count=160 2>/dev/null
echo "WROTE $(sha256sum </mnt/new)"
i=0; while [ $i -lt 200 ]; do echo $i >/mnt/small.$i; i=$((i+1)); done
rm /mnt/doomed
sync
fstrim /mnt || echo "no trim"
echo 3 >/proc/sys/vm/drop_caches
echo "READ $(sha256sum </mnt/new)"
umount /mnt
"""


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_guest_boots_writes_and_leaves_a_clean_file_system(tmp_path: Path, cache: str) -> None:
    tree, source, exported = tmp_path / "tree", tmp_path / "source.img", tmp_path / "exported.img"
    tree.mkdir()
    old = os.urandom(5 << 20)
    (tree / "old").write_bytes(old)
    (tree / "doomed").write_bytes(os.urandom(20 << 20))
    make_ext4(source, 96, tree)
    initrd = build_initrd(tmp_path / "initrd", JOB)
    with Mount(tmp_path / "host") as mount:
        mount.silofs("import", str(source), "vm1")
        with Guest(tmp_path, initrd, [mount.mountpoint / "vm1.img"], cache=cache) as guest:
            console = guest.wait_off()
        mount.silofs("export", "vm1", str(exported))
    (had,), (wrote,), (read,) = (list(lines_with(console, word)) for word in ("HAD ", "WROTE ", "READ "))
    assert had.split()[0] == hashlib.sha256(old).hexdigest()
    assert wrote == read
    checked = fsck(exported)
    assert checked.returncode == 0, checked.stdout
    new = tmp_path / "new"
    dump = f"dump /new {new}"
    subprocess.run(["debugfs", "-R", dump, exported], check=True, capture_output=True, env={"PATH": "/usr/sbin:/sbin"})
    assert hashlib.sha256(new.read_bytes()).hexdigest() == wrote.split()[0]
