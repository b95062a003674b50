"""Images and streams through the shipped command, mounts on both sides; daemons die at every step of a stream."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Mount, until
from tests.smallfs import small

pytestmark = pytest.mark.fuse

MIB = 1 << 20
SILOFS = Path(sys.executable).parent / "silofs"


def noise(seed: int, mib: int) -> bytes:
    return random.Random(seed).randbytes(mib * MIB)


def put(mount: Mount, volume: str, data: bytes, offset: int = 0) -> None:
    fd = os.open(mount.image(volume), os.O_RDWR)
    try:
        os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    with Mount(tmp_path / "a") as mounted:
        mounted.silofs("create", "vm1", "--size", "96M")
        put(mounted, "vm1", noise(1, 16), 5 * MIB)
        mounted.silofs("snapshot", "vm1@mon")
        yield mounted


def compare(one: Path, other: Path) -> None:
    done = subprocess.run(
        ["qemu-img", "compare", "-f", kind(one), "-F", kind(other), one, other],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done


def kind(path: Path) -> str:
    """What qemu-img is told of a file: by its suffix, which these tests give truly."""
    return {".qcow2": "qcow2", ".vmdk": "vmdk", ".vdi": "vdi", ".vhdx": "vhdx"}.get(path.suffix, "raw")


def pipe(sender: Mount, export: list[str], receiver: Mount, load: list[str]) -> dict[str, object]:
    """`silofs export … - | silofs import … -`, as over ssh; the result of the import."""
    with subprocess.Popen([SILOFS, "export", *export], env=sender.environment, stdout=subprocess.PIPE) as sending:
        done = subprocess.run(
            [SILOFS, "import", *load, "--json"],
            env=receiver.environment,
            stdin=sending.stdout,
            capture_output=True,
            text=True,
            check=False,
        )
        assert sending.stdout is not None
        sending.stdout.close()
    assert (sending.returncode, done.returncode) == (0, 0), done
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_a_backup_kept_up_to_date_over_a_pipe(mount: Mount, tmp_path: Path) -> None:
    """Under a writer that never stops; each increment is of its own snapshot, whatever came after."""
    stop = threading.Event()

    def write() -> None:
        rng = random.Random(7)
        while not stop.is_set():
            put(mount, "vm1", rng.randbytes(8192), rng.randrange(48) * MIB)

    with Mount(tmp_path / "b") as backup:
        pipe(mount, ["vm1@mon", "-", "--format", "stream"], backup, ["-", "vm1", "--format", "stream"])
        writer = threading.Thread(target=write)
        writer.start()
        try:
            for before, now in (("mon", "tue"), ("tue", "wed"), ("wed", "thu")):
                mount.silofs("snapshot", f"vm1@{now}")
                got = pipe(mount, [f"vm1@{now}", "-", "--since", f"vm1@{before}"], backup, ["--onto", "vm1", "-"])
                mount.silofs("rm", f"vm1@{before}")
                assert got["bytes_stored"] < 8 * MIB  # type: ignore[operator]
                snapshot = mount.mountpoint / ".snapshots" / f"vm1@{now}.img"
                assert backup.image("vm1").read_bytes() == snapshot.read_bytes()
        finally:
            stop.set()
            writer.join()
        assert len(backup.silofs_json("info", "vm1")["snapshots"]) == 4
        assert backup.silofs_json("check", "--read-data")["damaged"] == 0
        put(backup, "vm1", b"written here")
        mount.silofs("snapshot", "vm1@fri")
        mount.silofs("export", "vm1@fri", str(tmp_path / "fri"), "--since", "vm1@thu")
        done = backup.run("import", "--onto", "vm1", str(tmp_path / "fri"))
        assert done.returncode == 11
        assert "silofs rollback vm1@thu --yes" in done.stderr
        with backup.image("vm1").open("rb"):
            assert "is open" in backup.run("import", "--onto", "vm1", str(tmp_path / "fri")).stderr
        backup.silofs("rollback", "vm1@thu", "--yes")
        backup.silofs("freeze", "vm1", "--owner", "nightly")
        assert "frozen by nightly" in backup.run("import", "--onto", "vm1", str(tmp_path / "fri")).stderr
        backup.silofs("thaw", "vm1")
        backup.silofs("import", "--onto", "vm1", str(tmp_path / "fri"))


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Streams `mon` and `tue`, and what a volume holds after each of them: `mon.raw`, `tue.raw`."""
    where = tmp_path_factory.mktemp("sent")
    store = str(where / "store")

    def silofs(*arguments: str) -> None:
        subprocess.run([SILOFS, "--store", store, *arguments, "-q"], check=True, stdout=subprocess.DEVNULL)

    silofs("init")
    for name, data in (("mon", noise(1, 8)), ("tue", noise(1, 4) + noise(2, 20))):
        with (where / f"{name}.raw").open("wb") as file:
            file.write(data)
            file.truncate(48 * MIB)
        silofs("import", str(where / f"{name}.raw"), name)
        silofs("snapshot", f"{name}@{name}")
    silofs("export", "mon@mon", str(where / "mon"), "--format", "stream")
    silofs("export", "tue@tue", str(where / "tue"), "--since", "mon@mon")
    return where


@pytest.mark.crash
@pytest.mark.parametrize(
    ("point", "keeps"),
    [
        ("stream.begun:kill", False),
        ("stream.after_batch:kill", True),
        ("stream.after_batch:kill@3", True),
        ("stream.before_publish:kill", True),
        ("stream.published:kill", True),
    ],
)
def test_an_increment_whose_import_dies(sent: Path, tmp_path: Path, point: str, keeps: bool) -> None:
    backup = Mount(tmp_path / "b")
    backup.silofs("init")
    backup.silofs("import", str(sent / "mon"), "vm1")
    backup.environment |= {"SILOFS_FAIL": point, "SILOFS_FAIL_DIR": str(tmp_path)}
    with backup:
        done = backup.run("import", "--onto", "vm1", str(sent / "tue"))
        assert done.returncode == 75, done
        assert "run it again" in done.stderr
        until(lambda: backup.run("status").returncode == 0, "a daemon serves")
        published = point.startswith("stream.published")
        assert backup.image("vm1").read_bytes() == (sent / ("tue.raw" if published else "mon.raw")).read_bytes()
        assert len(backup.silofs_json("info", "vm1")["snapshots"]) == 1 + published
        got = backup.silofs_json("import", "--onto", "vm1", str(sent / "tue"))
        assert (got["bytes_skipped"] > 0) == keeps
        # References are compared: the first 4 MiB are other blocks, or those of the first import, found by their hash.
        assert 20 * MIB <= got["bytes_stored"] + got["bytes_skipped"] <= 24 * MIB
        assert backup.image("vm1").read_bytes() == (sent / "tue.raw").read_bytes()
        assert backup.silofs_json("check", "--read-data")["damaged"] == 0


@pytest.mark.crash
def test_an_export_whose_daemon_dies(tmp_path: Path) -> None:
    environment = {"SILOFS_FAIL": "stream.after_frame:kill@20", "SILOFS_FAIL_DIR": str(tmp_path)}
    with Mount(tmp_path / "a", environment=environment) as mount:
        mount.silofs("create", "vm1", "--size", "96M")
        put(mount, "vm1", noise(1, 32), 5 * MIB)
        mount.silofs("snapshot", "vm1@mon")
        out = tmp_path / "mon"
        done = mount.run("export", "vm1@mon", str(out), "--format", "stream")
        assert done.returncode == 75
        assert "mon.part" in done.stderr
        assert not out.exists()
        until(lambda: mount.run("status").returncode == 0, "a daemon serves")
        again = mount.silofs_json("export", "vm1@mon", str(out), "--format", "stream")
        assert again["bytes_kept"] >= 20 * MIB
        assert not (tmp_path / "mon.part").exists()
        mount.silofs("import", str(out), "copy")
        assert mount.image("copy").read_bytes() == mount.image("vm1").read_bytes()


@pytest.mark.qemu
def test_every_direction_with_qemu_img(mount: Mount, tmp_path: Path) -> None:
    """raw and qcow2 out, every format in, and both by pipe, each compared with the file on the mount."""
    image = mount.image("vm1")
    for name in ("out.raw", "out.qcow2"):
        mount.silofs("export", "vm1", str(tmp_path / name), "--format", name.partition(".")[2])
        compare(tmp_path / name, image)
    assert (tmp_path / "out.raw").stat().st_blocks * 512 < 17 * MIB
    with (tmp_path / "stdout.raw").open("wb") as out:
        command = [SILOFS, "export", "vm1", "-"]
        subprocess.run(command, env=mount.environment, stdout=out, check=True)
    compare(tmp_path / "stdout.raw", image)
    assert (tmp_path / "stdout.raw").stat().st_blocks * 512 < 17 * MIB
    pipe(mount, ["vm1", "-"], mount, ["-", "piped"])
    compare(mount.image("piped"), image)
    for suffix in ("raw", "qcow2", "vmdk", "vdi", "vhdx"):
        source = tmp_path / f"in.{suffix}"
        convert = ["qemu-img", "convert", "-f", "raw", "-O", suffix, tmp_path / "out.raw", source]
        subprocess.run(convert, check=True)
        made = mount.silofs_json("import", str(source), f"from-{suffix}")
        compare(mount.image(f"from-{suffix}"), source)
        assert made["allocated"] == 16 * MIB
    holes = tmp_path / "sparse.raw"
    with holes.open("wb") as file:
        file.truncate(40 << 30)
        file.seek(39 << 30)
        file.write(b"far away")
    got = mount.silofs_json("import", str(holes), "sparse")
    assert (got["virtual_size"], got["allocated"]) == (40 << 30, 4096)
    assert got["bytes_read"] <= MIB


def test_a_terminal_gets_no_image(mount: Mount) -> None:
    master, slave = os.openpty()
    try:
        command = [SILOFS, "export", "vm1", "-"]
        done = subprocess.run(
            command, env=mount.environment, stdout=slave, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(master)
        os.close(slave)
    assert done.returncode == 2
    assert "stdout is a terminal" in done.stderr


def test_whoever_reads_may_leave(mount: Mount) -> None:
    """`silofs export vm1 - | head -c 1000`: one line, no traceback, and the daemon is none the worse."""
    command = [SILOFS, "export", "vm1@mon", "-", "--format", "stream"]
    with subprocess.Popen(
        command, env=mount.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as sending:
        assert sending.stdout is not None
        assert sending.stderr is not None
        os.read(sending.stdout.fileno(), 1000)
        sending.stdout.close()
        said = sending.stderr.read()
    assert sending.returncode == 2
    assert "has gone away" in said
    assert mount.status()["state"] == "serving"


def test_a_target_that_is_full(mount: Mount, tmp_path: Path) -> None:
    """What arrived before it was full is kept, and can be dropped; with room, the import goes on."""
    put(mount, "vm1", noise(3, 80))
    mount.silofs("snapshot", "vm1@tue")
    out = tmp_path / "tue"
    mount.silofs("export", "vm1@tue", str(out), "--format", "stream")
    with small("tmpfs", 188, tmp_path) as point, Mount(point) as backup:
        backup.silofs("create", "other", "--size", "1M")
        for _ in range(2):
            done = backup.run("import", str(out), "vm1", "--json")
            error = json.loads(done.stdout.splitlines()[-1])
            assert (done.returncode, error["code"]) == (1, "store_full")
        (kept,) = backup.silofs_json("du")["arriving"]
        assert kept["bytes"] > MIB
        put(backup, "other", b"others can still write")
        assert backup.silofs_json("import", "--abandon", "vm1")["bytes_dropped"] == kept["bytes"]
        assert backup.run("import", str(out), "vm1").returncode == 1
        subprocess.run(["mount", "-o", "remount,size=500m", point], check=True)
        got = backup.silofs_json("import", str(out), "vm1")
        assert got["bytes_skipped"] > MIB
        assert backup.image("vm1").read_bytes() == mount.image("vm1").read_bytes()
