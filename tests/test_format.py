"""The format package against the golden vectors and against itself."""

import golden_vectors
import numpy as np
import pytest

from athena_gguf.format import (
    SCALE_MAX,
    SCALE_MIN,
    TYPES,
    decode_rows,
    decode_scale,
    encode_scale,
    levels,
    pack_rows,
    row_bytes,
    unpack_rows,
)
from athena_gguf.format.trellis import trellis

KINDS = list(TYPES.values())
WIDTHS = (64, 128, 192, 256, 320, 576, 1536)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_golden_vectors_decode_exactly(kind):
    seen = set()
    for columns, data, values in golden_vectors.read(kind):
        np.testing.assert_array_equal(decode_rows(kind, data[None], columns)[0], values)
        seen.add(columns)
    assert {64, 128, 192, 256, 576, 896, 1536, 4096} <= seen


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("columns", WIDTHS)
def test_pack_and_unpack_are_inverse_both_ways(kind, columns):
    rng = np.random.default_rng(columns)
    symbols = rng.integers(0, 1 << kind.bits, (5, columns)).astype(np.uint8)
    scales = rng.integers(0, 256, (5, columns // 64)).astype(np.uint8)
    data = pack_rows(kind, symbols, scales)
    assert data.shape == (5, row_bytes(kind, columns)) == (5, columns * kind.bits_per_weight / 8)
    for got, want in zip(unpack_rows(kind, data, columns), (symbols, scales), strict=True):
        np.testing.assert_array_equal(got, want)
    random_bytes = rng.integers(0, 256, data.shape).astype(np.uint8)  # every byte string is a row
    np.testing.assert_array_equal(pack_rows(kind, *unpack_rows(kind, random_bytes, columns)), random_bytes)
    assert np.isfinite(decode_rows(kind, random_bytes, columns)).all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_trellis_walks_give_the_decoded_levels(kind):
    graph = trellis(kind)
    symbols = np.random.default_rng(3).integers(0, 1 << kind.bits, (1, 32 * 12)).astype(np.uint8)
    want = levels(kind, symbols).reshape(-1, 32)
    for lane in range(32):
        state = 0
        for step, s in enumerate(symbols.reshape(-1, 32)[:, lane]):
            (new,) = (n for n in range(kind.states) if graph.symbol[n] == s and state in graph.previous[n])
            level = int(kind.table1[graph.index1[new]]) + int(kind.table2[graph.index2[state]]) - 64
            assert level == want[step, lane]
            state = new


def test_scale_bytes_are_monotonic_and_round_to_the_nearest():
    scales = decode_scale(np.arange(256, dtype=np.uint8))
    assert (np.diff(scales) > 0).all() and scales[0] == SCALE_MIN and scales[-1] == SCALE_MAX
    np.testing.assert_array_equal(encode_scale(scales), np.arange(256))
    x = np.random.default_rng(0).uniform(0, SCALE_MAX, 2000).astype(np.float32)
    nearest = np.abs(scales[None] - x[:, None]).min(axis=1)
    np.testing.assert_allclose(np.abs(decode_scale(encode_scale(x)) - x), nearest, rtol=1e-6)
    np.testing.assert_array_equal(encode_scale(np.array([-1.0, 0.0, 1e9, np.inf])), [0, 0, 255, 255])
    with pytest.raises(ValueError, match="NaN"):
        encode_scale(np.array([np.nan]))


def test_bad_shapes_and_symbols_are_refused():
    kind = TYPES["A3"]
    with pytest.raises(ValueError, match="multiple of 64"):
        row_bytes(kind, 100)
    with pytest.raises(ValueError, match="larger than 3 bits"):
        pack_rows(kind, np.full((1, 64), 8, np.uint8), np.zeros((1, 1), np.uint8))
    with pytest.raises(ValueError, match="scale bytes"):
        pack_rows(kind, np.zeros((1, 64), np.uint8), np.zeros((1, 2), np.uint8))
    with pytest.raises(ValueError, match="25 bytes"):
        unpack_rows(kind, np.zeros((1, 24), np.uint8), 64)
