"""Default deny, patterns and directions."""

from __future__ import annotations

import pytest

from silofs.errors import BadName, NotAuthorised, UserError
from silofs.peers.authorise import Direction, allows, require, rule


def test_without_a_rule_everything_is_refused():
    for direction in Direction:
        assert not allows([], "vm1", direction)
        with pytest.raises(NotAuthorised):
            require([], "hostA", "vm1", direction)


def test_a_rule_holds_for_its_direction_and_names_only():
    rules = [rule("vm-*", "in"), rule("golden", "read")]
    assert allows(rules, "vm-7", Direction.IN)
    assert not allows(rules, "vm-7", Direction.OUT)
    assert not allows(rules, "vm7", Direction.IN)
    assert allows(rules, "golden", Direction.READ)
    assert not allows(rules, "Golden", Direction.READ)
    require(rules, "hostA", "vm-7", Direction.IN)


@pytest.mark.parametrize("pattern", ["", "../x", "a/b", "a\0b", "x" * 129, "a b", "ä"])
def test_what_no_volume_can_be_called_is_no_pattern(pattern):
    with pytest.raises(BadName):
        rule(pattern, "in")


def test_a_direction_is_one_of_three():
    with pytest.raises(UserError):
        rule("*", "sideways")
