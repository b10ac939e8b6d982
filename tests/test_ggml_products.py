"""Products of A-type matrices with several tokens: our code by itself in every build, and through ggml's graphs."""

from pathlib import Path

import ggml_library
import numpy as np
import numpy.typing as npt
import pytest
from ggml_library import BUILDS, Library

from athena_gguf.format import TYPES, AType, decode_rows, decode_scale, levels, row_bytes, unpack_rows

WIDTHS = (64, 128, 192, 576, 768, 1536, 1600)
TOKENS = (1, 2, 3, 5, 17, 512)


@pytest.fixture(scope="module", params=BUILDS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    flags = ggml_library.flags_of_build(request.param)
    path = tmp_path_factory.mktemp(request.param) / "libathena.so"
    ggml_library.compile_c(path, [*flags, "-shared", "-fPIC"], [ggml_library.C_TESTS / "gemm.c"])
    return Library(path)


def random_matrix(kind: AType, rows: int, columns: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    return rng.integers(0, 256, (rows, row_bytes(kind, columns))).astype(np.uint8)


def rounded(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Activations as docs/format.md rounds them: 127 steps to the largest of 64 columns."""
    groups = x.reshape(len(x), -1, 64)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    scale = np.float32(127) / largest
    return (np.rint(groups * scale).astype(np.float64) * (largest / np.float32(127))).reshape(x.shape)


def assert_product(kind: AType, rows: npt.NDArray[np.uint8], x: npt.NDArray[np.float32], got: npt.NDArray) -> None:
    """Against double precision. The only errors are those of adding floats."""
    weights = decode_rows(kind, rows, x.shape[1]).astype(np.float64)
    values = rounded(x)
    assert got.shape == (len(x), len(rows))
    assert (np.abs(got - values @ weights.T) <= 2e-6 * (np.abs(values) @ np.abs(weights).T)).all()


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("gathered", [False, True])
def test_products(library: Library, kind: AType, gathered: bool) -> None:
    """Row counts around the tile of 16 and the task of 64, and token counts around the panel and the task of 512."""
    rng = np.random.default_rng(1)
    for columns in WIDTHS:
        for rows, tokens in ((1, 1), (15, 3), (16, 16), (17, 8), (33, 5), (64, 17), (83, 40)):
            matrix = random_matrix(kind, rows, columns, rng)
            x = rng.standard_normal((tokens, columns)).astype(np.float32)
            got = library.multiply(kind, matrix, columns, x, gathered)
            if got is None:
                pytest.skip("neither AVX2 nor NEON: ggml takes dot products")
            assert_product(kind, matrix, x, got)
    matrix, x = random_matrix(kind, 20, 128, rng), rng.standard_normal((530, 128)).astype(np.float32)
    got = library.multiply(kind, matrix, 128, x, gathered)
    assert got is not None
    assert_product(kind, matrix, x, got)


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
def test_integer_sums_are_exact(library: Library, kind: AType) -> None:
    """With one group's activations whole numbers up to 127 and the others 0, results are integers times a scale."""
    rng = np.random.default_rng(2)
    for columns in (64, 192, 576, 896):
        for group in range(columns // 64):
            x = np.zeros((19, columns), np.float32)
            part = rng.integers(-127, 128, (19, 64)).astype(np.float32)
            part[::2] = np.where(rng.random(part[::2].shape) < 0.5, -127, 127)  # the extremes, of one sign in the last
            part[:, 0], part[-1] = 127, 127
            x[:, 64 * group : 64 * group + 64] = part
            matrix = random_matrix(kind, 21, columns, rng)
            got = library.multiply(kind, matrix, columns, x, False)
            if got is None:
                pytest.skip("neither AVX2 nor NEON: ggml takes dot products")
            symbols, codes = unpack_rows(kind, matrix, columns)
            integers = levels(kind, symbols).astype(np.int64).reshape(21, -1, 64)[:, group]
            sums = part.astype(np.int64) @ integers.T
            np.testing.assert_array_equal(got, sums * decode_scale(codes).astype(np.float64)[:, group])


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
def test_integer_sums_are_exact_around_16_bits(library: Library, kind: AType) -> None:
    """Activations in proportion to a row's levels: sums of eight products come close to 2^15 and pass it."""
    rng = np.random.default_rng(6)
    matrix = random_matrix(kind, 48, 128, rng)
    symbols, codes = unpack_rows(kind, matrix, 128)
    integers = levels(kind, symbols).astype(np.int64)[:, 64:]
    x = np.zeros((8 * 48, 128), np.float32)
    for token in range(len(x)):
        if token % 8 == 0:  # the tokens of a panel are alike, those of the next one not
            factor = np.full(64, 0.3)
            strong = 16 * rng.integers(4)
            factor[strong : strong + 16] = rng.uniform(0.5, 3.5)
            largest = np.argsort((integers[:, strong : strong + 16] ** 2).sum(axis=1))[-4:]
        q = np.clip(np.rint(factor * integers[rng.choice(largest)]), -127, 127)
        x[token, 64:] = q * rng.choice((-1, 1))
        x[token, 64] = 127  # what a step is 1/127 of
    got = library.multiply(kind, matrix, 128, x, False)
    if got is None:
        pytest.skip("neither AVX2 nor NEON: ggml takes dot products")
    sums = x[:, 64:].astype(np.int64) @ integers.T
    np.testing.assert_array_equal(got, sums * decode_scale(codes).astype(np.float64)[:, 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_only_the_token_that_is_not_finite_is_lost(library: Library, bad: float) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((9, 320)).astype(np.float32)
    x[4, 70] = bad
    good = np.arange(9) != 4
    for kind in TYPES.values():
        matrix = random_matrix(kind, 18, 320, rng)
        got = library.multiply(kind, matrix, 320, x, False)
        if got is None:
            pytest.skip("neither AVX2 nor NEON: ggml takes dot products")
        assert np.isnan(got[4]).all()
        assert_product(kind, matrix, x[good], got[good])


@pytest.fixture(scope="module")
def mul_mat(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("mul_mat") / "mul_mat"
    ggml_library.link_ggml(program, runtime, ggml_library.C_TESTS / "mul_mat.c")
    return program


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_graphs(mul_mat: Path, tmp_path: Path, kind: AType, tokens: int) -> None:
    """MUL_MAT of the built runtime, between products of another type; with more threads than tiles too."""
    rng = np.random.default_rng(4)
    files = [tmp_path / name for name in ("weights", "activations", "out")]
    for columns, rows, threads in ((64, 7, 1), (128, 1130, 3), (192, 33, 2), (576, 200, 2), (1536, 83, 16)):
        matrix = random_matrix(kind, rows, columns, rng)
        x = rng.standard_normal((tokens, columns)).astype(np.float32)
        files[0].write_bytes(matrix.tobytes())
        files[1].write_bytes(x.tobytes())
        ggml_library.run(mul_mat, kind.ggml_type, rows, columns, tokens, threads, *files)
        got = np.fromfile(files[2], np.float32).reshape(tokens, rows)
        assert_product(kind, matrix, x, got)
