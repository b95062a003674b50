"""What people type for sizes, bandwidths, durations and names. Pure.

`20G` and `20GiB` are 20 * 2^30, `20GB` is 20 * 10^9 (docs/cli.md). A fraction is allowed where it comes out as a whole
number of bytes. Nothing is rounded silently.
"""

from __future__ import annotations

import re

from silofs.errors import BadName, BadSize, UserError
from silofs.names import check_name, check_size

_SIZE = re.compile(r"([0-9]{1,24})(?:\.([0-9]{1,12}))?\s*(?:([KMGTP])(I?B)?|(B))?", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,9}))?\s*(ms|s|m|h|d)?", re.ASCII)
_POWER = {"k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_MILLISECONDS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def parse_bytes(text: str) -> int:
    """A number of bytes. Raises BadSize."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise BadSize(f"{text!r} is no size")
    whole, part, prefix, unit, _ = found.groups()
    base = 1000 if unit is not None and unit.lower() == "b" else 1024
    factor: int = base ** _POWER[prefix.lower()] if prefix else 1
    parts: int = 10 ** len(part or "")
    value, rest = divmod(int(whole + (part or "")) * factor, parts)
    if rest:
        raise BadSize(f"{text!r} is not a whole number of bytes")
    return value


def parse_size(text: str) -> int:
    """The size of a volume in bytes. Raises BadSize."""
    return check_size(parse_bytes(text), shown=text)


def parse_bandwidth(text: str) -> int:
    """Bytes per second; a trailing `/s` is allowed. Raises BadSize."""
    try:
        rate = parse_bytes(text.strip().removesuffix("/s"))
    except BadSize:
        rate = 0
    if rate < 1:
        raise BadSize(f"{text!r} is no bandwidth", hint="bytes per second, at least 1: for example 200M")
    return rate


def parse_duration(text: str) -> float:
    """Seconds, from `90`, `90s`, `5m`, `1h`, `2d` or `500ms`. Raises UserError."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise UserError(f"{text!r} is no duration", hint="for example 30s, 5m, 1h or 2d")
    whole, part, unit = found.groups()
    milliseconds: int = int(whole + (part or "")) * _MILLISECONDS[unit or "s"]
    return milliseconds / 10.0 ** (3 + len(part or ""))


def parse_volume(text: str) -> str:
    """NAME, where a snapshot makes no sense. Raises BadName."""
    if "@" in text:
        raise BadName(f"{text!r} names a snapshot where a volume is wanted", hint="leave out the part after the @")
    return check_name(text)


def parse_target(text: str) -> tuple[str, str | None]:
    """(volume, snapshot or None) of NAME[@SNAP]. Raises BadName."""
    volume, at, snapshot = text.partition("@")
    return check_name(volume), check_name(snapshot) if at else None


def parse_snapshot(text: str) -> tuple[str, str]:
    """(volume, snapshot) of NAME@SNAP. Raises BadName."""
    volume, snapshot = parse_target(text)
    if snapshot is None:
        raise BadName(f"{text!r} names no snapshot", hint="write NAME@SNAP, for example vm1@daily")
    return volume, snapshot


def show_size(size: int) -> str:
    """For people: `20.0 GiB`, `512 B`."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} PiB"
