"""The CUDA kernels in Numba's simulator, against the CPU's steps and against NumPy.

The simulator must be chosen before Numba is imported, so the tests run in a process of their own.
"""

import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("numba_cuda")
SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
in_simulator = pytest.mark.skipif(not SIMULATED, reason="runs in a process of its own")


@pytest.mark.skipif(SIMULATED, reason="that process")
def test_kernels_in_the_simulator():
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " skipped" not in done.stdout.replace("1 skipped", "")


def problem(kind, rows, steps, feeds):
    """Inputs of a search whose `steps` columns are one lane."""
    rng = np.random.default_rng(steps)
    x = rng.standard_normal((rows, steps)).astype(np.float32)
    samples = rng.standard_normal((2 * steps, steps)) @ (np.eye(steps) + 0.5 * rng.standard_normal((steps, steps)))
    h = samples.T @ samples / len(samples)
    if not feeds:
        h = np.diag(h.diagonal())
    factor = np.linalg.cholesky(np.linalg.inv(h)).T.astype(np.float32).copy()
    return x, factor, np.full(x.shape, 0.05, np.float32)


@in_simulator
@pytest.mark.parametrize("steps", [5, 41])
@pytest.mark.parametrize("feeds", [False, True])
@pytest.mark.parametrize("name", ["A2", "A3", "A4"])
def test_search_finds_what_the_search_on_the_cpu_finds(name, feeds, steps):
    import torch

    from athena_gguf.encode.cuda.search import SearchShape, rows_of_block, search_kernel, words_of_step
    from athena_gguf.encode.horizon import COMMIT, HORIZON
    from athena_gguf.encode.lane import lane_search
    from athena_gguf.encode.metric import Lanes
    from athena_gguf.format import TYPES

    kind = TYPES[name]
    shape = SearchShape(HORIZON[name] if feeds else 0, COMMIT, warps=1, exchange="shared")
    rows = 1 if name == "A2" else 2
    x, factor, scale = problem(kind, rows, steps, feeds)
    symbols, cost = np.empty(x.shape, np.uint8), np.empty(rows, np.float32)
    values, errors = np.empty(x.shape, np.float32), np.empty(x.shape, np.float32)
    lane_search(kind)(x, factor, scale, symbols, values, errors, cost)

    lanes = Lanes(torch.from_numpy(factor)[None])
    found_symbols, found_values = np.empty(x.shape, np.uint8), np.empty(x.shape, np.int8)
    costs, blocks = np.empty((rows, 1), np.float32), -(-rows // rows_of_block(kind, shape))
    back = np.empty((blocks, words_of_step(kind, shape), steps), np.int32)
    band = lanes.band(max(1, shape.horizon)).numpy()
    inputs = (x.copy(), scale, lanes.unit.numpy(), band, factor[None], 0, 1)
    search_kernel(kind, shape)[blocks, 32](*inputs, back, found_symbols, found_values, costs)
    np.testing.assert_array_equal(found_symbols, symbols)
    np.testing.assert_array_equal(found_values, values)
    np.testing.assert_allclose(costs[:, 0], cost, rtol=1e-5)


@in_simulator
def test_descent_over_scales_is_that_of_the_cpu():
    from athena_gguf.encode import cpu
    from athena_gguf.encode.cuda import scales
    from athena_gguf.encode.scales import MIDDLES, SCALES

    rows, groups = 9, 40
    rng = np.random.default_rng(1)
    directions = rng.standard_normal((rows, 2 * groups, groups))
    normal = (directions.transpose(0, 2, 1) @ directions).astype(np.float32)
    right = (normal @ rng.uniform(0.01, 0.05, (rows, groups, 1)))[..., 0].astype(np.float32)
    codes = np.full((rows, groups), 120, np.uint8)
    expected = codes.copy()
    cpu.descend(normal, right, SCALES, MIDDLES, 2, 1, expected)
    side_by_side = np.ascontiguousarray(codes.T)
    fitted = np.empty((groups, rows), np.float32)
    arguments = (normal.transpose(1, 2, 0).copy(), right.T.copy(), SCALES, MIDDLES, 2, 1, fitted, side_by_side)
    scales.descend[2, (scales.ROWS, scales.SHARE), 0, 4 * scales.ROWS * groups](*arguments)
    np.testing.assert_array_equal(side_by_side.T, expected)


@in_simulator
def test_normal_equations_are_those_of_numpy():
    import torch

    from athena_gguf.encode import Metric
    from athena_gguf.encode.cuda.engine import CudaSteps
    from athena_gguf.format import TYPES

    rng = np.random.default_rng(2)
    samples = rng.standard_normal((256, 128))
    metric = Metric(torch.from_numpy(samples.T @ samples / 256).float(), 0.01)
    values = torch.from_numpy(rng.integers(-60, 61, (128, 2)).astype(np.int8))
    steps = CudaSteps(torch.zeros(2, 128), metric, TYPES["A3"])
    normal = steps._normal(values).numpy()
    for r in range(2):
        parts = np.zeros((2, 128))
        parts[0, :64], parts[1, 64:] = values[:64, r], values[64:, r]
        expected = parts @ metric.plain.double().numpy() @ parts.T
        np.testing.assert_allclose(normal[:, :, r], expected, rtol=1e-4, atol=1e-3 * np.abs(expected).max())


@in_simulator
def test_a_row_is_encoded_as_on_the_cpu(monkeypatch):
    import torch

    from athena_gguf.encode import EncodeOptions, Metric, cpu, encode_rows
    from athena_gguf.encode.cuda import engine
    from athena_gguf.format import TYPES

    for module in (cpu, engine):
        monkeypatch.setattr(module, "OFFSETS", (0,))
    rng = np.random.default_rng(3)
    samples = rng.standard_normal((128, 64)) @ (np.eye(64) + 0.3 * rng.standard_normal((64, 64)))
    metric = Metric(torch.from_numpy(samples.T @ samples / 128).float(), 0.01)
    w = torch.from_numpy(rng.standard_normal((1, 64)).astype(np.float32) * 0.02)
    on_cpu, simulated = (encode_rows(w, metric, TYPES["A4"], EncodeOptions(sweeps=1), gpu) for gpu in (False, True))
    np.testing.assert_array_equal(simulated.data, on_cpu.data)
    assert simulated.loss == pytest.approx(on_cpu.loss, rel=1e-4)
    assert simulated.power == pytest.approx(on_cpu.power, rel=1e-4)
