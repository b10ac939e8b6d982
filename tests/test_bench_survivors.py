"""The search with several survivors a state: one is the encoder's, enough of them find the best path of all."""

import itertools

import bench_survivors
import numpy as np
import pytest
import torch

from athena_gguf.encode import EncodeOptions, Metric, encode_matrix, encode_rows
from athena_gguf.encode.lane import lane_search
from athena_gguf.format import TYPES, levels


def lane(rows, steps, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, steps)).astype(np.float32)
    factor = np.triu(rng.standard_normal((steps, steps)) * 0.5 + 2 * np.eye(steps)).astype(np.float32)
    scale = np.full((rows, steps), 0.04, np.float32)
    return x, factor, scale


def searched(search, x, factor, scale):
    symbols = np.empty(x.shape, np.uint8)
    values, errors, cost = np.empty_like(x), np.empty_like(x), np.empty(len(x), np.float32)
    search(x, factor, scale, symbols, values, errors, cost)
    return symbols, values, errors, cost


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
def test_one_survivor_is_the_encoders_search(kind):
    given = lane(50, 24)
    for one, other in zip(
        searched(bench_survivors.list_search(kind, 1), *given), searched(lane_search(kind), *given), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_enough_survivors_find_the_best_path():
    kind, steps = TYPES["A3"], 3
    x, factor, scale = lane(20, steps, seed=1)
    symbols, values, errors, cost = searched(bench_survivors.list_search(kind, 64), x, factor, scale)
    paths = np.array(list(itertools.product(range(8), repeat=steps)), np.uint8)
    rows = np.zeros((len(paths), 128), np.uint8)  # four steps
    rows[:, : 32 * steps : 32] = paths  # lane 0
    possible = levels(kind, rows)[:, : 32 * steps : 32].astype(np.float64)
    h = np.linalg.inv(factor.T.astype(np.float64) @ factor)
    for r in range(len(x)):
        e = x[r] - scale[r] * possible
        losses = ((e @ h) * e).sum(1)
        assert cost[r] == pytest.approx(losses.min(), rel=1e-3)
        np.testing.assert_array_equal(symbols[r], paths[losses.argmin()])
        np.testing.assert_array_equal(values[r], possible[losses.argmin()])
    np.testing.assert_allclose(np.square(errors).sum(1), cost, rtol=1e-4)


def test_the_encoder_with_more_survivors():
    """Less loss, and afterwards everything is as it was."""
    kind = TYPES["A2"]
    generator = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(12, 256, generator=generator)
    x = torch.randn(2000, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    metric = Metric(x.T @ x / 2000, 0.01)
    before = encode_rows(weight, metric, kind, EncodeOptions())
    with bench_survivors.survivors(4):
        more = encode_rows(weight, metric, kind, EncodeOptions())
    assert more.loss < before.loss
    assert (encode_matrix(weight, x.T @ x / 2000, kind, EncodeOptions()).data == before.data).all()
