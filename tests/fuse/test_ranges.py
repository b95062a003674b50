"""Holes: made, zeroed, found, and copied, with system calls and with the tools that rely on them."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuse.calls import (
    COLLAPSE_RANGE,
    INSERT_RANGE,
    KEEP_SIZE,
    PUNCH_HOLE,
    UNSHARE_RANGE,
    ZERO_RANGE,
    allocated,
    extents,
    fallocate,
)
from tests.fuse.mounts import Mount
from tests.fuse.test_files import fails

pytestmark = pytest.mark.fuse
MIB = 1 << 20


@pytest.fixture
def image(shared: Mount, request: pytest.FixtureRequest) -> Path:
    """A volume of 8 MiB of which the second one is data."""
    path = shared.create(request.node.name.replace("[", "-").replace("]", ""), 8 * MIB)
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), random.randbytes(MIB), MIB)
    return path


@pytest.fixture
def fd(image: Path) -> Iterator[int]:
    fd = os.open(image, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("mode", [PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE])
def test_a_range_becomes_zeros_and_frees_its_pages(image: Path, fd: int, mode: int) -> None:
    whole = os.pread(fd, 2 * MIB, 0)
    fallocate(fd, mode, MIB + 4000, 100_000)
    whole = whole[: MIB + 4000] + bytes(100_000) + whole[MIB + 104_000 :]
    assert os.pread(fd, 2 * MIB, 0) == whole
    assert extents(fd) == [(MIB, MIB + 4096), (MIB + 4096 * 25, 2 * MIB)]
    os.fsync(fd)
    assert os.pread(fd, 2 * MIB, 0) == whole
    assert allocated(image) == MIB - 24 * 4096
    fallocate(fd, mode, 0, 8 * MIB)
    assert extents(fd) == [] and allocated(image) == 0
    os.fsync(fd)
    assert extents(fd) == [] and allocated(image) == 0


@pytest.mark.parametrize(
    ("mode", "size"),
    [(0, 12), (ZERO_RANGE, 12), (KEEP_SIZE, 8), (ZERO_RANGE | KEEP_SIZE, 8), (PUNCH_HOLE | KEEP_SIZE, 8)],
)
def test_a_range_beyond_the_end_makes_the_volume_longer_unless_told_not_to(
    image: Path, fd: int, shared: Mount, mode: int, size: int
) -> None:
    fallocate(fd, mode, 4 * MIB, 8 * MIB)
    assert image.stat().st_size == size * MIB == shared.ask("info", image.stem)["virtual_size"]
    assert extents(fd) == [(MIB, 2 * MIB)]  # a thin volume: nothing is stored for it
    os.posix_fallocate(fd, 0, MIB)
    assert image.stat().st_size == size * MIB


@pytest.mark.parametrize("mode", [COLLAPSE_RANGE, INSERT_RANGE, UNSHARE_RANGE, PUNCH_HOLE | ZERO_RANGE | KEEP_SIZE])
def test_other_modes_are_not_supported(fd: int, mode: int) -> None:
    fails(errno.EOPNOTSUPP, fallocate, fd, mode, MIB, MIB)


def test_nothing_is_allocated_in_a_snapshot_nor_without_the_right_to_write(shared: Mount, image: Path) -> None:
    shared.silofs("snapshot", f"{image.stem}@s")
    for path in (image, shared.path / ".snapshots" / f"{image.stem}@s.img"):
        with path.open("rb", buffering=0) as file:
            fails(errno.EBADF, fallocate, file.fileno(), PUNCH_HOLE | KEEP_SIZE, MIB, MIB)
            assert extents(file.fileno()) == [(MIB, 2 * MIB)]
    with image.open("r+b", buffering=0) as file:
        fallocate(file.fileno(), PUNCH_HOLE | KEEP_SIZE, 0, 8 * MIB)
    with (shared.path / ".snapshots" / f"{image.stem}@s.img").open("rb", buffering=0) as file:
        assert extents(file.fileno()) == [(MIB, 2 * MIB)]


def test_data_and_holes_are_exact_and_end(fd: int) -> None:
    assert os.lseek(fd, 0, os.SEEK_DATA) == MIB
    assert os.lseek(fd, MIB + 5, os.SEEK_DATA) == MIB + 5
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
    assert os.lseek(fd, MIB, os.SEEK_HOLE) == 2 * MIB
    assert os.lseek(fd, 8 * MIB - 1, os.SEEK_HOLE) == 8 * MIB - 1
    for offset, whence in [(2 * MIB, os.SEEK_DATA), (8 * MIB, os.SEEK_DATA), (8 * MIB, os.SEEK_HOLE)]:
        fails(errno.ENXIO, os.lseek, fd, offset, whence)
    fails(errno.ENXIO, os.lseek, fd, -1, os.SEEK_DATA)
    os.pwrite(fd, b"x", 8 * MIB - 1)
    assert extents(fd) == [(MIB, 2 * MIB), (8 * MIB - 4096, 8 * MIB)]


def test_programs_see_the_holes(image: Path, fd: int, tmp_path: Path) -> None:
    for at in (3 * MIB, 5 * MIB + 4096):
        os.pwrite(fd, random.randbytes(8192), at)
    mapped = subprocess.run(
        ["qemu-img", "map", "-f", "raw", "--output=json", image], stdout=subprocess.PIPE, check=True
    )
    found = [(run["start"], run["start"] + run["length"]) for run in json.loads(mapped.stdout) if run["data"]]
    assert found == extents(fd) == [(MIB, 2 * MIB), (3 * MIB, 3 * MIB + 8192), (5 * MIB + 4096, 5 * MIB + 12288)]
    copy = tmp_path / "copy"
    for command in (
        ["cp", "--sparse=auto", image, copy],
        ["cp", "--sparse=always", image, copy],
        ["qemu-img", "convert", "-f", "raw", "-O", "raw", image, copy],
        ["dd", f"if={image}", f"of={copy}", "bs=64k", "conv=sparse", "status=none"],
    ):
        copy.unlink(missing_ok=True)
        subprocess.run(command, check=True)
        assert copy.read_bytes() == image.read_bytes()
        assert allocated(copy) < 2 * MIB, command
    done = subprocess.run(
        ["qemu-img", "compare", "-f", "raw", "-F", "raw", image, copy], stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == 0 and "identical" in done.stdout
    subprocess.run(
        ["qemu-img", "bench", "-f", "raw", "-t", "none", "-w", "-c", "200", image],
        check=True,
        stdout=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    "command", [["cp", "--sparse=always"], ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw"]]
)
def test_a_sparse_file_is_copied_in_sparse(shared: Mount, image: Path, tmp_path: Path, command: list[str]) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(8 * MIB)
        file.seek(6 * MIB)
        file.write(random.randbytes(3 * 4096))
    subprocess.run([*command, source, image], check=True)
    assert image.read_bytes() == source.read_bytes()
    assert allocated(image) == 3 * 4096


def test_a_volume_without_the_extension_refuses_as_before(tmp_path: Path) -> None:
    with Mount(tmp_path, env={"SILOFS_EXTENSION": "off"}) as mount:
        with mount.create("vm1", MIB).open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"x" * 4096, 4096)
            fails(errno.EOPNOTSUPP, fallocate, file.fileno(), PUNCH_HOLE | KEEP_SIZE, 0, MIB)
            assert extents(file.fileno()) == [(0, MIB)]
        assert not {"fallocate", "lseek", "write_flags"} & set(mount.ask("status")["capabilities"])


def test_a_pool_of_holes_survives_kills(tmp_path: Path) -> None:
    """Punches and writes in turn, the daemon killed in between: what is read and what is a hole stay one."""
    rng = random.Random(7)
    with Mount(tmp_path) as mount:
        path = mount.create("vm1", 4 * MIB)
        model = bytearray(4 * MIB)
        fd = os.open(path, os.O_RDWR)
        for step in range(60):
            offset, length = rng.randrange(4 * MIB), rng.randrange(1, 300_000)
            length = min(length, 4 * MIB - offset)
            if rng.random() < 0.5:
                model[offset : offset + length] = data = rng.randbytes(length)
                os.pwrite(fd, data, offset)
            else:
                model[offset : offset + length] = bytes(length)
                fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, length)
            if step % 20 == 19:
                mount.kill_daemon()
        assert os.pread(fd, 4 * MIB, 0) == model
        os.fsync(fd)
        pages = [at for at in range(0, 4 * MIB, 4096) if any(model[at : at + 4096])]
        assert sum(end - start for start, end in extents(fd)) == len(pages) * 4096 == allocated(path)
        os.close(fd)
