"""The C row decoders, dot products and quantizers against NumPy."""

import shutil
from pathlib import Path

import ggml_library
import golden_vectors
import numpy as np
import pytest
from ggml_library import ACTIVATION, BUILDS, Library

from athena_gguf.format import TYPES, AType, decode_rows, decode_scale, levels, row_bytes, unpack_rows

GOLDEN = [golden_vectors.DIRECTORY / f"{name.lower()}.bin" for name in TYPES]
WIDTHS = (64, 128, 192, 256, 320, 576, 896, 960, 1536, 2880, 4096)


@pytest.fixture(scope="module", params=BUILDS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Our sources built for the plain architecture, for what else the CPU has, and for all that it has."""
    flags = ggml_library.flags_of_build(request.param)
    path = tmp_path_factory.mktemp(request.param) / "libathena.so"
    ggml_library.compile_c(path, [*flags, "-shared", "-fPIC"], [])
    return Library(path)


def random_row(kind: AType, columns: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, row_bytes(kind, columns)).astype(np.uint8)


def random_activations(columns: int, rng: np.random.Generator) -> np.ndarray:
    blocks = np.zeros(columns // 64, ACTIVATION)
    blocks["qs"] = rng.integers(-127, 128, (blocks.size, 64))
    blocks["offset"] = -64 * blocks["qs"].sum(axis=1, dtype=np.int32)
    blocks["d"] = rng.uniform(0.001, 0.1, blocks.size)
    return blocks


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
def test_golden_vectors_decode_exactly(library: Library, kind: AType) -> None:
    for columns, row, values in golden_vectors.read(kind):
        np.testing.assert_array_equal(library.decode(kind, row, columns), values)


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("suffix", ["", "_generic"])
def test_integer_sums_are_exact(library: Library, kind: AType, suffix: str) -> None:
    """With one group's d a power of two and the others 0, the float result holds that group's integer sum."""
    rng = np.random.default_rng(1)
    for columns in (64, 192, 256, 576, 896):
        row = random_row(kind, columns, rng)
        symbols, codes = unpack_rows(kind, row[None], columns)
        products = levels(kind, symbols)[0].astype(np.int64).reshape(-1, 64)
        scales = decode_scale(codes)[0].astype(np.float64)
        activations = random_activations(columns, rng)
        # the extremes too: every value -127 or 127
        activations["qs"][::2] = np.where(rng.random(activations["qs"][::2].shape) < 0.5, -127, 127)
        activations["offset"] = -64 * activations["qs"].sum(axis=1, dtype=np.int32)
        sums = (products * activations["qs"]).sum(axis=1)
        for group in range(columns // 64):
            activations["d"] = 0
            activations["d"][group] = 1.0
            mantissa = np.frexp(scales[group])[0]  # of five bits: its product with the sum is exact in a float
            assert library.dot(kind, row, activations, suffix) == sums[group] * scales[group], (group, mantissa)


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("suffix", ["", "_generic"])
def test_dot_product_against_double_precision(library: Library, kind: AType, suffix: str) -> None:
    rng = np.random.default_rng(2)
    for columns in WIDTHS:
        row, activations = random_row(kind, columns, rng), random_activations(columns, rng)
        weights = decode_rows(kind, row[None], columns)[0].astype(np.float64)
        values = (activations["d"][:, None].astype(np.float64) * activations["qs"]).reshape(-1)
        got = library.dot(kind, row, activations, suffix)
        # at most one rounding a group and lane beyond the exact integers
        assert abs(got - weights @ values) <= 1e-6 * np.abs(weights * values).sum()


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
def test_rows_together_give_what_each_gives(library: Library, kind: AType) -> None:
    """No row sees the one before it, and what lies between rows does not count."""
    rng = np.random.default_rng(5)
    for columns in WIDTHS:
        activations = random_activations(columns, rng)
        rows = np.stack([random_row(kind, columns, rng) for _ in range(7)])
        apart = np.concatenate([rows, rng.integers(0, 256, (7, 33)).astype(np.uint8)], axis=1)
        together = library.dot_rows(kind, apart, columns, activations)
        assert together.tolist() == [library.dot(kind, row, activations) for row in rows]


def test_activations_are_the_nearest_bytes(library: Library) -> None:
    rng = np.random.default_rng(3)
    x = (rng.standard_normal(4096) * np.exp(rng.normal(0, 4, 4096))).astype(np.float32)
    x[64:128] = 0
    x[128:192] = 1e-38  # too small to scale: becomes 0
    x[192:256] = np.arange(64) - 32  # ties and exact values
    blocks = library.quantize_activations(x)
    reference = library.quantize_activations(x, "_ref")
    assert blocks.tobytes() == reference.tobytes()
    np.testing.assert_array_equal(blocks["offset"], -64 * blocks["qs"].sum(axis=1, dtype=np.int32))
    ordinary = np.abs(x.reshape(-1, 64)).max(axis=1) > 1e-30
    error = np.abs(blocks["d"][:, None].astype(np.float64) * blocks["qs"] - x.reshape(-1, 64))
    assert (error[ordinary] <= 0.5001 * blocks["d"][ordinary, None]).all()
    assert (blocks["qs"][~ordinary] == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_reach_the_result(library: Library, bad: float) -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal(320).astype(np.float32)
    x[70] = bad
    blocks = library.quantize_activations(x)
    assert blocks.tobytes() == library.quantize_activations(x, "_ref").tobytes()
    for kind in TYPES.values():
        assert np.isnan(library.dot(kind, random_row(kind, 320, rng), blocks))


@pytest.mark.parametrize("build", BUILDS)
def test_random_bytes_under_sanitizers(build: str, tmp_path: Path) -> None:
    program = tmp_path / "random_rows"
    flags = [*ggml_library.flags_of_build(build), "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [ggml_library.C_TESTS / name for name in ("random_rows.c", "gemm.c")]
    ggml_library.compile_c(program, flags, sources)
    ggml_library.run(program, *GOLDEN)


@pytest.mark.parametrize("build", ["plain", "avx2"])
def test_random_bytes_under_valgrind(build: str, tmp_path: Path) -> None:
    """Nothing is read before it is written, the scratch memory of matrix products included; it knows no AVX-512."""
    valgrind = shutil.which("valgrind")
    if not valgrind:
        pytest.skip("no valgrind")
    program = tmp_path / "random_rows"
    flags = [*ggml_library.flags_of_build(build), "-g", "-DLEAVE_UNINITIALIZED"]
    ggml_library.compile_c(program, flags, [ggml_library.C_TESTS / name for name in ("random_rows.c", "gemm.c")])
    ggml_library.run(valgrind, "-q", "--error-exitcode=9", "--leak-check=full", program, *GOLDEN)


@pytest.mark.parametrize("architecture", ["armv8-a", "armv8.2-a+dotprod", "armv8.2-a+dotprod+i8mm"])
def test_random_bytes_on_arm(architecture: str, tmp_path: Path) -> None:
    """NEON with and without its dot product and matrix product instructions, in an emulator; golden vectors too."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("no compiler for ARM, or no qemu-aarch64")
    program = tmp_path / "random_rows"
    sources = [ggml_library.C_TESTS / name for name in ("random_rows.c", "gemm.c")]
    flags = [f"-march={architecture}", "-static", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    ggml_library.compile_c(program, flags, sources, compiler)
    said = ggml_library.run(emulator, program, *GOLDEN)
    golden, sums = int(said.split()[0]), int(said.split()[3])
    assert golden == 54 and sums > 5000


def best_error(kind: AType, targets: np.ndarray, weights: np.ndarray) -> float:
    """The least weighted squared error of any symbols of one lane; `targets` [steps] in levels."""
    from athena_gguf.format.trellis import trellis

    t = trellis(kind)
    values = kind.table1[t.index1].astype(float)[:, None] + kind.table2[t.index2[t.previous]] - 64  # [states, choices]
    costs = np.full(kind.states, np.inf)
    costs[0] = 0
    for target, weight in zip(targets, weights, strict=True):
        costs = (costs[t.previous] + weight * (target - values) ** 2).min(axis=1)
    return float(costs.min())


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_quantizer_finds_the_best_path(library: Library, kind: AType, weighted: bool) -> None:
    """For the scales that it chose, no symbols are better; and its scales are no worse than a plain choice."""
    rng = np.random.default_rng(5)
    columns, rows = 576, 3
    x = (rng.standard_normal((rows, columns)) * rng.lognormal(-4, 0.5, (rows, 1))).astype(np.float32)
    importance = rng.lognormal(0, 1.5, columns).astype(np.float32) if weighted else None
    weights = (np.ones(columns) if importance is None else importance / importance.mean()).astype(np.float64)
    data = library.quantize(kind, x, importance)
    decoded = decode_rows(kind, data, columns).astype(np.float64)
    _, codes = unpack_rows(kind, data, columns)
    scales = np.repeat(decode_scale(codes), 64, axis=1).astype(np.float64)
    for row in range(rows):
        error = (weights * (x[row] - decoded[row]) ** 2).sum()
        lanes = [slice(lane, columns, 32) for lane in range(32)]
        cost = weights * scales[row] ** 2
        target = x[row] / scales[row]
        least = sum(best_error(kind, target[lane], cost[lane]) for lane in lanes)
        # its symbols were found before the last refit of the scales, so that they may be a little off the best path
        assert least * (1 - 1e-4) <= error <= least * 1.01
    plain = {"A2": 9.5, "A3": 15.3, "A4": 19.5}[kind.name]  # dB, below what it reaches on such rows
    ratio = (weights * x**2).sum() / (weights * (x - decoded) ** 2).sum()
    assert 10 * np.log10(ratio) > plain


def test_quantizer_takes_any_numbers(library: Library) -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((8, 320)).astype(np.float32)
    x[0] = 0
    x[1] = np.nan
    x[2, 5] = np.inf
    x[3] *= 1e30
    x[4] *= 1e-30
    x[5] = 1e-45
    for importance in (np.zeros(320), np.full(320, np.nan), np.full(320, np.inf), -np.ones(320), np.full(320, 1e38)):
        for kind in TYPES.values():
            values = decode_rows(kind, library.quantize(kind, x, importance.astype(np.float32)), 320)
            assert np.isfinite(values).all()
            assert np.abs(values[[0, 4, 5]]).max() < 1e-4  # the smallest scale times a few levels
            ratio = (x[6:] ** 2).sum() / ((x[6:] - values[6:]) ** 2).sum()
            assert ratio > 5  # ordinary rows are not harmed
