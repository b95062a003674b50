"""What `silofs doctor` looks at: the kernel, the tools and the store's file system, and what it costs where one lacks.

A check is a dict of name, status (ok, warning, failed), message and hint. `failed` means that a mount cannot work.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from silofs import limits
from silofs.cli.sizes import show_size
from silofs.layers.filesystem import NETWORK, free_bytes, holds_space, kind_of
from silofs.mount import extension

Finding = dict[str, str]

JOURNAL_ID: Final = 16  # hex digits: the name of a journal that is neither being made nor retired


def examine(store: Path) -> list[Finding]:
    return [*_kernel(), *_fuse(), *_tools(), *_extension(), *_store(store)]


def verdict(findings: Sequence[Finding]) -> str:
    """The worst status of all."""
    found = {finding["status"] for finding in findings}
    return next(status for status in ("failed", "warning", "ok") if status in found)


def text(findings: Sequence[Finding]) -> str:
    lines = []
    for finding in findings:
        lines.append(f"{finding['status']:8}{finding['message']}")
        if finding["hint"] and finding["status"] != "ok":
            lines.append(f"{'':8}  {finding['hint']}")
    return "\n".join(lines)


def _say(name: str, status: str, message: str, hint: str = "") -> Finding:
    return {"name": name, "status": status, "message": message, "hint": hint}


def _kernel() -> Iterator[Finding]:
    release = platform.release()
    found = re.match(r"(\d+)\.(\d+)", release)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version >= (6, 9):
        yield _say("kernel", "ok", f"Linux {release}")
    else:
        costs = "requests in flight when the daemon dies get an error instead of a pause"
        yield _say("kernel", "warning", f"Linux {release}: {costs}", "use Linux 6.9 or later")


def _fuse() -> Iterator[Finding]:
    device = Path("/dev/fuse")
    if not device.exists():
        yield _say("dev_fuse", "failed", "/dev/fuse is missing: nothing can be mounted", "modprobe fuse")
    elif not os.access(device, os.R_OK | os.W_OK):
        yield _say(
            "dev_fuse", "failed", "/dev/fuse cannot be opened by this user", "mount as root, or let this user in"
        )
    else:
        yield _say("dev_fuse", "ok", "/dev/fuse can be opened")
    if importlib.util.find_spec("pyfuse3") is None:
        yield _say("pyfuse3", "failed", "pyfuse3 is not installed: nothing can be mounted", "pip install pyfuse3")
    helper = shutil.which("fusermount3")
    if helper:
        yield _say("fusermount3", "ok", f"fusermount3 is {helper}")
    elif os.geteuid() != 0:
        yield _say("fusermount3", "failed", "fusermount3 is missing: only root can mount", "install fuse3")
    else:
        yield _say("fusermount3", "ok", "fusermount3 is missing; root mounts without it")


def _tools() -> Iterator[Finding]:
    found = shutil.which("qemu-img")
    if found:
        yield _say("qemu_img", "ok", f"qemu-img is {found}")
    else:
        costs = "qemu-img is missing: only raw images can be imported and exported"
        yield _say("qemu_img", "warning", costs, "install it (Debian: qemu-utils)")


def _extension() -> Iterator[Finding]:
    if extension.available:
        yield _say("extension", "ok", "the C extension is built")
        return
    switched_off = os.environ.get(extension.SWITCH) == "off"
    lacking = "the C extension is switched off" if switched_off else "there is no C extension"
    costs = (
        f"{lacking}: a guest's discard frees nothing, holes cannot be seen, locks stay in the kernel, "
        "and writes with RWF_DSYNC are not made durable at once"
    )
    hint = "install gcc and the headers of libfuse (Debian: libfuse3-dev), and then silofs again; mount anew"
    if switched_off:
        hint = f"unset {extension.SWITCH}, and mount anew"
    yield _say("extension", "warning", costs, hint)


def _store(store: Path) -> Iterator[Finding]:
    place = store
    while not place.exists() and place != place.parent:
        place = place.parent
    if place == store:
        mode = stat.S_IMODE(store.stat().st_mode)
        if mode & 0o077:
            shown = f"{store} can be entered by other users (mode {mode:o})"
            yield _say("store_mode", "warning", shown, f"chmod 700 {store}")
        else:
            yield _say("store_mode", "ok", f"the store is {store}")
    else:
        yield _say("store_mode", "ok", f"there is no store in {store} yet")
    kind = kind_of(place)
    if kind in NETWORK:
        yield _say(
            "file_system", "failed", f"{kind} is a network file system: the store cannot be on it", "use a local disk"
        )
    elif kind in ("tmpfs", "ramfs"):
        yield _say("file_system", "warning", f"the store is on {kind}: a power cut takes all of it", "use a local disk")
    else:
        yield _say("file_system", "ok", f"the store is on {kind or 'an unknown file system'}")
    yield from _held(place, kind)
    yield from _journal(store, place)
    space = os.statvfs(place)
    free = space.f_bavail * space.f_frsize
    if free < 4 * limits.SPACE_FLOOR_BYTES:
        hint = "make room: writes stop with ENOSPC before the last of it is used"
        yield _say("free_space", "warning", f"only {show_size(free)} free for the store", hint)
    else:
        yield _say("free_space", "ok", f"{show_size(free)} free")


def _held(place: Path, kind: str) -> Iterator[Finding]:
    """Whether fallocate keeps room for acknowledged writes; tried where this user can."""
    try:
        holds = holds_space(place)
    except OSError as error:
        yield _say("held_space", "warning", f"nobody could try whether space can be held in {place}: {error.strerror}")
        return
    if holds:
        yield _say("held_space", "ok", "the space of acknowledged writes can be held")
    else:
        costs = f"{kind or 'this disk'} holds no space: an acknowledged write may find the disk full at its commit"
        yield _say("held_space", "warning", costs, "use ext4 or xfs, or keep the disk from filling up")


def _journal(store: Path, place: Path) -> Iterator[Finding]:
    """Whether fsyncs have their journal, or what it will take to make one."""
    if any(len(path.name) == JOURNAL_ID for path in store.glob("journal/*")):
        yield _say("journal", "ok", "there is a journal for fsyncs")
    elif free_bytes(place) > limits.LOG_BYTES + limits.SPACE_FLOOR_BYTES:
        yield _say("journal", "ok", "there is no journal yet: a mount makes one")
    else:
        costs = "there is no journal, and no room for one: every fsync is a commit of the store"
        yield _say("journal", "warning", costs, f"make {show_size(limits.LOG_BYTES)} of room")
