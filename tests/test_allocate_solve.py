"""The allocation against every possible choice, and against bounds where there are too many of them."""

import itertools

import numpy as np
import pytest

from athena_gguf.allocate.solve import choose


def cases(seed, items, options):
    rng = np.random.default_rng(seed)
    sizes = [np.sort(rng.choice(np.arange(1, 60), options, replace=False)).tolist() for _ in range(items)]
    # Loss falls about as 4^-bits, with some options dominated by smaller ones.
    losses = [
        (rng.lognormal(0, 2) * np.exp(-0.1 * np.array(s)) * rng.lognormal(0, 0.3, options)).tolist() for s in sizes
    ]
    return sizes, losses


@pytest.mark.parametrize("seed", range(40))
def test_small_cases_are_solved_as_by_trying_everything(seed):
    sizes, losses = cases(seed, items=5, options=4)
    every = [
        (sum(s[k] for s, k in zip(sizes, pick, strict=True)), sum(x[k] for x, k in zip(losses, pick, strict=True)))
        for pick in itertools.product(range(4), repeat=5)
    ]
    smallest, largest = min(s for s, _ in every), max(s for s, _ in every)
    assert choose(sizes, losses, smallest - 1) is None
    for budget in np.linspace(smallest, largest, 12).astype(int):
        pick = choose(sizes, losses, int(budget))
        assert sum(s[k] for s, k in zip(sizes, pick, strict=True)) <= budget
        found = sum(x[k] for x, k in zip(losses, pick, strict=True))
        assert found == pytest.approx(min(x for s, x in every if s <= budget), rel=1e-9)


def test_many_items_come_within_a_hair_of_the_relaxed_bound():
    """By Lagrange: for any price of a byte, the sum of every item's least loss plus price is below any choice."""
    sizes, losses = cases(7, items=300, options=8)
    smallest, largest = sum(map(min, sizes)), sum(map(max, sizes))
    for share in (0.1, 0.35, 0.7):
        budget = int(smallest + share * (largest - smallest))
        pick = choose(sizes, losses, budget)
        assert sum(s[k] for s, k in zip(sizes, pick, strict=True)) <= budget
        found = sum(x[k] for x, k in zip(losses, pick, strict=True))
        bound = max(
            sum(min(x + price * s for s, x in zip(*item, strict=True)) for item in zip(sizes, losses, strict=True))
            - price * budget
            for price in np.geomspace(1e-6, 10, 400)
        )
        assert bound <= found * (1 + 1e-12) and found < 1.002 * bound


def test_equal_items_and_losses_of_zero():
    assert choose([[1, 2]] * 3, [[0.0, 0.0]] * 3, 6) == [0, 0, 0]
    assert sorted(choose([[1, 2]] * 3, [[1.0, 0.0]] * 3, 5)) == [0, 1, 1]
    assert choose([[4], [4]], [[1.0], [2.0]], 8) == [0, 0]
    assert choose([[4], [4]], [[1.0], [2.0]], 7) is None
