"""QEMU's own tools on the files of a mount, and what they and running machines rely on."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import smallfs
from tests.harness import Mount, until
from tests.qemu.guest import Guest, build_initrd, lines_with

pytestmark = [pytest.mark.fuse, pytest.mark.qemu]
MIB, PAGE = 1 << 20, 4096


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    with Mount(tmp_path / "host") as mounted:
        yield mounted


def tool(*words: object, fails: bool = False) -> str:
    """Run one of QEMU's tools; what it said."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert bool(done.returncode) == fails, said
    return said


def random_image(path: Path, mib: int) -> bytes:
    """Data, a hole, zeros that are written, data: as images are."""
    data = random.Random(mib).randbytes(mib * MIB // 4)
    with path.open("wb") as file:
        file.write(data)
        file.seek(mib * MIB // 2)
        file.write(bytes(MIB) + data[MIB:])
    return path.read_bytes()


def test_a_raw_image_through_every_tool(mount: Mount, tmp_path: Path) -> None:
    source = tmp_path / "source"
    content = random_image(source, 24)
    mount.silofs("create", "vm1", "--size", "24M")
    image = mount.image("vm1")
    tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-t", "none", "-T", "none", source, image)
    assert image.read_bytes()[: len(content)] == content
    info = json.loads(tool("qemu-img", "info", "-f", "raw", "--output=json", image))
    assert info["virtual-size"] == 24 * MIB and info["actual-size"] < 13 * MIB
    mapped = json.loads(tool("qemu-img", "map", "-f", "raw", "--output=json", image))
    assert sum(run["length"] for run in mapped if run["data"]) == 11 * MIB, "written zeros are none"
    tool("qemu-img", "resize", "-f", "raw", image, "32M")
    tool("qemu-img", "resize", "-f", "raw", "--shrink", image, "24M")
    assert "identical" in tool("qemu-img", "compare", "-f", "raw", "-F", "raw", image, source)
    out = tmp_path / "out.qcow2"
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", image, out)
    assert "identical" in tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, out)


def test_a_qcow2_image_in_a_volume(mount: Mount) -> None:
    """Its metadata are small writes in an order that flushes keep: `check` sees what that made of it."""
    mount.silofs("create", "vm1", "--size", "64M")
    image = mount.image("vm1")
    tool("qemu-img", "create", "-q", "-f", "qcow2", image, "256M")
    for number in range(4):
        writes = [f"write -P {number + 1} {at * MIB + number * 4096} 70000" for at in range(0, 200, 20)]
        tool("qemu-io", "-f", "qcow2", "-t", "none", *(word for write in writes for word in ("-c", write)), image)
        tool("qemu-img", "snapshot", "-c", f"s{number}", image)
    tool("qemu-io", "-f", "qcow2", "-d", "unmap", "-c", "discard 20M 40M", "-c", "flush", image)
    for number in (1, 3):
        tool("qemu-img", "snapshot", "-d", f"s{number}", image)
    assert "No errors" in tool("qemu-img", "check", "-f", "qcow2", image)
    mount.kill_daemon()
    assert "No errors" in tool("qemu-img", "check", "-f", "qcow2", image)
    tool("qemu-io", "-f", "qcow2", "-c", f"read -P 4 {3 * 4096} 4096", "-c", "read -P 0 21M 1M", image)
    tool("qemu-img", "snapshot", "-a", "s0", image)
    tool("qemu-io", "-f", "qcow2", "-c", f"read -P 1 {20 * MIB} 70000", image)
    assert "No errors" in tool("qemu-img", "check", "-f", "qcow2", image)


@pytest.mark.parametrize("aio", ["native", "threads", "io_uring"])
def test_large_requests_in_flight(mount: Mount, aio: str) -> None:
    mount.silofs("create", "vm1", "--size", "64M")
    image = mount.image("vm1")
    bench = ["qemu-img", "bench", "-f", "raw", "-t", "none", "-i", aio, "-d", "16", "-s", "1M", "-S", "1M"]
    tool(*bench, "-w", "--pattern", "7", "-c", "64", "--flush-interval", "16", image)
    tool(*bench, "-c", "64", image)
    assert image.read_bytes() == b"\7" * 64 * MIB


def test_odd_requests(mount: Mount) -> None:
    """512 bytes with and without O_DIRECT, single bytes, zeros and discards, read back by pattern."""
    mount.silofs("create", "vm1", "--size", "4M")
    for cache in ("none", "writeback"):
        commands = ["write -P 1 0 1M", "write -P 2 512 512", "write -z 8192 65536", "discard 131072 65536"]
        commands += ["aio_write -P 3 262144 4096", "aio_flush", "flush"]
        commands += ["read -P 1 0 512", "read -P 2 512 512", "read -P 1 1024 7168", "read -P 0 8192 65536"]
        commands += ["read -P 0 131072 65536", "read -P 3 262144 4096", "read -P 1 196608 1", "read -P 2 1023 1"]
        words = [word for command in commands for word in ("-c", command)]
        said = tool("qemu-io", "-f", "raw", "-t", cache, "-d", "unmap", *words, mount.image("vm1"))
        assert "verification failed" not in said


def test_what_is_acknowledged_is_seen_through_every_descriptor(mount: Mount) -> None:
    mount.silofs("create", "vm1", "--size", "1M")
    image = mount.image("vm1")
    fds = [os.open(image, os.O_RDWR) for _ in range(3)]
    for number in range(200):
        data = number.to_bytes(2, "big") * 300
        os.pwrite(fds[number % 3], data, number * 600)
        for fd in fds:
            assert os.pread(fd, 600, number * 600) == data
    with image.open("rb", buffering=0) as other:
        assert os.pread(other.fileno(), 600, 199 * 600) == (199).to_bytes(2, "big") * 300
    for fd in fds:
        os.close(fd)


def test_overlapping_writes_are_whole_pages_of_one_of_them(mount: Mount) -> None:
    mount.silofs("create", "vm1", "--size", "1M")
    image = mount.image("vm1")
    stop = threading.Event()
    torn: list[int] = []

    def write(mark: int) -> None:
        rng = random.Random(mark)
        with image.open("r+b", buffering=0) as file:
            for _ in range(150):
                pages = rng.randint(1, 8)
                os.pwrite(file.fileno(), bytes([mark]) * pages * PAGE, rng.randrange(16 - pages) * PAGE)

    def read() -> None:
        with image.open("rb", buffering=0) as file:
            while not stop.is_set():
                data = os.pread(file.fileno(), 16 * PAGE, 0)
                torn.extend(at for at in range(16) if len(set(data[at * PAGE : (at + 1) * PAGE])) != 1)

    writers = [threading.Thread(target=write, args=(mark,)) for mark in range(1, 7)]
    reader = threading.Thread(target=read)
    for thread in (*writers, reader):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert not torn


def test_a_second_machine_on_the_same_volume_is_refused(mount: Mount, tmp_path: Path) -> None:
    mount.silofs("create", "vm1", "--size", "16M")
    initrd = build_initrd(tmp_path / "initrd", "sleep 600")
    with Guest(tmp_path, initrd, [mount.image("vm1")]) as first:
        first.wait_serial("GUEST-UP")
        said = tool("qemu-io", "-f", "raw", "-c", "write 0 512", mount.image("vm1"), fails=True)
        assert '"write" lock' in said
        mount.kill_daemon()
        assert '"write" lock' in tool("qemu-io", "-f", "raw", "-c", "write 0 512", mount.image("vm1"), fails=True)
        assert first.process.poll() is None
    tool("qemu-io", "-f", "raw", "-c", "write 0 512", mount.image("vm1"))


FILL = """
dd if=/dev/urandom of=/tmp/block bs=1M count=1 2>/dev/null
echo READY
until dd if=/dev/vdb bs=8 count=1 2>/dev/null | grep -q go; do sleep 0.05; done
i=0
while [ $i -lt 320 ]; do
  dd if=/tmp/block of=/dev/vda bs=1M seek=$i count=1 oflag=direct conv=notrunc 2>/dev/null
  i=$((i+1))
done
sync
echo "BLOCK $(sha256sum </tmp/block)"
"""


def test_a_full_store_pauses_the_machine_until_there_is_space(tmp_path: Path) -> None:
    initrd, signal = build_initrd(tmp_path / "initrd", FILL), tmp_path / "signal"
    signal.write_bytes(bytes(MIB))
    with smallfs.small("tmpfs", 700, tmp_path) as disk, Mount(disk) as mount:
        mount.silofs("create", "vm1", "--size", "512M")
        with Guest(tmp_path, initrd, [mount.image("vm1"), signal]) as guest:
            guest.wait_serial("READY")
            smallfs.fill(disk)
            with signal.open("r+b") as file:
                file.write(b"go")
                os.fsync(file.fileno())
            error = guest.qmp.wait_event("BLOCK_IO_ERROR", timeout=60)["data"]
            assert error["nospace"] and error["action"] == "stop"
            guest.qmp.wait_event("STOP")
            smallfs.make_room(disk)
            until(lambda: mount.silofs_json("df")["available"] > 340 * MIB, "the store knows of the space")
            guest.qmp.command("cont")
            (said,) = lines_with(guest.wait_off(), "BLOCK ")
        with mount.image("vm1").open("rb") as image:
            for number in range(320):
                assert hashlib.sha256(image.read(MIB)).hexdigest() == said.split()[0], number


WRITE = """
i=0
while [ $i -lt 400 ]; do
  i=$((i+1))
  printf '%08d %4087d' $i $i >/tmp/page
  dd if=/tmp/page of=/dev/vda bs=4096 seek=$((i % 64)) oflag=direct conv=notrunc,fsync 2>/dev/null || echo "ERROR at $i"
  echo "ACK $i"
done
"""


def test_a_machine_does_not_notice_that_the_daemon_is_killed(mount: Mount, tmp_path: Path) -> None:
    mount.silofs("create", "vm1", "--size", "16M")
    initrd = build_initrd(tmp_path / "initrd", WRITE)
    with Guest(tmp_path, initrd, [mount.image("vm1")]) as guest:
        for number in (30, 90, 150):
            guest.wait_serial(f"ACK {number}\n")
            mount.kill_daemon()
        console = guest.wait_off()
        assert "ERROR" not in console and not guest.qmp.events
    data = mount.image("vm1").read_bytes()
    for page in range(64):
        assert int(data[page * PAGE :][:8]) == 400 - (400 - page) % 64
