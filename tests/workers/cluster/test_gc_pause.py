"""Reference cycles are not looked for while rollouts are generated, and found between them."""

import gc
import weakref

import pytest

from rlpost.workers.cluster import gc_pause as cycle_search
from rlpost.workers.cluster.gc_pause import SHARE, CycleSearch


class Node:
    pass


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def a_cycle():
    node = Node()
    node.self = node
    return weakref.ref(node)


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    gc.unfreeze()
    gc.enable()


@pytest.fixture
def clock(monkeypatch):
    """A search takes two seconds."""
    clock = Clock()
    ticks = iter(range(0, 10_000, 2))
    monkeypatch.setattr(cycle_search.time, "perf_counter", lambda: float(next(ticks)))
    return clock


def test_nothing_is_looked_for_while_it_is_held_back(clock):
    with CycleSearch(clock).held_back():
        assert not gc.isenabled()
        left = a_cycle()
        many = [[n] for n in range(100_000)]  # would set off a search of the young
        assert left() is not None
    assert gc.isenabled() and len(many) == 100_000


def test_everything_is_looked_at_first_and_then_for_its_share_of_the_time(clock):
    search = CycleSearch(clock)
    with search.held_back():
        left = a_cycle()
    assert left() is None, "how long a search takes is known from the first turn"
    for clock.now_s in (0.5, 0.9 * 2.0 / SHARE):
        with search.held_back():
            left = a_cycle()
        gc.collect()
        assert left() is not None, "frozen"
    clock.now_s = 2.0 / SHARE
    with search.held_back():
        pass
    assert left() is None


def test_a_search_of_another_life_of_the_run_finds_what_an_earlier_one_left(clock):
    first = CycleSearch(clock)
    for _ in range(2):
        with first.held_back():
            left = a_cycle()
    assert left() is not None
    with CycleSearch(clock).held_back():
        pass
    assert left() is None


def test_an_error_in_it_freezes_nothing_and_leaves_the_search_as_it_was(clock):
    for was_enabled in (True, False):
        (gc.enable if was_enabled else gc.disable)()
        with pytest.raises(ValueError), CycleSearch(clock).held_back():
            left = a_cycle()
            raise ValueError
        assert gc.isenabled() == was_enabled
        gc.collect()
        assert left() is None
