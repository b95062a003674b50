"""The caches are bounded, keep what is used, and never keep what was overtaken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silofs.cache.flight import Flights
from silofs.cache.lru import LRU


def test_what_is_used_stays_and_the_rest_goes() -> None:
    cache: LRU[int, str] = LRU(10)
    cache.put(0, "kept")
    for key in range(1, 100):
        cache.put(key, "x")
        assert cache.get(0) == "kept"
        assert len(cache) <= 10
    assert cache.get(1) is None
    assert cache.get(99) == "x"


@given(st.integers(2, 12), st.lists(st.tuples(st.sampled_from("gpdr"), st.integers(0, 20))))
def test_a_hit_is_the_last_value_put(bound: int, operations: list[tuple[str, int]]) -> None:
    cache: LRU[int, int] = LRU(bound)
    last: dict[int, int] = {}
    young = cache.young
    for at, (operation, key) in enumerate(operations):
        if operation == "p":
            cache.put(key, at)
            last[key] = at
            assert cache.get(key) == at or bound < 4
        elif operation == "d":
            cache.drop(key)
            last.pop(key, None)
        elif operation == "r":
            cache.drop_range(key, key + 5)
            last = {k: v for k, v in last.items() if not key <= k < key + 5}
        else:
            found = cache.get(key)
            assert found is None or found == last[key]
        assert cache.young is young
        assert len(cache) <= bound


def test_ageing_twice_forgets_what_is_not_used() -> None:
    cache: LRU[int, int] = LRU(100)
    cache.put(1, 1)
    cache.put(2, 2)
    cache.age()
    assert cache.get(1) == 1
    cache.age()
    assert 1 in cache
    assert 2 not in cache
    assert list(cache) == [1]
    cache.clear()
    assert len(cache) == 0
    with pytest.raises(ValueError, match="bound"):
        LRU(1)


def test_one_leads_and_the_others_follow() -> None:
    flights: Flights[str, list[int]] = Flights(list)
    first, leads = flights.join("a")
    again, follows = flights.join("a")
    other, _ = flights.join("b")
    assert leads
    assert not follows
    assert again is first
    assert other is not first
    flights.land("a", first)
    assert flights.join("a")[1]
    assert flights.statistics() == {"up": 2, "started": 3, "joined": 1}


def test_who_comes_after_a_change_does_not_join_what_began_before_it() -> None:
    flights: Flights[str, list[int]] = Flights(list)
    old, _ = flights.join("a")
    flights.spoil("a")
    new, leads = flights.join("a")
    assert old.stale
    assert leads
    assert not new.stale
    flights.land("a", old)  # the old one's landing must not take the new one down
    assert flights.join("a") == (new, False)
    flights.spoil_all()
    assert new.stale
    assert not flights
