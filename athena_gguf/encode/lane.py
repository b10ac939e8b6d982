"""The search inside one lane: a Viterbi pass over the trellis with per-survivor error feedback, Numba on the CPU.

A survivor (one per trellis state) keeps its own residual of the lane's later columns, so that the search sees every
column as it would stand after the survivor's own earlier errors were fed back (per-survivor processing, Raheli et al.
1995, applied to the error feedback of GPTQ, Frantar et al. 2022). The trellis is that of `athena_gguf.format.trellis`,
states renumbered so that the innermost loop runs over adjacent ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numba as nb
import numpy as np

from athena_gguf.encode.simd import WIDTH, make_relax, subtract
from athena_gguf.format import AType
from athena_gguf.format.trellis import trellis

LaneSearch = Callable[..., None]


@cache
def lane_search(kind: AType) -> LaneSearch:
    """The compiled search of a type: `search(x, factor, scale, symbols, values, errors, cost)`.

    In: `x` [rows, steps] float32, the lane's target weights; `factor` [steps, steps] float32, upper triangular, with
    factor^T factor the inverse of the lane's curvature (given the lanes before it); `scale` [rows, steps] float32.
    Out: `symbols` [rows, steps] uint8; `values` [rows, steps] float32, the unscaled levels; `errors` [rows, steps]
    float32, (residual - value) / factor[t, t]; `cost` [rows] float32, the sum of the squared errors.
    """
    states, fan = kind.states, 1 << kind.bits
    graph = trellis(kind)
    # New states in an order in which each of their predecessors is one state, or a run of states, for a whole vector
    # of them: by the group that shares its predecessors, or (A2, whose groups are small) by symbol.
    order = np.lexsort((graph.symbol, graph.previous[:, 0])) if fan > 4 else np.arange(states)
    # Old states likewise: A2's four predecessors of a state are adjacent, so they are dealt to four runs.
    place = np.argsort(order) if fan > 4 else np.arange(states) % fan * (states // fan) + np.arange(states) // fan
    relax = make_relax(place[graph.previous[order].T].astype(np.int32))
    first = (kind.table1[graph.index1[order]] - np.float32(64)).astype(np.float32)
    second = np.empty(states, np.float32)
    second[place] = kind.table2[graph.index2]
    first_of, symbol_of = np.empty_like(first), np.empty(states, np.uint8)
    first_of[place], symbol_of[place] = first[np.argsort(order)], graph.symbol
    becomes = place[order].astype(np.int32)  # place as an old state of the n-th new one
    start = int(place[0])

    @nb.njit(nogil=True, fastmath=True, error_model="numpy")
    def search(x, factor, scale, symbols, values, errors, cost):  # type: ignore[no-untyped-def]
        rows, steps = x.shape
        width = (steps + WIDTH - 1) // WIDTH * WIDTH
        ahead = np.zeros((steps, width), np.float32)  # the factor above its diagonal, padded to whole vectors
        for t in range(steps):
            for j in range(t + 1, steps):
                ahead[t, j] = factor[t, j]
        ahead = ahead.ravel()
        feeds = np.any(ahead != 0)
        residual, moved = np.zeros(states * width, np.float32), np.zeros(states * width, np.float32)
        a, paid = np.empty(states, np.float32), np.empty(states, np.float32)
        b, best = np.empty(states, np.float32), np.empty(states, np.float32)
        old = np.empty(states, np.int32)
        back = np.empty((steps, states), np.int32)
        history = np.empty((steps, states), np.float32)
        for r in range(rows):
            for p in range(states):
                paid[p] = np.float32(1e30)
                for j in range(steps):
                    residual[p * width + j] = x[r, j]
            paid[start] = np.float32(0)
            for t in range(steps):
                inverse = np.float32(1) / factor[t, t]
                step = scale[r, t] * inverse
                for n in range(states):
                    a[n] = residual[n * width + t] * inverse - step * second[n]
                    b[n] = step * first[n]
                relax(a, paid, b, best, old)
                done = (t + 1) // WIDTH * WIDTH
                vectors = (width - done) // WIDTH
                for n in range(states):
                    p, new = old[n], becomes[n]
                    e = a[p] - b[n]
                    back[t, new] = p
                    history[t, new] = e
                    paid[new] = best[n]
                    if feeds:
                        subtract(
                            moved, new * width + done, residual, p * width + done, ahead, t * width + done, e, vectors
                        )
                if feeds:
                    residual, moved = moved, residual
            n = np.argmin(paid)
            cost[r] = paid[n]
            for t in range(steps - 1, -1, -1):
                p = back[t, n]
                symbols[r, t] = symbol_of[n]
                values[r, t] = first_of[n] + second[p]
                errors[r, t] = history[t, n]
                n = p

    return search
