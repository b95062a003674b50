"""What a paired peer may do. Pure. Paired is not permitted: without a rule every answer is no.

A rule is (pattern, direction). The pattern is a volume's name or a shell pattern over names (`*`, `vm-*`); directions
are seen from this host: `in`, the peer may bring such a volume here; `out`, such a volume may go to the peer; `read`,
the peer may read it while it stays here. A `silofs migrate` allows `out` by itself, for its volumes and its migration
only; a volume that comes home (RETURN, docs/protocol.md) needs no rule, since the record that it was ceded is one.

A refusal never says whether the volume exists: a peer that may not see a name learns nothing by asking for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from fnmatch import fnmatchcase

from silofs.errors import BadName, NotAuthorised, UserError
from silofs.limits import NAME

PATTERN_CHARS_MAX = 128
RULES_MAX = 256  # per peer
_PATTERN_EXTRA = frozenset("*?[]!")


class Direction(StrEnum):
    IN = "in"
    OUT = "out"
    READ = "read"


Rule = tuple[str, str]


def rule(pattern: str, direction: str) -> Rule:
    """A rule from the command line. BadName or UserError if it cannot be one."""
    try:
        way = Direction(direction)
    except ValueError:
        raise UserError(f"{direction!r} is no direction", hint="in, out or read, seen from this host") from None
    plain = "".join(char for char in pattern if char not in _PATTERN_EXTRA)
    if not 0 < len(pattern) <= PATTERN_CHARS_MAX or (plain and not NAME.fullmatch("a" + plain)):
        raise BadName(f"{pattern!r} is neither a volume's name nor a pattern over names")
    return pattern, way.value


def allows(rules: Iterable[Rule], name: str, direction: Direction) -> bool:
    """Whether one of the rules lets a volume called `name` pass in that direction."""
    return any(way == direction and fnmatchcase(name, pattern) for pattern, way in rules)


def require(rules: Iterable[Rule], peer: str, name: str, direction: Direction) -> None:
    """NotAuthorised unless a rule allows it. The message names what the peer asked for, nothing that is here."""
    if not allows(rules, name, direction):
        raise NotAuthorised(
            f"peer {peer} is not allowed {direction.value} for {name}",
            hint=f"silofs peer allow {peer} {name} {direction.value}",
        )
