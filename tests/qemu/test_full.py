"""A guest that writes on a full store is paused, not told of an error, and goes on with `cont` once there is room."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.harness import Mount
from tests.qemu.guest import Guest, build_initrd, lines_with
from tests.smallfs import fill, make_room, small

pytestmark = [pytest.mark.fuse, pytest.mark.qemu]

BYTES = 100 << 20
JOB = f"""
echo "WROTE $(seq 1 20000000 | head -c {BYTES} | tee /dev/vda | sha256sum)"
sync
echo 3 >/proc/sys/vm/drop_caches
echo "READ $(head -c {BYTES} /dev/vda | sha256sum)"
"""


@pytest.mark.timeout(1200)  # an emulated guest fills a disk: minutes on a slow machine
def test_a_full_store_pauses_the_guest_and_cont_goes_on(tmp_path: Path) -> None:
    initrd = build_initrd(tmp_path / "initrd", JOB)
    with small("ext4", 600, tmp_path) as place, Mount(place / "host") as mount:
        mount.silofs("create", "vm1", "--size", "1G")
        fill(place)  # what is left is what the store holds
        with Guest(tmp_path, initrd, [mount.image("vm1")]) as guest:
            guest.qmp.wait_event("STOP", timeout=180)
            assert guest.qmp.command("query-status")["status"] == "io-error"
            assert mount.status()["state"] == "serving"
            guest.qmp.command("cont")
            guest.qmp.wait_event("STOP", timeout=60)  # there is still no room, and still no error for the guest
            make_room(place)
            guest.qmp.command("cont")
            console = guest.wait_off()
        (wrote,), (read,) = (list(lines_with(console, word)) for word in ("WROTE ", "READ "))
        assert wrote == read and "error" not in console.lower()
        with mount.image("vm1").open("rb") as file:
            assert hashlib.sha256(file.read(BYTES)).hexdigest() == wrote.split()[0]
        assert mount.silofs_json("check", "--read-data")["damaged"] == 0
