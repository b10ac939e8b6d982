"""Results made in threads before they are asked for."""

import threading
import weakref
from contextlib import closing
from functools import partial

import pytest

from athena_gguf.ahead import ahead


class Thing:
    pass


def test_results_come_in_order():
    waits = [threading.Event() for _ in range(4)]

    def make(at):
        waits[at].wait(10)
        if at:
            waits[at - 1].set()  # the later ones are through first
        return at

    waits[3].set()
    assert list(ahead([(1, partial(make, at)) for at in range(4)], 4, 100)) == [0, 1, 2, 3]
    assert list(ahead([], 4, 100)) == []


def test_no_more_than_the_bound_is_held():
    """Six of 4 bytes within 10: two at a time, the one in use included; one larger than that goes alone."""
    held, most, lock = 0, 0, threading.Lock()

    def make(size):
        nonlocal held, most
        with lock:
            held += size
            most = max(most, held)
        return size

    for size in ahead([(size, partial(make, size)) for size in (4, 4, 4, 4, 4, 4)], 8, 10):
        with lock:
            held -= size
    assert most == 8
    assert list(ahead([(size, partial(make, size)) for size in (99, 1)], 8, 10)) == [99, 1]


def test_nothing_is_kept():
    things = [Thing() for _ in range(5)]
    known = [weakref.ref(thing) for thing in things]
    tasks = [(1, partial(lambda thing: thing, thing)) for thing in things]
    results = ahead(tasks, 1, 1)
    del things, tasks
    for at, _ in enumerate(results):
        assert [ref() is not None for ref in known[:at]] == [False] * at
    del _
    assert not any(ref() for ref in known)


def test_an_error_comes_in_its_place_and_ends_it():
    made = []

    def fail():
        raise KeyError("broken")

    results = ahead([(1, lambda: made.append(0)), (1, fail), (1, lambda: made.append(2))], 1, 1)
    next(results)
    with pytest.raises(KeyError, match="broken"):
        next(results)
    assert made == [0] and list(results) == []


def test_closed_early():
    started = []
    with closing(ahead([(1, partial(started.append, at)) for at in range(100)], 1, 3)) as results:
        next(results)
    assert len(started) <= 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
