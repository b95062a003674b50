"""The one test of a volume's name and of its size. Pure; the command line, the control socket and peers pass it.

A name is data and never a path: `../x`, a NUL, 300 characters, letters outside ASCII and `-rf` are all refused here.
"""

from __future__ import annotations

from silofs import limits
from silofs.errors import BadName, BadSize


def check_name(name: str) -> str:
    """`name` if a volume, snapshot or peer may have it. Raises BadName."""
    if limits.NAME.fullmatch(name) is None:
        raise BadName(f"{_shown(name)} is no name for a volume or snapshot")
    if name.endswith(limits.IMAGE_SUFFIX):
        hint = f"leave {limits.IMAGE_SUFFIX} out: the mount adds it to the name of the file"
        raise BadName(f"{_shown(name)} is no name for a volume or snapshot", hint=hint)
    return name


def check_size(size: int, *, shown: str | None = None) -> int:
    """`size` in bytes if a volume may be made with it: a multiple of 512, 4096 bytes to 1 PiB. Raises BadSize."""
    text = f"{size} bytes" if shown is None else repr(shown)
    if size % limits.SECTOR:
        raise BadSize(f"{text} is not a multiple of {limits.SECTOR} bytes")
    if size < limits.SIZE_MIN:
        raise BadSize(f"{text} is smaller than {limits.SIZE_MIN} bytes")
    if size > limits.SIZE_MAX:
        raise BadSize(f"{text} is larger than {limits.SIZE_MAX >> 50} PiB")
    return size


def _shown(name: str) -> str:
    return repr(name if len(name) <= 140 else name[:137] + "...")
