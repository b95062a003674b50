"""Space that a guest gives up comes back to the store: a real guest's fstrim, and a file system on a loop device."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fuse.calls import allocated, extents
from tests.harness import Mount, until
from tests.qemu.guest import Guest, build_initrd, fsck, make_ext4

pytestmark = [pytest.mark.fuse, pytest.mark.qemu]
MIB = 1 << 20

JOB = """
hold() { # hold WORD: say it, and wait until the other side has put it on the second disk
    echo "REACHED $1"
    until dd if=/dev/vdb bs=8 count=1 2>/dev/null | grep -q "$1"; do sleep 0.05; done
}
mount -t ext4 /dev/vda /mnt
dd if=/dev/urandom of=/mnt/new bs=1M count=40 2>/dev/null
sync
hold filled
rm /mnt/new /mnt/old
sync
hold removed
fstrim /mnt
hold trimmed
umount /mnt
"""


def used(mount: Mount) -> int:
    """Bytes of the store's file, without what is only held for later writes."""
    df = mount.silofs_json("df")
    return int(df["file_bytes"]) - int(df["held_bytes"])


def test_what_a_guest_trims_is_free_in_the_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree, source, signal = tmp_path / "tree", tmp_path / "source.img", tmp_path / "signal"
    tree.mkdir()
    (tree / "old").write_bytes(os.urandom(20 * MIB))
    (tree / "kept").write_bytes(os.urandom(5 * MIB))
    make_ext4(source, 96, tree)
    signal.write_bytes(bytes(MIB))
    seen: dict[str, tuple[int, int]] = {}
    with Mount(tmp_path / "host") as mount:
        mount.silofs("import", str(source), "vm1")
        image = mount.image("vm1")
        with Guest(tmp_path, build_initrd(tmp_path / "initrd", JOB), [image, signal]) as guest:
            for word in ("filled", "removed", "trimmed"):
                guest.wait_serial(f"REACHED {word}")
                if word == "trimmed":
                    until(lambda: mount.silofs_json("du", "vm1")["stored"] < 30 * MIB, "the store has it")
                seen[word] = allocated(image), mount.silofs_json("du", "vm1")["stored"]
                with signal.open("r+b") as file:
                    file.write(word.encode().ljust(8))
                    os.fsync(file.fileno())
            guest.wait_off()
        mount.silofs("export", "vm1", str(tmp_path / "exported"))
        size = used(mount)
        with mount.image("vm1").open("r+b", buffering=0) as file:  # what was freed is what new data takes
            for at in range(60 * MIB, 80 * MIB, MIB):
                os.pwrite(file.fileno(), random.randbytes(MIB), at)
            os.fsync(file.fileno())
        grown = used(mount) - size
    with capsys.disabled():
        shown = ", ".join(f"{word} {blocks // MIB} and {stored // MIB}" for word, (blocks, stored) in seen.items())
        print(f"\nMiB by st_blocks and by `silofs du`: {shown}; 20 MiB written then, file grown by {grown // MIB} MiB")
    assert seen["filled"][0] > 65 * MIB and seen["removed"][0] > 65 * MIB
    # 20 MiB of the imported image lie below the layer that was trimmed: they come back when the two are merged.
    assert seen["trimmed"][0] < 15 * MIB and seen["trimmed"][1] < 30 * MIB
    assert grown <= 8 * MIB
    assert fsck(tmp_path / "exported").returncode == 0


@contextmanager
def loop_device(image: Path) -> Iterator[Path]:
    command = ["losetup", "--find", "--show", "--direct-io=on", image]
    device = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextmanager
def mounted(device: Path, place: Path) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "ext4", device, place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_file_system_on_a_loop_device(tmp_path: Path) -> None:
    """The loop driver turns discards and zeroing into fallocate(2), and writes with O_DIRECT."""
    place = tmp_path / "place"
    with Mount(tmp_path / "host") as mount:
        image = mount.image("vm1")
        mount.silofs("create", "vm1", "--size", "256M")
        with loop_device(image) as device:
            subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0", device], check=True)
            assert allocated(image) < 16 * MIB
            content = random.randbytes(64 * MIB)
            with mounted(device, place):
                (place / "kept").write_bytes(content[: 8 * MIB])
                (place / "doomed").write_bytes(content)
                os.sync()
                full = allocated(image)
                (place / "doomed").unlink()
                subprocess.run(["sync", "-f", place], check=True)
                subprocess.run(["fstrim", place], check=True)
                trimmed = allocated(image)
                mount.kill_daemon()
                assert (place / "kept").read_bytes() == content[: 8 * MIB]
            assert full > 72 * MIB and trimmed < 24 * MIB
            checked = subprocess.run(["e2fsck", "-fn", device], capture_output=True, text=True, check=False)
            assert checked.returncode == 0, checked.stdout
            subprocess.run(["blkdiscard", "--force", device], check=True)
            until(lambda: allocated(image) == 0, "nothing is allocated")
        with image.open("rb") as file:
            assert extents(file.fileno()) == []
        until(lambda: mount.silofs_json("du")["stored"] == 0, "everything is given back")
