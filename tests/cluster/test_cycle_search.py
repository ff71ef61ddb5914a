"""Reference cycles are not looked for while engines generate, and found in the end."""

import gc
import weakref

import pytest

from rlpost.cluster.cycle_search import FULL_EVERY, CycleSearch


class Node:
    pass


def a_cycle():
    node = Node()
    node.self = node
    return weakref.ref(node)


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_looked_for_while_it_is_held_back():
    search = CycleSearch()
    with search.held_back():
        assert not gc.isenabled()
        left = a_cycle()
        many = [[n] for n in range(100_000)]  # would set off a search of the young
        assert left() is not None
    assert gc.isenabled() and len(many) == 100_000


def test_what_was_made_meanwhile_is_looked_at_every_so_many_turns():
    search = CycleSearch()
    left = []
    for turn in range(1, 2 * FULL_EVERY + 1):
        with search.held_back():
            left.append(a_cycle())
        gc.collect()
        alive = sum(one() is not None for one in left)
        assert alive == turn % FULL_EVERY, "frozen until the full search, and gone with it"


def test_an_error_in_it_leaves_the_search_switched_on():
    with pytest.raises(ValueError), CycleSearch().held_back():
        raise ValueError
    assert gc.isenabled()
