"""The choice of one option for every item that has the least total loss within a budget of bytes.

A multiple-choice knapsack. Its Lagrangian relaxation is solved by the convex hulls of the items, walked from the
smallest options in order of the loss saved a byte (Shoham and Gersho 1988; CVXQ, arXiv 2309.02068, allots the bits of
language models by the same slopes). The walk gives a good choice, and a bound from below on what can follow any
partial one, under which all choices are then searched (dynamic programming over the undominated partial choices).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Partial choices that are kept, at most. Those of the lowest bound stay, so a choice beyond it is still a good one.
_KEPT = 4096

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Item:
    """Undominated options by growing size. `hull`: positions of those on the lower convex hull."""

    options: Integers  # as numbered by the caller
    sizes: Integers
    losses: Floats
    hull: list[int]


def choose(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int] | None:
    """For every item the number of its option; None if even the smallest are larger than `budget` together.

    `sizes`, `losses`: of every option of every item, losses at least 0.
    """
    items = [_item(s, x) for s, x in zip(sizes, losses, strict=True)]
    if sum(int(item.sizes[0]) for item in items) > budget:
        return None
    best, best_loss = _walk(items, budget)
    searched = _search(items, budget, best_loss)
    chosen = best if searched is None else searched
    return [int(item.options[at]) for item, at in zip(items, chosen, strict=True)]


def _item(sizes: Sequence[int], losses: Sequence[float]) -> _Item:
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], losses[i]))
    kept: list[int] = []
    for i in order:
        if not kept or losses[i] < losses[kept[-1]]:
            kept.append(i)
    s, x = np.array([sizes[i] for i in kept], np.int64), np.array([losses[i] for i in kept], np.float64)
    hull: list[int] = []
    for at in range(len(kept)):
        while len(hull) > 1 and _slope(s, x, hull[-2], hull[-1]) <= _slope(s, x, hull[-1], at):
            hull.pop()
        hull.append(at)
    return _Item(np.array(kept, np.int64), s, x, hull)


def _slope(sizes: Integers, losses: Floats, one: int, other: int) -> float:
    """Loss saved a byte."""
    return float((losses[one] - losses[other]) / (sizes[other] - sizes[one]))


def _steps(items: Sequence[_Item]) -> list[tuple[float, int, int, int]]:
    """All steps along hulls, the best first: (minus loss saved a byte, item, from, to)."""
    return sorted(
        (-_slope(item.sizes, item.losses, a, b), i, a, b)
        for i, item in enumerate(items)
        for a, b in zip(item.hull[:-1], item.hull[1:], strict=True)
    )


def _walk(items: Sequence[_Item], budget: int) -> tuple[list[int], float]:
    """Steps taken in order; one that doesn't fit ends its item's climb, and the others go on filling up."""
    at, left = [0] * len(items), budget - sum(int(item.sizes[0]) for item in items)
    for _, i, a, b in _steps(items):
        cost = int(items[i].sizes[b] - items[i].sizes[a])
        if at[i] == a and cost <= left:
            at[i], left = b, left - cost
    return at, sum(float(item.losses[k]) for item, k in zip(items, at, strict=True))


def _search(items: Sequence[_Item], budget: int, incumbent: float) -> list[int] | None:
    """A choice better than one of loss `incumbent`, the best there is unless `_KEPT` was reached; None without one."""
    order = sorted(range(len(items)), key=lambda i: -int(items[i].sizes[-1] - items[i].sizes[0]))
    smallest = np.array([items[i].sizes[0] for i in order], np.int64)
    largest_loss = np.array([items[i].losses[0] for i in order])
    rest_size = np.append(np.cumsum(smallest[::-1])[::-1], 0)
    rest_loss = np.append(np.cumsum(largest_loss[::-1])[::-1], 0.0)
    steps = _steps(items)
    place = {item: n for n, item in enumerate(order)}
    of = np.array([place[i] for _, i, _, _ in steps], np.int64)
    cost = np.array([items[i].sizes[b] - items[i].sizes[a] for _, i, a, b in steps], np.float64)
    gain = np.array([items[i].losses[a] - items[i].losses[b] for _, i, a, b in steps], np.float64)
    used, loss = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[Integers, Integers]] = []
    limit = incumbent * (1 - 1e-12)
    for n, i in enumerate(order):
        options = len(items[i].sizes)
        new_used = (used[:, None] + items[i].sizes).ravel()
        new_loss = (loss[:, None] + items[i].losses).ravel()
        later = of > n
        room = np.append(0.0, np.cumsum(cost[later]))
        saved = np.append(0.0, np.cumsum(gain[later]))
        left = budget - new_used - rest_size[n + 1]
        bound = new_loss + rest_loss[n + 1] - np.interp(left, room, saved)
        alive = np.flatnonzero((left >= 0) & (bound < limit))
        if len(alive) > _KEPT:
            alive = alive[np.argpartition(bound[alive], _KEPT)[:_KEPT]]
        alive = alive[np.lexsort((new_loss[alive], new_used[alive]))]
        if not len(alive):
            return None
        lowest = np.minimum.accumulate(new_loss[alive])
        alive = alive[np.append(True, lowest[1:] < lowest[:-1])]
        used, loss = new_used[alive], new_loss[alive]
        trail.append((alive // options, alive % options))
    at, found = int(np.argmin(loss)), [0] * len(items)
    for i, (parents, chosen) in zip(reversed(order), reversed(trail), strict=True):
        found[i] = int(chosen[at])
        at = int(parents[at])
    return found
