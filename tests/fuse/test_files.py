"""What programs see of the files of a mount."""

# The system calls are what is tested here.
# ruff: noqa: PTH101, PTH104, PTH108, PTH115, PTH208

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import resource
import signal
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from silofs.limits import HANDLES_MAX
from tests.fuse.mounts import Mount, open_files, wait

pytestmark = pytest.mark.fuse
SIZE = 8 << 20


@pytest.fixture
def image(shared: Mount, request: pytest.FixtureRequest) -> Path:
    """A volume of 8 MiB, named after its test."""
    return shared.create(request.node.name.replace("[", "-").replace("]", ""), SIZE)


def fails(code: int, call: object, *args: object, **kwargs: object) -> None:
    assert callable(call)
    with pytest.raises(OSError) as caught:
        call(*args, **kwargs)
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[code]


def test_a_file_is_listed_with_its_attributes(shared: Mount, image: Path) -> None:
    assert image.name in os.listdir(shared.path)
    about = image.stat()
    assert stat.S_ISREG(about.st_mode) and stat.S_IMODE(about.st_mode) == 0o600
    assert (about.st_size, about.st_blocks, about.st_uid) == (SIZE, 0, 0)
    entries = {entry.name: entry.inode() for entry in os.scandir(shared.path)}
    assert entries[image.name] == about.st_ino


def test_times_that_no_volume_can_have_are_the_nearest(image: Path) -> None:
    for seconds, kept in ((1 << 50, (1 << 63) - 1), (-(1 << 40), -(1 << 63))):
        os.utime(image, ns=(0, seconds * 10**9))
        assert image.stat().st_mtime_ns == kept


def test_with_too_many_open_nothing_is_created(shared: Mount, image: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, limits[1]), limits[1]))
    opened: list[int] = []
    new = image.with_name("one-too-many.img")
    try:
        with pytest.raises(OSError, match="file") as caught:
            while len(opened) <= HANDLES_MAX:
                opened.append(os.open(image, os.O_RDONLY))
        assert caught.value.errno == errno.ENFILE
        fails(errno.ENFILE, os.open, new, os.O_RDWR | os.O_CREAT)
        assert not new.exists()
    finally:
        for fd in opened:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_rename_of_an_unknown_kind_is_none(image: Path) -> None:
    """RENAME_WHITEOUT leaves something under the old name, which no mount of silofs can."""
    libc = ctypes.CDLL(None, use_errno=True)
    old, new = os.fsencode(image), os.fsencode(image.with_name("whiteout.img"))
    assert libc.renameat2(-100, old, -100, new, 4) == -1
    assert ctypes.get_errno() == errno.EINVAL
    assert image.exists()


def test_holes_read_as_zeros_and_written_bytes_as_written(image: Path) -> None:
    fd = os.open(image, os.O_RDWR)
    assert os.pread(fd, 1 << 20, 1 << 20) == bytes(1 << 20)
    assert os.pwrite(fd, b"silo", 12345) == 4
    assert os.pread(fd, 8, 12343) == b"\0\0silo\0\0"
    os.close(fd)


def test_random_writes_of_any_alignment_agree_with_a_plain_file(image: Path) -> None:
    rng = random.Random(7)
    model = bytearray(SIZE)
    fd = os.open(image, os.O_RDWR)
    for _ in range(300):
        length = rng.choice((1, 511, 512, 4095, 4096, 4097, 65536, 1 << 20))
        offset = rng.randrange(SIZE - length + 1)
        if rng.random() < 0.7:
            data = rng.randbytes(length)
            assert os.pwrite(fd, data, offset) == length
            model[offset : offset + length] = data
        else:
            assert os.pread(fd, length, offset) == model[offset : offset + length]
        if rng.random() < 0.02:
            os.fsync(fd)
    assert os.pread(fd, SIZE, 0) == bytes(model)
    os.close(fd)


@pytest.mark.parametrize("size", [512, 4096, 1 << 20])
def test_direct_io(image: Path, size: int) -> None:
    fd = os.open(image, os.O_RDWR | os.O_DIRECT)
    with mmap.mmap(-1, size) as buffer:
        for number in (3, 1):
            buffer[:] = bytes([number]) * size
            assert os.pwrite(fd, buffer, number * size) == size
        buffer[:] = bytes(size)
        assert os.preadv(fd, [buffer], 3 * size) == size
        assert buffer[:] == b"\3" * size
    os.close(fd)


def test_reads_end_at_the_end(image: Path) -> None:
    fd = os.open(image, os.O_RDONLY)
    assert os.pread(fd, 100, SIZE - 10) == bytes(10)
    assert os.pread(fd, 100, SIZE) == b""
    assert os.pread(fd, 100, SIZE + 4096) == b""
    os.close(fd)


def test_a_write_beyond_the_end_grows(image: Path) -> None:
    fd = os.open(image, os.O_RDWR)
    os.pwrite(fd, b"x" * 5000, SIZE - 10)
    assert os.fstat(fd).st_size == SIZE + 4990
    os.pwrite(fd, b"y", SIZE + 100_000)
    assert os.fstat(fd).st_size == SIZE + 100_001
    assert os.pread(fd, 5000, SIZE - 10) == b"x" * 5000
    assert os.pread(fd, 10, SIZE + 99_991) == bytes(9) + b"y"
    os.close(fd)


def test_shrunk_and_grown_again_shows_zeros(image: Path) -> None:
    fd = os.open(image, os.O_RDWR)
    os.pwrite(fd, b"x" * 20_000, 0)
    os.fsync(fd)
    os.ftruncate(fd, 5000)
    assert os.fstat(fd).st_size == 5000
    os.ftruncate(fd, SIZE)
    assert os.pread(fd, 20_000, 0) == b"x" * 5000 + bytes(15_000)
    os.close(fd)


def test_open_with_o_trunc_empties(image: Path) -> None:
    image.write_bytes(b"abc")
    assert image.stat().st_size == 3
    os.close(os.open(image, os.O_RDWR | os.O_TRUNC))
    assert image.stat().st_size == 0


def test_a_synchronous_write_survives_the_death_of_all(mount: Mount) -> None:
    """Holder and daemon killed together: what is left is the disk, as after a power cut."""
    image = mount.create("vm1", SIZE)
    for page, (flag, flags) in enumerate([(os.O_SYNC, 0), (os.O_DSYNC, 0), (0, os.RWF_SYNC), (0, os.RWF_DSYNC)]):
        fd = os.open(image, os.O_RDWR | flag)
        os.pwritev(fd, [bytes([65 + page]) * 4096], page * 4096, flags)
        os.close(fd)
    mount.destroy()
    mount.start()
    assert image.read_bytes()[: 5 * 4096 : 4096] == b"ABCD\0"


def test_direct_writes_inside_a_file_do_not_wait_for_each_other(mount: Mount, tmp_path: Path) -> None:
    """While nobody serves, all of them are in the kernel's queue for the daemon."""
    image = mount.create("vm1", SIZE)
    control = tmp_path / "fusectl"
    control.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "fusectl", control], check=True)
    fd = os.open(image, os.O_RDWR | os.O_DIRECT)
    page = mmap.mmap(-1, 4096)
    writers = [threading.Thread(target=os.pwrite, args=(fd, page, at * 4096)) for at in range(3)]
    daemon = mount.status()["daemon_pid"]
    try:
        queued = control / str(os.minor(image.stat().st_dev)) / "waiting"
        wait(lambda: int(queued.read_text()) == 0, "nothing is asked")
        os.kill(daemon, signal.SIGSTOP)
        for writer in writers:
            writer.start()
        wait(lambda: int(queued.read_text()) == len(writers), "all writes are queued")
    finally:
        os.kill(daemon, signal.SIGCONT)
        subprocess.run(["umount", control], check=True)
    for writer in writers:
        writer.join(20)
    os.close(fd)


def test_blocks_count_what_is_still_buffered(image: Path) -> None:
    fd = os.open(image, os.O_RDWR)
    os.pwrite(fd, b"x" * 40960, 4096)
    assert os.fstat(fd).st_blocks == 80
    os.fsync(fd)
    assert os.fstat(fd).st_blocks == 80
    os.ftruncate(fd, 8192)
    assert os.fstat(fd).st_blocks == 8
    os.close(fd)


def test_owner_mode_and_time_are_kept(image: Path) -> None:
    os.chmod(image, 0o640)
    os.chown(image, 12, 34)
    os.utime(image, ns=(5, 1_700_000_000_123_456_789))
    about = image.stat()
    assert (stat.S_IMODE(about.st_mode), about.st_uid, about.st_gid) == (0o640, 12, 34)
    assert about.st_mtime_ns == 1_700_000_000_123_456_789


def test_rename(shared: Mount, image: Path) -> None:
    image.write_bytes(b"content")
    fd = os.open(image, os.O_RDWR)
    new = shared.image("renamed")
    os.rename(image, new)
    assert not image.exists()
    assert os.pread(fd, 7, 0) == b"content"
    os.close(fd)
    assert new.read_bytes() == b"content"


def test_rename_never_replaces_a_volume(shared: Mount, image: Path) -> None:
    other = shared.create("precious", 4096)
    fails(errno.EEXIST, os.rename, image, other)
    fails(errno.EPERM, os.rename, image, shared.path / "noimage")
    fails(errno.EPERM, os.rename, image, shared.path / ".snapshots" / "x.img")
    assert image.exists() and other.exists()


def test_what_was_unlinked_is_gone(image: Path) -> None:
    os.unlink(image)
    assert not image.exists()
    fails(errno.ENOENT, os.unlink, image)


def test_create_is_exclusive_when_asked(image: Path) -> None:
    fails(errno.EEXIST, os.open, image, os.O_CREAT | os.O_EXCL | os.O_RDWR)
    os.close(os.open(image, os.O_CREAT | os.O_RDWR))
    assert image.stat().st_size == SIZE


@pytest.mark.parametrize("name", ["plain", "x.img.img", ".hidden.img", "-rf.img", "a b.img", "ü.img", "v@s.img"])
def test_only_name_img_can_be_made(shared: Mount, name: str) -> None:
    fails(errno.EPERM, os.open, shared.path / name, os.O_CREAT | os.O_RDWR)


def test_nothing_but_files_can_be_made(shared: Mount, image: Path) -> None:
    fails(errno.EPERM, os.mkdir, shared.path / "d")
    fails(errno.EPERM, os.symlink, "x", shared.path / "l.img")
    fails(errno.EPERM, os.link, image, shared.path / "l.img")
    fails(errno.EPERM, os.mknod, shared.path / "n.img", stat.S_IFIFO)
    fails(errno.EPERM, os.rmdir, shared.path / ".snapshots")


def test_extended_attributes_are_not_supported(image: Path) -> None:
    fails(errno.ENOTSUP, os.setxattr, image, "trusted.libvirt.x", b"1")
    fails(errno.ENOTSUP, os.getxattr, image, "user.x")
    fails(errno.ENOTSUP, os.listxattr, image)


def test_statfs_tells_what_can_be_written(shared: Mount) -> None:
    ours, below = os.statvfs(shared.path), os.statvfs(shared.store)
    held = shared.ask("status")["space"]["held_bytes"]  # is taken from the file system already
    assert 0 < ours.f_bavail * ours.f_frsize < below.f_bavail * below.f_frsize + held
    assert ours.f_namemax == 132


def test_snapshots_are_shown_read_only(shared: Mount, image: Path) -> None:
    snapshots = shared.path / ".snapshots"
    image.write_bytes(b"before")
    shared.silofs("snapshot", f"{image.stem}@one")
    image.write_bytes(b"after!")
    taken = snapshots / f"{image.stem}@one.img"
    assert os.listdir(snapshots) == [taken.name]
    assert taken.read_bytes() == b"before"
    assert stat.S_IMODE(taken.stat().st_mode) == 0o400
    fails(errno.EROFS, os.open, taken, os.O_RDWR)
    fails(errno.EROFS, os.truncate, taken, 0)
    fails(errno.EROFS, os.unlink, taken)
    fails(errno.EROFS, os.rename, taken, shared.image("taken"))
    fails(errno.EBUSY, os.unlink, image)  # which would take the snapshot along
    shared.silofs("rm", f"{image.stem}@one", "--yes")
    assert os.listdir(snapshots) == []
    os.unlink(image)


def test_a_resize_is_seen_at_once(shared: Mount, image: Path) -> None:
    fd = os.open(image, os.O_RDWR)
    shared.silofs("resize", image.stem, "16M")
    assert os.fstat(fd).st_size == 16 << 20
    os.pwrite(fd, b"x", (16 << 20) - 1)
    os.close(fd)


def test_a_listing_survives_changes(shared: Mount) -> None:
    names = {f"many{number}.img" for number in range(120)}
    for name in names:
        os.close(os.open(shared.path / name, os.O_CREAT | os.O_RDWR))
    listing = os.scandir(shared.path)
    seen = {next(listing).name for _ in range(50)}
    gone = sorted(names - seen)[0]
    os.unlink(shared.path / gone)
    rest = [entry.name for entry in listing]
    assert len(rest) == len(set(rest)) and not seen & set(rest)
    assert names - {gone} <= seen | set(rest)
    for name in names - {gone}:
        os.unlink(shared.path / name)


def test_the_root_can_be_synced(shared: Mount) -> None:
    fd = os.open(shared.path, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)


def test_files_can_be_mapped_shared(image: Path, shared: Mount) -> None:
    """They have no page cache otherwise, so the kernel has to be told that it may (docs/mount.md)."""
    fd = os.open(image, os.O_RDWR)
    if "mmap" in shared.ask("status")["capabilities"]:
        with mmap.mmap(fd, 8192) as mapped:
            os.pwrite(fd, b"written", 4096)
            assert mapped[4096:4103] == b"written"
            mapped[:6] = b"mapped"
            assert os.pread(fd, 6, 0) == b"mapped"  # even before msync(2)
            mapped.flush()
    else:
        fails(errno.ENODEV, mmap.mmap, fd, 4096)
    os.close(fd)


def test_the_daemon_does_not_touch_its_own_mount(shared: Mount) -> None:
    about = shared.status()
    for pid in (about["holder_pid"], about["daemon_pid"]):
        assert not [link for link in open_files(pid).values() if link.startswith(str(shared.path))]
        assert not os.readlink(f"/proc/{pid}/cwd").startswith(str(shared.path))


def test_memory_pressure_takes_the_daemon_first(shared: Mount) -> None:
    about = shared.status()
    allowed = subprocess.run(["sh", "-c", "echo -900 > /proc/self/oom_score_adj"], stderr=subprocess.DEVNULL)
    if allowed.returncode:
        pytest.skip("this machine lets nobody lower oom_score_adj")
    assert Path(f"/proc/{about['holder_pid']}/oom_score_adj").read_text() == "-900\n"
    assert Path(f"/proc/{about['daemon_pid']}/oom_score_adj").read_text() == "0\n"


def test_a_bug_in_a_handler_costs_one_request(tmp_path: Path) -> None:
    with Mount(tmp_path, env={"SILOFS_FAIL": "mount.statfs:raise"}) as mount:
        image = mount.create("vm1", 4096)
        pid = mount.status()["daemon_pid"]
        fails(errno.EIO, os.statvfs, mount.path)
        assert os.statvfs(mount.path).f_bavail
        image.write_bytes(b"alive")
        assert mount.status()["daemon_pid"] == pid
        assert mount.ask("status")["handler_bugs"] == 1
        assert "FailpointReached" in mount.log()
