"""Whole passes over the lanes of some rows: error feedback from lane to lane, and coordinate descent over lanes.

Compiled with Numba and free of the interpreter's lock, so that threads scale.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numba as nb
import numpy as np

from athena_gguf.encode.lane import lane_search
from athena_gguf.format import LANES, AType


@nb.njit(nogil=True, fastmath=True, error_model="numpy")
def _add_product(out, a, b, sign):  # type: ignore[no-untyped-def]
    """`out += sign * a @ b`; out [rows, columns], a [rows, steps], b [steps, columns], steps even."""
    rows, columns = out.shape
    for r in range(rows):
        row = out[r]
        for t in range(0, a.shape[1], 2):
            p, q = sign * a[r, t], sign * a[r, t + 1]
            x, y = b[t], b[t + 1]
            for c in range(columns):
                row[c] += p * x[c] + q * y[c]


@cache
def feedback_pass(kind: AType) -> Callable[..., None]:
    """The compiled `run(x, upper, scale, symbols, values)`: all lanes once, each after the errors of those before it.

    In: `x` [rows, columns] the weights, columns lane by lane, used up; `upper` [columns, columns]; `scale` [rows,
    steps]. Out: `symbols` uint8 and `values` int8, both as x.
    """
    search = lane_search(kind)

    @nb.njit(nogil=True, fastmath=True, error_model="numpy")
    def run(x, upper, scale, symbols, values):  # type: ignore[no-untyped-def]
        rows, columns = x.shape
        steps = columns // LANES
        s = np.empty((rows, steps), np.uint8)
        v, e = np.empty((rows, steps), np.float32), np.empty((rows, steps), np.float32)
        cost = np.empty(rows, np.float32)
        for a in range(0, columns, steps):
            z = a + steps
            factor = upper[a:z, a:z].copy()
            search(x[:, a:z].copy(), factor, scale, s, v, e, cost)
            symbols[:, a:z] = s
            values[:, a:z] = v
            if z < columns:
                _add_product(x[:, z:], e, upper[a:z, z:], np.float32(-1))

    return run


@cache
def sweep(kind: AType) -> Callable[..., None]:
    """The compiled `run(pull, h, factors, inverses, scale, symbols, values)`: every lane once, all others fixed.

    `pull` [rows, columns] is the error times h, half the gradient of the loss, and is kept so; `h` [columns, columns];
    `factors`, `inverses` [lanes, steps, steps] of `Metric`; `scale` [rows, steps]; `symbols`, `values` [rows, columns],
    columns lane by lane, updated. A row's lane changes only if that lowers the row's loss.
    """
    search = lane_search(kind)

    @nb.njit(nogil=True, fastmath=True, error_model="numpy")
    def run(pull, h, factors, inverses, scale, symbols, values):  # type: ignore[no-untyped-def]
        rows, columns = pull.shape
        steps = columns // LANES
        s = np.empty((rows, steps), np.uint8)
        v, e = np.empty((rows, steps), np.float32), np.empty((rows, steps), np.float32)
        shift, target = np.empty((rows, steps), np.float32), np.empty((rows, steps), np.float32)
        cost = np.empty(rows, np.float32)
        for lane in range(LANES):
            a = lane * steps
            z = a + steps
            # Completing the square: with the other lanes fixed, the loss is the distance to this target under the
            # lane's own block of h, and a constant.
            shift[:] = 0
            _add_product(shift, pull[:, a:z], inverses[lane], np.float32(1))
            for r in range(rows):
                for t in range(steps):
                    target[r, t] = values[r, a + t] * scale[r, t] + shift[r, t]
            search(target, factors[lane], scale, s, v, e, cost)
            for r in range(rows):
                before = np.float32(0)
                for t in range(steps):
                    before += pull[r, a + t] * shift[r, t]
                better = cost[r] < before
                for t in range(steps):
                    e[r, t] = 0
                    if better:
                        e[r, t] = (values[r, a + t] - v[r, t]) * scale[r, t]
                        values[r, a + t] = v[r, t]
                        symbols[r, a + t] = s[r, t]
            _add_product(pull, e, h[a:z], np.float32(1))

    return run
