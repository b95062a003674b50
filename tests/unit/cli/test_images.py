"""Import and export: formats, sparseness, what is refused, and that a failure leaves nothing behind."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from silofs import images, packing, raw_out
from silofs.cli.client import connect
from silofs.errors import Interrupted, StoreBroken
from silofs.layers.pack import Packed
from silofs.layers.store import Store
from silofs.layers.transaction import WriteTxn
from tests.unit.cli.commands import PAGE, Done, Silofs, daemon, image

SIZE = 16 << 20
PAGES = (0, 1, 2, 511, 512, 600, 4095)


def qemu_img(*args: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, args)], check=True, capture_output=True)


def nothing_left(silofs: Silofs, *volumes: str) -> None:
    """The store holds these volumes, and not a layer more than they need."""
    listed = silofs.ok("ls")["volumes"]
    assert [volume["name"] for volume in listed] == list(volumes)
    with Store.open(silofs.store) as store, store.reader() as txn:
        shown = {layer.id for volume in txn.volumes() for layer in txn.chain(volume.head)}
        assert {layer.id for layer in txn.layers()} == shown
    assert not [path for path in silofs.store.iterdir() if path.name not in ("data", "lock", "identity")]


def test_raw_there_and_back(either: Silofs, tmp_path: Path) -> None:
    source = image(tmp_path / "i", SIZE, *PAGES)
    made = either.ok("import", source, "vm1")
    assert (made["schema"], made["type"]) == ("silofs.import/1", "result")
    assert (made["virtual_size"], made["allocated"], made["role"]) == (SIZE, len(PAGES) * PAGE, "owner")
    out = tmp_path / "o"
    written = either.ok("export", "vm1", out)
    assert (written["schema"], written["type"], written["size"]) == ("silofs.export/1", "result", SIZE)
    assert written["bytes_written"] == len(PAGES) * PAGE
    assert out.read_bytes() == source.read_bytes()
    assert out.stat().st_blocks <= source.stat().st_blocks + 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i", "o", "store"]


def test_a_snapshot_is_exported_as_it_was(either: Silofs, tmp_path: Path) -> None:
    source = image(tmp_path / "i", SIZE, 5)
    either.ok("import", source, "vm1")
    either.ok("snapshot", "vm1@a")
    either.ok("resize", "vm1", "4096", "--yes")
    either.ok("export", "vm1@a", tmp_path / "o")
    assert (tmp_path / "o").read_bytes() == source.read_bytes()
    either.ok("export", "vm1", tmp_path / "now")
    assert (tmp_path / "now").read_bytes() == bytes(4096)


@pytest.mark.parametrize("size", [4096, 5000, 4097, 1 << 20, (1 << 20) + 512, 100, 512])
def test_sizes_that_are_no_whole_pages(silofs: Silofs, tmp_path: Path, size: int) -> None:
    source = tmp_path / "i"
    source.write_bytes(os.urandom(size))
    made = silofs.ok("import", source, "vm1")
    wanted = max(4096, -(-size // 512) * 512)
    assert made["virtual_size"] == wanted
    silofs.ok("export", "vm1", tmp_path / "o")
    assert (tmp_path / "o").read_bytes() == source.read_bytes().ljust(wanted, b"\0")


def test_a_volume_larger_than_its_image(either: Silofs, tmp_path: Path) -> None:
    source = image(tmp_path / "i", SIZE, 1)
    assert either.ok("import", source, "vm1", "--size", "40G")["virtual_size"] == 40 << 30
    assert either.fails(2, "import", source, "vm2", "--size", "8M")["code"] == "bad_size"
    assert [volume["name"] for volume in either.ok("ls")["volumes"]] == ["vm1"]


def test_zeros_are_not_stored_and_holes_not_read(silofs: Silofs, tmp_path: Path) -> None:
    source = tmp_path / "i"
    source.write_bytes(bytes(1 << 20) + b"x" * PAGE + bytes(1 << 20))
    assert silofs.ok("import", source, "vm1")["allocated"] == PAGE
    huge = image(tmp_path / "huge", 1 << 40, 0, 1 << 27)
    made = silofs.ok("import", huge, "vm2")
    assert (made["virtual_size"], made["allocated"]) == (1 << 40, 2 * PAGE)
    assert made["bytes_read"] < 1 << 20
    assert silofs.ok("export", "vm2", tmp_path / "o")["bytes_written"] == 2 * PAGE


@pytest.mark.parametrize("how", ["pipe", "file"])
def test_raw_from_stdin(either: Silofs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    source = image(tmp_path / "i", SIZE, *PAGES)
    if how == "pipe":
        with subprocess.Popen(["cat", source], stdout=subprocess.PIPE) as cat:
            monkeypatch.setattr(sys, "stdin", cat.stdout)
            either.ok("import", "-", "vm1")
    else:
        with open(source) as file:
            monkeypatch.setattr(sys, "stdin", file)
            either.ok("import", "-", "vm1")
    either.ok("export", "vm1", tmp_path / "o")
    assert (tmp_path / "o").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("kind", ["qcow2", "vmdk", "vdi", "vhdx"])
def test_formats_that_qemu_img_reads(silofs: Silofs, tmp_path: Path, kind: str) -> None:
    source = image(tmp_path / "i", SIZE, *PAGES)
    converted = tmp_path / "converted"  # found by its content
    qemu_img("convert", "-O", kind, source, converted)
    made = silofs.ok("import", converted, "vm1")
    assert (made["virtual_size"], made["allocated"]) == (SIZE, len(PAGES) * PAGE)
    silofs.ok("export", "vm1", tmp_path / "o")
    assert (tmp_path / "o").read_bytes() == source.read_bytes()
    nothing_left(silofs, "vm1")


def test_export_to_qcow2(either: Silofs, tmp_path: Path) -> None:
    source = image(tmp_path / "i", SIZE, *PAGES)
    either.ok("import", source, "vm1")
    out = tmp_path / "o.qcow2"
    assert either.ok("export", "vm1", out, "--format", "qcow2")["format"] == "qcow2"
    qemu_img("compare", "-f", "raw", "-F", "qcow2", source, out)
    qemu_img("check", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i", "o.qcow2", "store"]


# What is refused


def refused(silofs: Silofs, *args: str | Path, code: int = 2) -> str:
    error = silofs.fails(code, "import", *args)
    nothing_left(silofs)
    return str(error["code"])


def test_a_file_that_is_no_image_of_the_format(silofs: Silofs, tmp_path: Path) -> None:
    text = tmp_path / "disk.qcow2"
    text.write_text("this is no image\n" * 500)
    assert refused(silofs, text, "vm1") == "bad_image"
    plain = image(tmp_path / "disk", SIZE, 1)
    for claimed in ("qcow2", "vmdk", "vdi", "vhdx"):
        assert refused(silofs, plain, "vm1", "--format", claimed) == "bad_image"
    assert silofs.ok("import", text, "vm1", "--format", "raw")["virtual_size"] == -(-17 * 500 // 512) * 512


@pytest.mark.parametrize(
    ("kind", "front"), [("qed", b"QED\0"), ("parallels", b"WithoutFreeSpace"), ("parallels", b"WithouFreSpacExt")]
)
def test_a_format_that_is_known_and_not_read(silofs: Silofs, tmp_path: Path, kind: str, front: bytes) -> None:
    path = tmp_path / "i"
    path.write_bytes(front.ljust(1 << 20, b"x"))
    error = silofs.fails(2, "import", path, "vm1")
    assert (error["code"], kind in error["message"]) == ("bad_image", True)
    silofs.ok("import", path, "vm1", "--format", "raw")


def test_a_corrupt_qcow2(silofs: Silofs, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("convert", "-O", "qcow2", image(tmp_path / "i", SIZE, *PAGES), path)
    sound = path.read_bytes()
    path.write_bytes(b"QFI\xfb" + os.urandom(5000))
    assert refused(silofs, path, "vm1") == "bad_image"
    path.write_bytes(sound[: len(sound) // 2])
    assert refused(silofs, path, "vm1") == "bad_image"
    at = 3 * 65536  # the L1 table: an entry that leads beyond the end
    path.write_bytes(sound[:at] + b"\x80\x00\x00\x7f\xff\xff\x00\x00" + sound[at + 8 :])
    assert refused(silofs, path, "vm1") == "bad_image"


def test_a_backing_file_is_not_followed_unless_asked(silofs: Silofs, tmp_path: Path) -> None:
    secret = image(tmp_path / "secret", SIZE, 1, 2)
    overlay = tmp_path / "overlay.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", secret, "-F", "raw", overlay)
    assert refused(silofs, overlay, "vm1") == "bad_image"
    assert silofs.ok("import", overlay, "vm1", "--follow-backing")["allocated"] == 2 * PAGE


def test_a_vmdk_whose_content_is_another_file(silofs: Silofs, tmp_path: Path) -> None:
    """A descriptor is text that names files, and anybody can write one that names any file of this host."""
    image(tmp_path / "secret", 1 << 20, 1, 2)
    named = tmp_path / "named.vmdk"
    named.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=ffffffff\nparentCID=ffffffff\n"
        f'createType="monolithicFlat"\n\nRW 2048 FLAT "{tmp_path / "secret"}" 0\n'
    )
    assert refused(silofs, named, "vm1") == "bad_image"
    assert silofs.ok("import", named, "vm1", "--follow-backing")["allocated"] >= 2 * PAGE


@pytest.mark.parametrize("kind", ["qcow2", "vmdk", "vdi", "vhdx", "vpc"])
def test_an_image_that_lacks_its_end(silofs: Silofs, tmp_path: Path, kind: str) -> None:
    """qemu-img reads what is missing as zeros, and for some formats its check finds nothing wrong with that."""
    source = image(tmp_path / "i", SIZE, *PAGES)
    whole, cut = tmp_path / f"whole.{kind}", tmp_path / f"cut.{kind}"
    qemu_img("convert", "-f", "raw", "-O", kind, source, whole)
    silofs.ok("import", whole, "whole", "--format", kind)
    cut.write_bytes(whole.read_bytes()[:-2000])
    assert silofs.fails(2, "import", cut, "vm1", "--format", kind)["code"] == "bad_image"
    nothing_left(silofs, "whole")


def test_a_compressed_image_is_whole(silofs: Silofs, tmp_path: Path) -> None:
    source = image(tmp_path / "i", SIZE, *PAGES)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-c", source, tmp_path / "i.qcow2")
    qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", source, tmp_path / "i.vmdk")
    for kind in ("qcow2", "vmdk"):
        silofs.ok("import", tmp_path / f"i.{kind}", kind)
        silofs.ok("export", kind, tmp_path / f"{kind}.out")
        assert (tmp_path / f"{kind}.out").read_bytes() == source.read_bytes()


def test_files_that_cannot_be_images(silofs: Silofs, tmp_path: Path) -> None:
    assert refused(silofs, tmp_path / "nothing", "vm1", code=10) == "not_found"
    assert refused(silofs, tmp_path, "vm1") == "invalid"
    assert refused(silofs, "/dev/null", "vm1") == "invalid"
    (tmp_path / "empty").touch()
    assert refused(silofs, tmp_path / "empty", "vm1") == "bad_image"


def test_a_closed_stdin(silofs: Silofs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # so Python has it when a script runs `silofs import - vm1 <&-`
    assert silofs.fails(2, "import", "-", "vm1")["code"] == "invalid"


def test_stdin_is_raw(silofs: Silofs) -> None:
    assert silofs.fails(2, "import", "-", "vm1", "--format", "qcow2")["code"] == "unsupported"


def test_without_qemu_img(silofs: Silofs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", path, "1M")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused(silofs, path, "vm1") == "unsupported"
    silofs.ok("import", image(tmp_path / "i", SIZE, 1), "vm1")
    assert silofs.fails(2, "export", "vm1", tmp_path / "o", "--format", "qcow2")["code"] == "unsupported"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.qcow2", "i", "store"]


def test_export_does_not_overwrite_unasked(either: Silofs, tmp_path: Path) -> None:
    either.ok("create", "vm1", "--size", "1M")
    out = tmp_path / "o"
    out.write_text("precious")
    assert "--yes" in either.fails(11, "export", "vm1", out)["hint"]
    assert out.read_text() == "precious"
    either.fails(10, "export", "nosuch", out, "--force")
    assert out.read_text() == "precious"
    either.ok("export", "vm1", out, "--force")
    assert out.read_bytes() == bytes(1 << 20)
    assert either.fails(11, "export", "vm1", tmp_path, "--force")["code"] == "exists"
    either.fails(10, "export", "vm1", tmp_path / "no" / "where")


# What a failure leaves


class Full(Exception):
    pass


@pytest.mark.parametrize("kind", ["raw", "stream"])
def test_an_export_to_a_place_that_is_not_there(silofs: Silofs, tmp_path: Path, kind: str) -> None:
    silofs.ok("create", "vm1", "--size", "1M")
    silofs.ok("snapshot", "vm1@s")
    file = tmp_path / "none" / "out"
    done = silofs("export", "vm1@s", file, "--format", kind)
    assert (done.code, done.err.splitlines()[0]) == (10, f"silofs: {file}: No such file or directory")


def test_an_import_that_fails_half_way(silofs: Silofs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = image(tmp_path / "i", SIZE, *range(0, 4096, 3))
    defaults = images.load.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "batch_bytes", 1 << 20)
    monkeypatch.setattr(images, "READ_BYTES", 1 << 19)
    sound, calls = WriteTxn.put_blocks, []

    def put(*args: Any) -> Packed:
        calls.append(args)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return sound(*args)

    monkeypatch.setattr(WriteTxn, "put_blocks", put)
    done = silofs("import", source, "vm1", "--json")
    assert (done.code, done.json["code"]) == (1, "store_full")
    nothing_left(silofs)


def test_what_a_failed_import_has_stored_is_gone_when_it_returns(
    silofs: Silofs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody serves the store, so nobody else would remove it, and the next import might not find room."""
    source = image(tmp_path / "i", SIZE, *range(0, 4096, 8))

    def fail(*_: object) -> None:
        raise Interrupted("at the very end")

    with monkeypatch.context() as patched:
        patched.setattr("silofs.verbs.adopt", fail)
        assert silofs("import", source, "vm1").code == 130
    with Store.open(silofs.store) as store, store.reader() as txn:
        assert txn.layers() == []


def test_what_ended_an_import_is_said_although_its_space_cannot_be_given_back(
    silofs: Silofs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise Interrupted("at the very end")

    def broken(*_: object) -> None:
        raise StoreBroken("the disk has had enough")

    monkeypatch.setattr("silofs.verbs.adopt", fail)
    monkeypatch.setattr("silofs.offline.drain", broken)
    done = silofs("import", image(tmp_path / "i", SIZE, 5), "vm1")
    assert (done.code, done.err.splitlines()[0]) == (130, "silofs: at the very end")


def test_an_import_that_is_stopped(silofs: Silofs, tmp_path: Path) -> None:
    with Store.open(silofs.store) as store, open(image(tmp_path / "i", SIZE, 1, 4000)) as file:
        with pytest.raises(Interrupted):
            images.load(store, file.fileno(), None, progress=lambda _: None, cancelled=lambda: True)
        with store.reader() as txn:
            assert txn.layers() == []


def test_an_import_whose_command_goes_away(silofs: Silofs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = image(tmp_path / "i", SIZE, *range(0, 4096, 3))
    monkeypatch.setattr(packing, "SHARED_BATCH_BYTES", 1 << 18)
    monkeypatch.setattr(images, "READ_BYTES", 1 << 18)
    sound, begun = WriteTxn.put_blocks, threading.Event()

    def put(*args: Any) -> Packed:
        begun.set()
        time.sleep(0.2)  # all of it takes longer than a busy machine needs to notice that the command is gone
        return sound(*args)

    monkeypatch.setattr(WriteTxn, "put_blocks", put)
    with daemon(silofs.store):
        sock = connect(silofs.store)
        assert sock is not None
        with sock, open(source) as file:
            line = b'{"verb": "import", "args": {"name": "vm1"}}\n'
            socket.send_fds(sock, [line], [file.fileno()])
            assert begun.wait(10)
            assert silofs.ok("check")["layers"] == 1
        deadline = time.monotonic() + 60
        while silofs.ok("check")["layers"]:
            assert time.monotonic() < deadline
    nothing_left(silofs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_export_that_is_ended_by_a_signal(silofs: Silofs, tmp_path: Path, number: int) -> None:
    import select

    silofs.ok("import", image(tmp_path / "i", 256 << 20, *range(0, 65536, 5)), "vm1")
    command = [sys.executable, "-m", "silofs.cli.main", "export", "vm1", str(tmp_path / "o"), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 20)[0]  # the first progress line
        process.send_signal(number)
        last = process.stdout.read().splitlines()[-1]
    assert process.returncode in (0, 130), last
    if process.returncode:
        assert b'"interrupted"' in last
        assert sorted(path.name for path in tmp_path.iterdir()) == ["i", "store"]


def test_what_a_killed_import_left_goes_with_the_next_one(silofs: Silofs, tmp_path: Path) -> None:
    source = image(tmp_path / "i", SIZE, *PAGES)
    with Store.open(silofs.store) as store, open(source) as file:
        images.load(store, file.fileno(), None, progress=lambda _: None)
    silofs.ok("import", source, "vm1")
    nothing_left(silofs, "vm1")


def test_control_c(silofs: Silofs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    silofs.ok("create", "vm1", "--size", "1M")
    monkeypatch.setattr(images, "_fill", interrupt)
    done = silofs("import", image(tmp_path / "i", SIZE, 1), "vm2")
    assert done.code == 130
    assert "run it again" in done.err
    monkeypatch.setattr(raw_out, "write", interrupt)
    done = silofs("export", "vm1", tmp_path / "o", "--json")
    assert (done.code, done.json["code"]) == (130, "interrupted")
    monkeypatch.undo()
    monkeypatch.setenv("SILOFS_STORE", str(silofs.store))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i", "store"]
    nothing_left(silofs, "vm1")


def test_progress_on_a_terminal_only(silofs: Silofs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    source = image(tmp_path / "i", SIZE, *PAGES)

    def shown(name: str, *flags: str) -> str:
        stderr = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stderr)
            done: Done = silofs("import", source, name, *flags)
        assert done.code == 0
        return stderr.getvalue()

    assert "\r" in shown("vm1")
    assert "\r" not in shown("vm2", "--no-progress")
    assert shown("vm3", "-q") == ""
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\r" not in shown("vm4")
    assert "\r" not in silofs("import", source, "vm5").err


# Stores that cannot be used


def test_a_store_that_is_cut_short(silofs: Silofs, tmp_path: Path) -> None:
    silofs.ok("import", image(tmp_path / "i", SIZE, *PAGES), "vm1")
    data = silofs.store / "data" / "data.mdb"
    os.truncate(data, data.stat().st_size // 2)
    before = data.read_bytes()
    assert silofs.fails(1, "ls")["code"] == "bad_format"
    assert data.read_bytes() == before


def test_a_store_of_another_version(silofs: Silofs, monkeypatch: pytest.MonkeyPatch) -> None:
    from silofs.layers import schema

    monkeypatch.setattr(schema, "FORMAT_VERSION", schema.FORMAT_VERSION - 1)
    error = silofs.fails(1, "ls")
    assert error["code"] == "bad_format"
    assert "newer" in error["hint"]


def test_a_directory_that_is_no_store(silofs: Silofs, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert silofs.fails(10, "ls", "--store", tmp_path / "full")["code"] == "no_store"
    assert silofs.fails(10, "ls", "--store", tmp_path / "full" / "file")["code"] == "no_store"


def test_a_second_daemon(silofs: Silofs, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    with Store.open(silofs.store):
        assert silofs.fails(11, "mount", tmp_path / "mnt")["code"] == "store_locked"
