"""Every operation once on a daemon whose C extension was built with the address and undefined behaviour sanitizers."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from pathlib import Path

import pytest

from silofs.mount import extension
from tests.fuse.calls import KEEP_SIZE, PUNCH_HOLE, extents, fallocate
from tests.fuse.mounts import Mount
from tests.fuse.test_files import fails
from tests.fuse.test_locks import UNLOCK, WAIT, WRITE, lock

pytestmark = pytest.mark.fuse
SANITIZERS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a daemon that uses such a build: any finding ends it."""
    library = tmp_path_factory.mktemp("sanitized") / "dispatch.so"
    source = extension.LIBRARY.with_suffix(".c")
    subprocess.run(["gcc", *SANITIZERS, "-shared", "-fPIC", "-o", library, source, "-lfuse3", "-ldl"], check=True)
    runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], stdout=subprocess.PIPE, text=True, check=True)
    return {
        "SILOFS_EXTENSION": str(library),
        "LD_PRELOAD": str(Path(runtime.stdout.strip()).resolve()),
        "ASAN_OPTIONS": "detect_leaks=0",  # CPython leaves much behind at its end
    }


def test_no_operation_makes_a_sanitizer_speak(tmp_path: Path, sanitized: dict[str, str]) -> None:
    with Mount(tmp_path, env=sanitized) as mount:
        assert "locks" in mount.ask("status")["capabilities"]
        maps = Path(f"/proc/{mount.status()['daemon_pid']}/maps").read_text()
        assert "libasan" in maps and sanitized["SILOFS_EXTENSION"] in maps
        path = mount.create("vm1", 4 << 20)
        one, two = os.open(path, os.O_RDWR), os.open(path, os.O_RDWR)
        os.pwritev(one, [b"x" * (1 << 20)], 0, os.RWF_DSYNC)
        os.pwrite(one, b"y" * 5, 77)
        assert os.pread(two, 5, 77) == b"y" * 5
        fallocate(one, PUNCH_HOLE | KEEP_SIZE, 8192, 100_000)
        fails(errno.EOPNOTSUPP, fallocate, one, 8, 0, 4096)
        assert len(extents(two)) == 2
        os.copy_file_range(one, two, 65536, 0, 2 << 20)
        lock(one, WRITE, 0, 0)
        fails(errno.EAGAIN, lock, two, WRITE, 5, 1)
        waiter = threading.Thread(target=lock, args=(two, WRITE, 5, 1, WAIT))
        waiter.start()
        lock(one, UNLOCK, 0, 0)
        waiter.join(10)
        assert not waiter.is_alive()
        assert os.listdir(mount.path)  # noqa: PTH208 - a directory's OPEN is answered by libfuse
        mount.silofs("restart")
        assert os.pread(two, 65536, 2 << 20) == os.pread(one, 65536, 0)
        os.close(one)
        os.close(two)
        about = mount.ask("status")
        assert about["restarts"] == 1 and about["handler_bugs"] == 0
    assert "Sanitizer" not in mount.log() and "runtime error" not in mount.log()
