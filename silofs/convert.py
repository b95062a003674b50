"""Images of other formats, through qemu-img: a raw image comes out of them, or is turned into one of them.

What a file is, is decided by its first bytes and by what the caller claims, and both have to agree: a file that is
called `.qcow2` and is none is refused, not imported as raw. Backing, data and extent files are followed only when the
caller says so, since an image names them by path and would otherwise have any file of this host read into a volume.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from silofs.errors import BadImage, StoreFull, Unsupported, UserError

Progress = Callable[[dict[str, Any]], None]

_MAGIC = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"conectix", "vpc"),
    (0, b"SILOSTRM", "stream"),
)
_UNREAD = (
    (b"QED\0", "qed"),
    (b"WithoutFreeSpace", "parallels"),
    (b"WithouFreSpacExt", "parallels"),
)  # taken for raw they would be disks that nothing boots from
_SUFFIXES = {".qcow2": "qcow2", ".vmdk": "vmdk", ".vdi": "vdi", ".vhdx": "vhdx"}
_PERCENT = re.compile(rb"\(([0-9]+(?:\.[0-9]+)?)/100%\)")


def identify(path: Path, claimed: str | None) -> str:
    """The format of an image file. Raises BadImage if it is not what it is claimed or called to be."""
    with open(path, "rb") as file:
        head = file.read(4096)
    found = next((kind for at, magic, kind in _MAGIC if head[at : at + len(magic)] == magic), "raw")
    if claimed == "raw":
        return "raw"
    unread = [kind for magic, kind in _UNREAD if head.startswith(magic)]
    if unread:
        way = "qemu-img convert -O qcow2 makes one that is; --format raw imports its bytes as they are"
        raise BadImage(f"{path} is a {unread[0]} image, which is not read here", hint=way)
    wanted = claimed or _SUFFIXES.get(path.suffix.lower())
    if wanted is not None and wanted != found and wanted != "vpc":
        what = f"looks like {found}" if found != "raw" else "has no header of one"
        hint = f"--format {found} imports it as that, if it is that" if claimed is None or found != "raw" else None
        raise BadImage(f"{path} is no {wanted} image: it {what}", hint=hint)
    return wanted or found


def check_raw(claimed: str | None) -> None:
    """Only raw images come through stdin: the others have to be read out of order. Raises Unsupported."""
    if claimed not in (None, "raw"):
        raise Unsupported(f"{claimed} cannot be read from stdin", hint="write it to a file first, or send it as raw")


@contextlib.contextmanager
def raw(
    path: Path, scratch: Path, *, claimed: str | None = None, follow_backing: bool = False, progress: Progress
) -> Iterator[int]:
    """A descriptor of the image's content as a raw image: the file itself, or an unnamed sparse copy in `scratch`.

    Raises BadImage, and OSError for a file that cannot be opened. Nothing is left behind, even after SIGKILL.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise UserError(f"{path} is neither a file nor a block device", hint="name an image file, or - for stdin")
    kind = identify(path, claimed)
    if kind == "raw":
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)
        return
    size = _validate(path, kind, follow_backing=follow_backing)
    with _unnamed(scratch) as fd:
        os.ftruncate(fd, size)
        target = f"/proc/self/fd/{fd}"
        options = ["-n", "--target-is-zero", "-p", "-f", kind, "-O", "raw", str(path.resolve()), target]
        _convert(options, size, progress, fds=(fd,))
        yield fd


def to_format(source: Path, target: Path, kind: str, *, progress: Progress) -> None:
    """Turn the raw image `source` into one of another format at `target`, which is overwritten."""
    size = source.stat().st_size
    _convert(["-p", "-f", "raw", "-O", kind, str(source.resolve()), str(target.resolve())], size, progress)


def _validate(path: Path, kind: str, *, follow_backing: bool) -> int:
    """The virtual size in bytes of a sound image. Raises BadImage."""
    shown = _qemu_img("info", "--output=json", "-f", kind, str(path.resolve()))
    if shown.returncode:
        raise BadImage(f"{path} cannot be read as {kind}: {_reason(shown.stderr)}")
    try:
        info = json.loads(shown.stdout)
        size = int(info["virtual-size"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadImage(f"{path} cannot be read as {kind}: qemu-img says nothing about it") from error
    other = _other_file(path, info)
    if other and not follow_backing:
        hint = "--follow-backing reads it as well, if you trust the image; or make the image whole with qemu-img"
        raise BadImage(f"{path} is not whole: it needs {other}", hint=hint)
    checked = _qemu_img("check", "-q", "-f", kind, str(path.resolve()))
    # 0 sound, 3 leaked clusters only, 63 the format has no check (qemu-img(1)).
    if checked.returncode not in (0, 3, 63):
        raise BadImage(f"{path} is damaged: {_reason(checked.stderr or checked.stdout)}")
    if not other:
        _check_length(path, kind)
    return size


def _other_file(path: Path, info: dict[str, Any]) -> str | None:
    """A file besides itself that an image takes its content from."""
    data = (info.get("format-specific") or {}).get("data") or {}
    extents = [extent.get("filename") for extent in data.get("extents") or ()]
    named = [info.get("backing-filename"), data.get("data-file"), *extents]
    return next((str(name) for name in named if name and name != str(path.resolve())), None)


def _check_length(path: Path, kind: str) -> None:
    """BadImage if the image's map leads beyond the end of its file, where qemu-img would read zeros.

    `qemu-img check` does not look for that in every format, and lets a part of a qcow2 cluster pass. The map comes
    line by line, since that of a large fragmented image does not fit into memory as a whole.
    """
    end = 0
    command = [_program(), "map", "--output=json", "-f", kind, str(path.resolve())]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        assert run.stdout is not None
        for line in run.stdout:
            found = json.loads(line.strip().strip(b"[],") or b"{}")
            if found.get("data") and "offset" in found:
                end = max(end, found["offset"] + found["length"])
    size = path.stat().st_size
    if path.is_file() and run.returncode == 0 and end > size:
        raise BadImage(f"{path} is cut short: it has {size} bytes, and its data go on to {end}")


def _convert(options: list[str], size: int, progress: Progress, *, fds: tuple[int, ...] = ()) -> None:
    """Run `qemu-img convert`, reporting its percentage. It is ended when this call is."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [_program(), "convert", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=fds,
        )
        try:
            assert process.stdout is not None
            with process.stdout as output:
                while part := os.read(output.fileno(), 4096):
                    if found := _PERCENT.findall(part):
                        done = int(size * float(found[-1]) / 100)
                        progress({"stage": "converting", "bytes_done": done, "bytes_total": size})
            code = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if code:
            errors.seek(0)
            reason = _reason(errors.read())
            if "No space left" in reason:
                raise StoreFull(f"no room for the converted image: {reason}")
            raise BadImage(f"qemu-img could not convert it: {reason}")


@contextlib.contextmanager
def _unnamed(directory: Path) -> Iterator[int]:
    """A descriptor of a file without a name, in `directory` where its file system can do that."""
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        with tempfile.TemporaryFile() as file:
            yield file.fileno()
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _qemu_img(*args: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([_program(), *args], stdin=subprocess.DEVNULL, capture_output=True, check=False)


def _program() -> str:
    found = shutil.which("qemu-img")
    if found is None:
        raise Unsupported("qemu-img is not installed", hint="install it (Debian: qemu-utils), or use a raw image")
    return found


def _reason(text: bytes) -> str:
    """The last line of what qemu-img said, without its name."""
    lines = [line for line in text.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("qemu-img: ").strip() if lines else "it gave no reason"
