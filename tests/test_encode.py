"""The encoder against brute force, against NumPy in float64, and against itself with other cuts of the work."""

import itertools

import numpy as np
import pytest
import torch

from athena_gguf.encode import EncodeOptions, EncodePool, Metric, encode_matrix
from athena_gguf.encode.cpu import CpuSteps
from athena_gguf.encode.lane import lane_search
from athena_gguf.format import TYPES, decode_rows, decode_scale, levels

KINDS = list(TYPES.values())
by_name = pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
SMALL = EncodeOptions(sweeps=1)


def run_search(kind, x, factor, scale):
    symbols, cost = np.empty(x.shape, np.uint8), np.empty(len(x), np.float32)
    values, errors = np.empty(x.shape, np.float32), np.empty(x.shape, np.float32)
    lane_search(kind)(x, factor, scale, symbols, values, errors, cost)
    return symbols, values, errors, cost


def one_lane_levels(kind, symbols):
    """Levels [n, steps] of single-lane symbol sequences, through the reference decoder."""
    n, steps = symbols.shape
    rows = np.zeros((n, steps, 32), np.uint8)
    rows[:, :, 0] = symbols
    return levels(kind, rows.reshape(n, -1)).reshape(n, steps, 32)[:, :, 0].astype(np.float64)


def curvature(columns, seed=0, samples=4):
    """A correlated one with strong and weak columns."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples * columns, columns)) @ rng.standard_normal((columns, columns)) / columns**0.5
    x *= np.exp(rng.standard_normal(columns))
    return torch.from_numpy(x.T @ x / len(x)).float()


def gaussian(rows, columns, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32) * 0.02)


@by_name
def test_search_without_feedback_finds_the_optimum(kind):
    steps = 12 // kind.bits
    every = np.array(list(itertools.product(range(1 << kind.bits), repeat=steps)), np.uint8)
    candidates = one_lane_levels(kind, every)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((20, steps)).astype(np.float32)
    scale = rng.uniform(0.03, 0.08, x.shape).astype(np.float32)
    weights = rng.uniform(0.5, 2, steps).astype(np.float32)
    symbols, values, _, cost = run_search(kind, x, np.diag(weights), scale)
    for r in range(len(x)):
        best = (((x[r] - candidates * scale[r]) / weights) ** 2).sum(1).min()
        assert cost[r] == pytest.approx(best, rel=1e-4)
    np.testing.assert_array_equal(values, one_lane_levels(kind, symbols))


@by_name
def test_search_with_feedback_reports_the_true_loss_and_comes_near_the_optimum(kind):
    steps = 12 // kind.bits
    every = np.array(list(itertools.product(range(1 << kind.bits), repeat=steps)), np.uint8)
    candidates = one_lane_levels(kind, every)
    h = curvature(steps, seed=2).double().numpy() + 0.05 * np.eye(steps)
    factor = np.linalg.cholesky(np.linalg.inv(h)).T
    rng = np.random.default_rng(3)
    x = rng.standard_normal((30, steps)).astype(np.float32)
    scale = np.full(x.shape, 0.05, np.float32)
    _, values, errors, cost = run_search(kind, x, factor.astype(np.float32), scale)
    found, best = 0.0, 0.0
    for r in range(len(x)):
        e = x[r].astype(np.float64) - values[r] * scale[r]
        loss = e @ h @ e
        assert cost[r] == pytest.approx(loss, rel=1e-3)
        np.testing.assert_allclose(errors[r] @ factor, e, atol=1e-4)
        found += loss
        d = x[r] - candidates * 0.05
        best += np.einsum("ni,ij,nj->n", d, h, d).min()
    assert best * (1 - 1e-5) <= found <= 1.35 * best


@by_name
@pytest.mark.parametrize("columns", [64, 320, 576])
def test_the_reported_loss_is_that_of_the_decoded_bytes(kind, columns):
    w, h = gaussian(9, columns), curvature(columns)
    encoded = encode_matrix(w, h, kind, SMALL)
    damped = h.double().numpy() + SMALL.damping * float(h.diagonal().double().mean()) * np.eye(columns)
    e = w.double().numpy() - decode_rows(kind, encoded.data, columns)
    assert encoded.loss == pytest.approx(float(((e @ damped) * e).sum()), rel=1e-3)
    assert encoded.power == pytest.approx(float(((w.double().numpy() @ damped) * w.numpy()).sum()), rel=1e-3)


@by_name
def test_curvature_feedback_and_sweeps_each_lower_the_loss(kind):
    w, h = gaussian(16, 256), curvature(256)
    metric = h.double().numpy()

    def loss(curved, **options):
        e = w.double().numpy() - decode_rows(kind, encode_matrix(w, curved, kind, EncodeOptions(**options)).data, 256)
        return float(((e @ metric) * e).sum())

    plain = loss(None, sweeps=2)
    diagonal = loss(torch.diag(h.diagonal()), sweeps=2)
    once, swept = loss(h, sweeps=0), loss(h, sweeps=3)
    assert swept < 0.97 * once
    assert once < 0.9 * diagonal
    assert diagonal < plain


@pytest.mark.parametrize(("name", "decibel"), [("A2", 10.7), ("A3", 16.2), ("A4", 21.8)])
def test_signal_to_noise_of_a_gaussian_is_that_of_the_format_document(name, decibel):
    w = gaussian(3, 8192, seed=5)
    e = w.numpy() - decode_rows(TYPES[name], encode_matrix(w, None, TYPES[name], EncodeOptions(sweeps=1)).data, 8192)
    # A scale for every 64 columns, fitted, gains a little over the one scale of the document's figures.
    assert 10 * np.log10(float(w.square().sum()) / np.square(e).sum()) > decibel - 0.1


def test_refitted_scales_are_the_best_pair_of_bytes():
    w, h = gaussian(4, 128, seed=6), curvature(128, seed=6)
    metric = Metric(h, 0.01)
    values = torch.from_numpy(np.random.default_rng(6).integers(-30, 31, (4, 128)).astype(np.float32))
    values = ((w / 0.001).round() + (values / 30).round()).clamp(
        -63, 63
    )  # near the weights, so that the optimum is positive
    before = torch.full((4, 2), 100, dtype=torch.uint8)
    steps = CpuSteps(w[:, metric.order], metric, TYPES["A4"])
    codes = steps.refit(values[:, metric.order].to(torch.int8), before).numpy()
    scales = decode_scale(np.arange(256, dtype=np.uint8)).astype(np.float64)
    p = metric.plain.double().numpy()
    for r in range(4):
        parts = values[r].double().numpy().reshape(2, 64)
        v = np.stack([np.r_[parts[0], np.zeros(64)], np.r_[np.zeros(64), parts[1]]])
        normal, right = v @ p @ v.T, v @ p @ w[r].double().numpy()

        def loss(a, b, normal=normal, right=right):
            return (
                normal[0, 0] * a * a
                + 2 * normal[0, 1] * a * b
                + normal[1, 1] * b * b
                - 2 * (right[0] * a + right[1] * b)
            )

        best = loss(scales[:, None], scales[None, :]).min()
        got = loss(*decode_scale(codes[r]).astype(np.float64))
        assert got == pytest.approx(best, rel=1e-4)


def test_metric_factors_invert_the_damped_curvature():
    h = curvature(192, seed=7)
    metric = Metric(h, 0.02)
    damped = h.double() + 0.02 * h.diagonal().double().mean() * torch.eye(192, dtype=torch.float64)
    np.testing.assert_allclose(metric.plain.double(), damped, rtol=1e-5, atol=1e-6)
    ordered = damped[metric.order][:, metric.order]
    unit = metric.upper.double().T @ metric.upper.double() @ ordered
    np.testing.assert_allclose(unit, np.eye(192), atol=2e-3)
    assert torch.equal(metric.upper, metric.upper.triu())
    for lane in (0, 13, 31):
        block = ordered[lane * 6 : lane * 6 + 6, lane * 6 : lane * 6 + 6]
        np.testing.assert_allclose(metric.lane_inverses[lane].double() @ block, np.eye(6), atol=1e-3)


def test_a_curvature_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="positive definite"):
        Metric(-torch.eye(64), 0.01)


@by_name
def test_dead_and_zero_inputs_encode(kind):
    w = gaussian(3, 128)
    w[1] = 0
    h = curvature(128)
    h[:, 5] = h[5] = 0
    for matrix in (h, torch.zeros(128, 128)):
        encoded = encode_matrix(w, matrix, kind, SMALL)
        decoded = decode_rows(kind, encoded.data, 128)
        assert np.isfinite(decoded).all() and np.isfinite(encoded.loss)
        assert np.abs(decoded[1]).max() < 1e-3


def test_a_single_row_encodes_as_it_does_among_others():
    w, h = gaussian(4, 320, seed=9), curvature(320, seed=9)
    kind = TYPES["A4"]
    among = encode_matrix(w, h, kind, SMALL).data
    np.testing.assert_array_equal(encode_matrix(w[2:3], h, kind, SMALL).data, among[2:3])


def test_bytes_do_not_depend_on_the_number_of_threads():
    w, metric = gaussian(600, 64, seed=8), Metric(curvature(64, seed=8), 0.01)
    kind = TYPES["A3"]
    results = []
    for threads in (1, 3):
        with EncodePool(SMALL, threads) as pool:
            results.append(pool.submit(w, metric, kind)())
    assert results[0].data.shape == (600, 25)
    np.testing.assert_array_equal(results[0].data, results[1].data)
    assert results[0].loss == results[1].loss


@pytest.mark.parametrize("finished", [(), ("q",), ("q", "v"), ("o",), ("q", "k", "v"), ("q", "k", "v", "o", "up")])
def test_what_a_gpu_encodes_together_does_not_depend_on_what_is_finished(finished, monkeypatch):
    """The last bits of a product depend on its shape: a conversion that goes on makes the products that it would have
    made."""
    from types import SimpleNamespace

    from athena_gguf.encode import layer

    monkeypatch.setattr(layer, "GPU_PIECE", 10 * 64)
    rows = {"q": 4, "k": 2, "v": 2, "o": 3, "up": 20}
    kinds = {"q": "A3", "k": "A3", "v": "A3", "o": "A4", "up": "A3"}
    tensors = [
        SimpleNamespace(name=n, columns=64, n_elements=64 * r, to_torch=lambda device, r=r: torch.zeros(r, 64))
        for n, r in rows.items()
    ]
    made = []

    def submit_together(weights, metric, kind):
        made.append((kind.name, [len(weight) for weight in weights]))
        return lambda: [f"{kind.name} {len(weight)}" for weight in weights]

    pool = SimpleNamespace(gpu=True, threads=1, options=EncodeOptions(), submit_together=submit_together)
    found = dict(layer.encode_layer(pool, torch.eye(64), tensors, kinds, "cpu", finished=finished))
    assert found == {n: f"{kinds[n]} {rows[n]}" for n in rows if n not in finished}
    whole = [("A3", [4, 2, 2], {"q", "k", "v"}), ("A3", [20], {"up"}), ("A4", [3], {"o"})]
    assert made == [(kind, those) for kind, those, names in whole if names - set(finished)]
